"""One optimizer step of many tensors of a GPU in one launch.

Owns `Table`, which knows where the tensors of some works lie and launches
`optimizer_program_triton` for them on torch's current stream: one launch for all works of the same
method, codecs, types and alignment. Addresses and scalars lie in tables on the device; what has
changed since the last step is copied from pinned memory on the same stream, and nothing waits for
the device. Gives the bits of the reference in `client/optim`. Promises to hold neither tensors nor
gradients alive: callers do. Importing it imports neither torch nor triton.

The first launch of a kind compiles for some seconds; another tensor or another step never does.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy

from everstep.kernels import optimizer_lookups
from everstep.kernels.optimizer_work import (
    CODECS,
    METHODS,
    SCALARS_AT_MOST,
    STATES_AT_MOST,
    CodedState,
    Work,
)

if TYPE_CHECKING:
    import torch

PROGRAM_COLUMNS = 18
"""int64 words of a tensor in the table; `optimizer_program_triton` has their meaning."""

_PLAIN_WIDTH = 128
_NARROWEST = 16
_BLOCKS = (16, 32, 64, 128, 256, 512)
_WRITES_NO_PARAMETER = frozenset({"hessian", "adam_direction", "momentum_direction"})
_READS_NO_PARAMETER = frozenset({"hessian", "momentum_direction"})
_DIRECTED = {"adam_direction": "written", "momentum_direction": "written", "apply": "read"}


class Launch(NamedTuple):
    """How the work is laid out; every choice gives the same bits, and another one compiles anew.

    Attributes:
        elements: Of a tile, which is what a program holds at a time.
        warps: Of a program.
        tiles: Of a program, one after the other.
    """

    elements: int = 2048
    warps: int = 4
    tiles: int = 1


DEFAULT = Launch()
Addresses: TypeAlias = tuple[int, ...]


class Kind(NamedTuple):
    """What the works of one launch have in common, by the names of the program's arguments."""

    READ: str
    WRITTEN: str
    GRADIENTS: str
    CODEC_A: str
    CODEC_B: str
    CODEC_C: str
    BLOCK_A: int
    BLOCK_B: int
    BLOCK_C: int
    WIDTH: int
    FLAT: bool
    VECTOR: int


class Table:
    """Works of one device and one method, and where they lie."""

    def __init__(self, works: list[Work], method: str, launch: Launch = DEFAULT) -> None:
        """Lays out the tables for these works.

        Args:
            works: Every later `refresh` gets as many, of the same sizes, types and codecs.
            method: One of `optimizer_work.METHODS`.
            launch: How to lay out the work.

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
        if [_alignments(addresses) for addresses in fresh] != self._alignments:
            self._arrange(works, fresh)
        for part in self._parts:
            part.refresh(works, fresh)

    def _arrange(self, works: list[Work], addresses: list[Addresses]) -> None:
        chosen: dict[Kind, list[int]] = {}
        for place, (work, found) in enumerate(zip(works, addresses, strict=True)):
            chosen.setdefault(kind_of(work, self._method, found), []).append(place)
        self._alignments = [_alignments(found) for found in addresses]
        self._parts = [
            _Part(kind, places, works, self._launch, self._device)
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
                    TILES=self._launch.tiles,
                    GUARDED=found_inf is not None,
                    num_warps=self._launch.warps,
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


def addresses_of(work: Work) -> Addresses:
    """The columns of a work's row that may change: addresses and the seed."""
    found = [
        work.parameter.data_ptr(),
        0 if work.correction is None else work.correction.data_ptr(),
        0 if work.gradient is None else work.gradient.data_ptr(),
        0 if work.direction is None else work.direction.data_ptr(),
        (work.seed & ((1 << 63) - 1)) - (work.seed & 1 << 63),
    ]
    for state in work.states:
        found.append(state.codes.data_ptr())
        found.append(0 if state.scales is None else state.scales.data_ptr())
        found.append(0 if state.correction is None else state.correction.data_ptr())
    return tuple(found)


