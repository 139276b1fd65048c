"""What of a shard is copied how: at once or lazily, by the native kernel, a device or torch.

Owns the split of one layout's leaves, and what all captures of it have in common. Promises that a
leaf whose bytes are not its whole value is refused, that only guarded leaves are copied lazily, and
that nothing in a plan changes, so that several captures may use it at once; it keeps its sources
alive. Does not copy anything (see `snapshot/capture.py`), nor see whether a source still is where
it was: `identity` is for whoever keeps a plan.

CPU tensors that are contiguous are copied by the native kernel, tensors on a CUDA device by a
`DevicePart` each device. Everything else (other strides, other devices, lazily conjugated views)
goes through torch, at once.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from everstep.kernels.capture import Pieces, Sampler
from everstep.proto.errors import NotCapturable
from everstep.snapshot.device import Device, DeviceOptions, Devices, is_ordered
from everstep.snapshot.device_cuda import CudaDevices
from everstep.snapshot.device_part import DevicePart, DeviceSource
from everstep.snapshot.layout import Layout, Leaf
from everstep.snapshot.pinning import PinnedArena
from everstep.snapshot.slot_digests import SlotDigests
from everstep.snapshot.units import plan_units

SMALL_BYTES = 16 * 1024
"""Leaves below this are copied at once: cheaper than watching them."""


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name of a dtype without its prefix, e.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def check_capturable(name: str, tensor: torch.Tensor) -> None:
    """Return only if the tensor's bytes are its whole value.

    Raises:
        NotCapturable: For sparse, quantized, meta and wrapped tensors.
    """
    detail = ""
    if tensor.layout is not torch.strided:
        detail = f"layout {tensor.layout}"
    elif tensor.is_quantized:
        detail = "quantized; store int_repr(), scales and zero points instead"
    elif tensor.device.type == "meta":
        detail = "on the meta device, without data"
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        detail = "a tensor subclass; its inner tensors are what must be stored"
    if detail:
        raise NotCapturable(name, type(tensor).__name__, detail)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory holds its value, in order."""
    return tensor.device.type == "cpu" and is_ordered(tensor)


@dataclass(frozen=True, slots=True)
class Placed:
    """A source tensor and where its bytes go."""

    leaf: Leaf
    tensor: torch.Tensor

    @property
    def bytes(self) -> int:
        """How many bytes of it this shard holds."""
        return self.leaf.stop - self.leaf.start

    @property
    def piece(self) -> tuple[int, int, int]:
        """(address, offset in the image, bytes), for the native kernel."""
        return (self.tensor.data_ptr() + self.leaf.start, self.leaf.offset, self.bytes)


def value_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The value's bytes, as a flat CPU tensor; a copy, unless the memory holds them in order."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # Not view(): a dimension of length 1 may have any stride.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def identity(tensors: Sequence[torch.Tensor]) -> tuple[object, ...]:
    """What must be unchanged for a plan to be used again: a stale pointer re-saves old state."""
    return tuple((t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in tensors)


class CapturePlan:
    """How the leaves of one layout are copied, for as long as they stay where they are.

    Args:
        layout: Of this rank's shard.
        tensors: The source of each leaf, by name.
        guarded: Names of leaves that change only after a fence.
        options: For leaves on a device.
        arena: Says which slots are pinned; None: none is.
        devices: Finds the device of a tensor.
        contents: What the slots hold, for incremental captures.

    Raises:
        NotCapturable: If a leaf's bytes are not its whole value.

    Attributes:
        parts: The leaves on each device.
        units: Who copies and digests which.
    """

    def __init__(
        self,
        layout: Layout,
        tensors: Mapping[str, torch.Tensor],
        guarded: frozenset[str],
        *,
        options: DeviceOptions | None = None,
        arena: PinnedArena | None = None,
        devices: Devices | None = None,
        contents: SlotDigests | None = None,
    ) -> None:
        self.layout = layout
        self.guarded = guarded
        self.options = options or DeviceOptions()
        self.arena = arena
        self.contents = contents
        placed = [
            Placed(leaf, tensors[leaf.name])
            for leaf in sorted(layout.leaves, key=lambda leaf: leaf.offset)
            if leaf.stop > leaf.start
        ]
        for source in placed:
            check_capturable(source.leaf.name, source.tensor)
        devices = devices or CudaDevices()
        on_device = {source.leaf.name: devices.of(source.tensor) for source in placed}
        on_host = [source for source in placed if on_device[source.leaf.name] is None]
        plain = [source for source in on_host if is_plain(source.tensor)]
        self.lazy = [
            source
            for source in plain
            if source.leaf.name in guarded and source.bytes >= SMALL_BYTES
        ]
        lazy_names = {source.leaf.name for source in self.lazy}
        self.at_once = [source for source in plain if source.leaf.name not in lazy_names]
        self.by_torch = [source for source in on_host if not is_plain(source.tensor)]
        self._header = ctypes.create_string_buffer(layout.header, len(layout.header))
        header = (ctypes.addressof(self._header), 0, len(layout.header))
        self.pieces_at_once = Pieces([header, *(source.piece for source in self.at_once)])
        self.lazy_pieces = Pieces(source.piece for source in self.lazy)
        self.sampler = Sampler(
            [source.piece[0] for source in self.lazy], [source.bytes for source in self.lazy]
        )
        self._plan_replicas(tensors, devices)
        self.parts = self._device_parts(placed, on_device)
        devices_units = [(part.plan.touched, part.units) for part in self.parts]
        ranges = [(source.leaf.offset, source.bytes) for source in self.lazy]
        self.units = plan_units(layout.image_bytes, devices_units, ranges)

    def _plan_replicas(self, tensors: Mapping[str, torch.Tensor], devices: Devices) -> None:
        self.replicated = tuple(leaf.name for leaf in self.layout.leaves if leaf.replicated)
        sources = [tensors[name] for name in self.replicated]
        self._replicas_on: dict[int, tuple[Device, list[tuple[int, torch.Tensor]]]] = {}
        self.host_replicas: list[int] = []
        for number, tensor in enumerate(sources):
            device = devices.of(tensor)
            if device is not None:
                self._replicas_on.setdefault(id(device), (device, []))[1].append((number, tensor))
            elif tensor.device.type == "cpu":
                self.host_replicas.append(number)
        host = [sources[number] for number in self.host_replicas]
        self.replicas = Sampler(
            [tensor.data_ptr() for tensor in host], [tensor.nbytes for tensor in host]
        )

    def _device_parts(
        self, placed: Sequence[Placed], on_device: Mapping[str, Device | None]
    ) -> list[DevicePart]:
        # A device may have replicas of which this rank keeps nothing.
        found = dict(self._replicas_on)
        sources: dict[int, list[DeviceSource]] = {}
        for source in placed:
            device = on_device[source.leaf.name]
            if device is not None:
                found.setdefault(id(device), (device, []))
                guarded = source.leaf.name in self.guarded
                entry = DeviceSource(source.leaf, source.tensor, guarded)
                sources.setdefault(id(device), []).append(entry)
        return [
            DevicePart(
                device,
                sources.get(key, []),
                replicas,
                self.layout.image_bytes,
                self.options,
            )
            for key, (device, replicas) in found.items()
        ]
