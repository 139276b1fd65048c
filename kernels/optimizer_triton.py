"""One optimizer step of many tensors of a GPU in one launch.

Owns `Table`, which knows where the tensors of some works lie and launches
`optimizer_program_triton` for them on torch's current stream: one launch for all works of the same
method, codecs, types and alignment. Addresses and scalars lie in tables on the device; what has
changed since the last step is copied from pinned memory on the same stream, and nothing waits for
the device. Gives the bits of the reference in `client/optim`. Promises to hold neither tensors nor
gradients alive: callers do. Importing it imports neither torch nor triton.

The first launch of a kind compiles for some seconds; another tensor or another step never does.
"""

from typing import TYPE_CHECKING, Any

import numpy

from everstep.kernels import optimizer_lookups
from everstep.kernels.optimizer_kinds_triton import (
    Addresses,
    Kind,
    Launch,
    addresses_of,
    alignments_of,
    kind_of,
    layout_of,
    shape_of,
)
from everstep.kernels.optimizer_work import METHODS, SCALARS_AT_MOST, Work

if TYPE_CHECKING:
    import torch

PROGRAM_COLUMNS = 18
"""int64 words of a tensor in the table; `optimizer_program_triton` has their meaning."""

_DIRECTED = {"adam_direction": "written", "momentum_direction": "written", "apply": "read"}


class Table:
    """Works of one device and one method, and where they lie."""

    def __init__(self, works: list[Work], method: str, launch: Launch | None = None) -> None:
        """Lays out the tables for these works.

        Args:
            works: Every later `refresh` gets as many, of the same sizes, types and codecs.
            method: One of `optimizer_work.METHODS`.
            launch: How to lay out the work; None: as is best for each kind.

        Raises:
            ValueError: If a work has other states, scalars or types than the method and the
                kernels know.
        """
        import torch

        if method not in METHODS:
            raise ValueError(f"method {method!r}: known are {', '.join(METHODS)}")
        self._method = method
        self._launch = launch
        self._device = works[0].parameter.device if works else torch.device("cpu")
        self._maps = torch.from_numpy(optimizer_lookups.table().copy()).to(self._device)
        self._one = torch.ones(1, dtype=torch.float32, device=self._device)
        self._parts: list[_Part] = []
        self._alignments: list[Addresses] = []
        self.refresh(works)

    def refresh(self, works: list[Work]) -> None:
        """Take the addresses, scalars and seeds of the next step over.

        Args:
            works: As many as before, of the same sizes, types and codecs.

        Raises:
            ValueError: As for a new table.
        """
        fresh = [addresses_of(work) for work in works]
        if [alignments_of(addresses) for addresses in fresh] != self._alignments:
            self._arrange(works, fresh)
        for part in self._parts:
            part.refresh(works, fresh)

    def _arrange(self, works: list[Work], addresses: list[Addresses]) -> None:
        chosen: dict[Kind, list[int]] = {}
        for place, (work, found) in enumerate(zip(works, addresses, strict=True)):
            chosen.setdefault(kind_of(work, self._method, found), []).append(place)
        self._alignments = [alignments_of(found) for found in addresses]
        self._parts = [
            _Part(kind, places, works, self._launch or layout_of(kind), self._device)
            for kind, places in chosen.items()
        ]

    def step(
        self, grad_scale: "torch.Tensor | None" = None, found_inf: "torch.Tensor | None" = None
    ) -> None:
        """Take a step, on the current stream.

        Args:
            grad_scale: fp32, one on the device: what gradients are multiplied by; 1 if None.
            found_inf: fp32, one on the device: if it is not 0, nothing is written.
        """
        import torch

        scale = self._one if grad_scale is None else self._checked(grad_scale, "grad_scale")
        guard = self._one if found_inf is None else self._checked(found_inf, "found_inf")
        from everstep.kernels import optimizer_program_triton

        index = self._device.index if self._device.type == "cuda" else -1
        with torch.cuda.device(index if index is not None else torch.cuda.current_device()):
            for part in filter(lambda part: part.programs, self._parts):
                optimizer_program_triton.advance[(part.programs,)](
                    part.owners,
                    part.table,
                    part.scalars,
                    self._maps,
                    scale,
                    guard,
                    METHOD=self._method,
                    DIRECTED=_DIRECTED.get(self._method, ""),
                    BLOCKS=part.blocks,
                    TILES=part.launch.tiles,
                    GUARDED=found_inf is not None,
                    num_warps=part.launch.warps,
                    num_stages=1,
                    enable_fp_fusion=False,
                    **part.kind._asdict(),
                )

    def _checked(self, value: "torch.Tensor", name: str) -> "torch.Tensor":
        import torch

        if value.dtype != torch.float32 or value.numel() != 1 or value.device != self._device:
            raise ValueError(
                f"{name} is {value.dtype} {tuple(value.shape)} on {value.device}: one fp32 on "
                f"{self._device} is wanted"
            )
        return value


class _Part:
    """The works of one kind: their rows in the host's tables and in the device's."""

    def __init__(
        self,
        kind: Kind,
        places: list[int],
        works: list[Work],
        launch: Launch,
        device: "torch.device",
    ) -> None:
        import torch

        self.kind = kind
        self.launch = launch
        self.blocks = max(1, launch.elements // kind.WIDTH)
        self._places = places
        self._addresses: list[Addresses] = []
        self._numbers: list[tuple[float, ...]] = []
        self._rows = numpy.zeros((len(places), PROGRAM_COLUMNS), numpy.int64)
        self._values = numpy.zeros((len(places), SCALARS_AT_MOST), numpy.float32)
        counts = numpy.zeros(len(places), numpy.int64)
        for row, place in enumerate(places):
            lines, length = shape_of(works[place])
            across = -(-length // kind.WIDTH)
            counts[row] = -(-lines * across // (self.blocks * launch.tiles))
            self._rows[row, :4] = 0, lines * across, length, across
        self._rows[1:, 0] = counts.cumsum()[:-1]
        self.programs = int(counts.sum())
        if self.programs >= 1 << 31:
            raise ValueError(f"{self.programs} programs in one launch: at most 2**31 - 1 can be")
        owners = numpy.repeat(numpy.arange(len(places), dtype=numpy.int32), counts)
        self.owners = torch.from_numpy(owners).to(device)
        self.table = torch.empty(self._rows.shape, dtype=torch.int64, device=device)
        self.scalars = torch.empty(self._values.shape, dtype=torch.float32, device=device)

    def refresh(self, works: list[Work], fresh: list[Addresses]) -> None:
        """Copy what has changed."""
        addresses = [fresh[place] for place in self._places]
        if addresses != self._addresses:
            self._addresses = addresses
            self._rows[:, 4 : 4 + len(addresses[0])] = addresses
            _send(self._rows, self.table)
        numbers = [works[place].scalars for place in self._places]
        if numbers != self._numbers:
            self._numbers = numbers
            if len(set(numbers)) == 1:  # the usual case, and much faster
                numbers = numbers[:1]
            self._values[:, : len(numbers[0])] = numbers
            _send(self._values, self.scalars)


def _send(rows: Any, target: "torch.Tensor") -> None:
    """Copy to the device, behind what was launched before and without waiting for it."""
    import torch

    source = torch.from_numpy(rows)
    # torch keeps pinned memory until the stream has passed, so that the next step has its own.
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