def _alignments(addresses: Addresses) -> Addresses:
    """All that a work's kind takes from its addresses."""
    parameter, correction, gradient, direction, seed, *states = addresses
    low = (parameter | correction) & 15, gradient & 15, direction & 15, seed != 0
    return *low, *[address & 15 for address in states]


def kind_of(work: Work, method: str, addresses: Addresses) -> Kind:
    """Which launch a work belongs to.

    Raises:
        ValueError: If it is not what the method works on.
    """
    _check(work, method)
    states = [*work.states, *[_NO_STATE] * (STATES_AT_MOST - len(work.states))]
    _, row = shape_of(work)
    # A block is no wider than a row needs: what is beyond it would be computed for nothing.
    most = max(_NARROWEST, 1 << (row - 1).bit_length())
    blocks = [0 if state.scales is None else min(state.block, most) for state in states]
    width = max(blocks) or _PLAIN_WIDTH
    parameter = _name(work.parameter)
    held = "split" if work.correction is not None else parameter
    written = "random" if work.seed and held == "bf16" else held
    flat = row % width == 0
    return Kind(
        READ="" if method in _READS_NO_PARAMETER else held,
        WRITTEN="" if method in _WRITES_NO_PARAMETER else written,
        GRADIENTS="" if work.gradient is None else _name(work.gradient),
        CODEC_A=states[0].codec,
        CODEC_B=states[1].codec,
        CODEC_C=states[2].codec,
        BLOCK_A=blocks[0],
        BLOCK_B=blocks[1],
        BLOCK_C=blocks[2],
        WIDTH=width,
        FLAT=flat,
        VECTOR=_vector(work, row, flat, addresses),
    )


def shape_of(work: Work) -> tuple[int, int]:
    """Rows and elements of a row; one long row if no state has scales."""
    if any(state.scales is not None for state in work.states):
        return work.rows, work.row
    return 1, work.rows * work.row


def _vector(work: Work, row: int, flat: bool, addresses: Addresses) -> int:
    """How many elements a thread may take at once: those of 16 bytes of the widest type, or 1."""
    sizes = [work.parameter.element_size(), 1]
    sizes += [
        tensor.element_size() for tensor in (work.gradient, work.direction) if tensor is not None
    ]
    sizes += [state.codes.element_size() for state in work.states]
    vector = 16 // max(sizes[0], *sizes[2:], 2)
    if not flat and row % vector:
        return 1
    words = [work.parameter.element_size(), 1, 0, 0, 0]
    words[2] = 0 if work.gradient is None else work.gradient.element_size()
    words[3] = 0 if work.direction is None else work.direction.element_size()
    for state in work.states:
        halved = state.codec.startswith("fourbit")
        words += [0 if halved else state.codes.element_size(), 0, 1]
        if halved and addresses[len(words) - 3] % (vector // 2):
            return 1
    aligned = all(
        address % (vector * word) == 0
        for address, word in zip(addresses, words, strict=True)
        if word
    )
    return vector if aligned else 1


_NO_STATE = CodedState("", 0, None)


def _name(tensor: "torch.Tensor") -> str:
    import torch

    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if tensor.dtype not in names:
        raise ValueError(f"a tensor of {tensor.dtype}: fp32, fp16 and bf16 are possible")
    return names[tensor.dtype]


def _check(work: Work, method: str) -> None:
    wanted = METHODS[method]
    if len(work.states) != len(wanted.states) or len(work.scalars) != len(wanted.scalars):
        raise ValueError(
            f"{method} with {len(work.states)} states and {len(work.scalars)} scalars: it has "
            f"{wanted.states} and {wanted.scalars}"
        )
    tensors = [work.parameter, work.gradient, work.direction, work.correction]
    for state in work.states:
        tensors += [state.codes, state.scales, state.correction]
        if state.codec not in CODECS:
            raise ValueError(f"codec {state.codec!r}: known are {', '.join(CODECS)}")
        if state.scales is not None and (state.block not in _BLOCKS):
            raise ValueError(f"a block of {state.block}: {_BLOCKS} are possible")
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"a tensor {tuple(tensor.shape)} with gaps: {tensor.stride()}")
