"""Copying a shard's leaves into its slot while training goes on.

Owns the split into what is copied at once and what is copied lazily, the progress of one copy,
and the tripwire. Promises that a capture which ends without `torn` holds, in every byte, the
state at the moment of `begin`: lazily copied leaves are changed only after the fence
(`finish`) by those who keep the contract, and a sample of them is compared to catch those who do
not. Promises too that sources stay referenced until they are copied. Does not talk to the agent,
start threads, or decide what is guarded.

The lazy copy with a fence before the update follows DataStates-LLM (Maurya et al., HPDC 2024);
unlike it, bytes are digested in the same pass that copies them, and a torn copy is noticed.

CPU tensors that are contiguous are copied by the native kernel. Everything else (other strides,
other devices, lazily conjugated views) goes through torch, at once: the seam at which a CUDA
stream takes over is `is_plain`.
"""

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from everstep.kernels.capture import Pieces, Sampler, capture_units
from everstep.proto.errors import NotCapturable
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.digest import DIGEST_BYTES, unit_count
from everstep.snapshot.layout import Layout, Leaf

SMALL_BYTES = 16 * 1024
"""Leaves below this are copied at once: cheaper than watching them."""
BLOCK_UNITS = 8
SAMPLES = 8
"""Words of each lazy leaf that the tripwire looks at."""


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
    on_cpu = tensor.device.type == "cpu"
    return on_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


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
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    if not plain.is_contiguous():
        plain = plain.contiguous()
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

    Raises:
        NotCapturable: If a leaf's bytes are not its whole value.
    """

    def __init__(
        self, layout: Layout, tensors: Mapping[str, torch.Tensor], guarded: frozenset[str]
    ) -> None:
        self.layout = layout
        self.guarded = guarded
        placed = [
            Placed(leaf, tensors[leaf.name])
            for leaf in sorted(layout.leaves, key=lambda leaf: leaf.offset)
            if leaf.stop > leaf.start
        ]
        for source in placed:
            check_capturable(source.leaf.name, source.tensor)
        plain = [source for source in placed if is_plain(source.tensor)]
        self.lazy = [
            source
            for source in plain
            if source.leaf.name in guarded and source.bytes >= SMALL_BYTES
        ]
        lazy_names = {source.leaf.name for source in self.lazy}
        self.at_once = [source for source in plain if source.leaf.name not in lazy_names]
        self.by_torch = [source for source in placed if not is_plain(source.tensor)]
        self._header = ctypes.create_string_buffer(layout.header, len(layout.header))
        header = (ctypes.addressof(self._header), 0, len(layout.header))
        self.pieces_at_once = Pieces([header, *(source.piece for source in self.at_once)])
        self.lazy_pieces = Pieces(source.piece for source in self.lazy)
        self.sampler = Sampler(
            [source.piece[0] for source in self.lazy], [source.bytes for source in self.lazy]
        )


class Capture:
    """One copy of a shard into a slot.

    Args:
        plan: What to copy.
        slot: The slot's memory, writable, at least the image's length.
        seed: Of the tripwire's sample positions; another one each time.

    Attributes:
        digests: xxh3_128 of each unit, complete once `done` is set.
        torn: Names of leaves that were changed while they were copied; with any, the copy is
            worthless.
        complete: Whether every byte is copied; only then is the copy worth anything.
        done: Set when everything is copied, or given up.
    """

    def __init__(self, plan: CapturePlan, slot: memoryview, seed: int) -> None:
        self.plan = plan
        self.image_bytes = plan.layout.image_bytes
        self.units = unit_count(self.image_bytes)
        self.digests = bytearray(self.units * DIGEST_BYTES)
        self.torn: tuple[str, ...] = ()
        self.complete = False
        self.done = threading.Event()
        self._slot = slot
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(slot))
        self._seed = seed
        self._lock = threading.Lock()
        self._next_unit = 0
        self._copied_units = 0
        self._given_up = False
        self._fingerprints = b""
        self._versions: list[int] = []

    def begin(self) -> None:
        """Copy at once what may change at any time, and note what the rest looks like now."""
        plan = self.plan
        self._versions = [source.tensor._version for source in plan.lazy]
        self._fingerprints = plan.sampler.fingerprints(SAMPLES, self._seed)
        capture_units(
            plan.pieces_at_once, self._address, self.image_bytes, UNIT_BYTES, 0, self.units, None
        )
        for source in plan.by_torch:
            self._copy_by_torch(source)
        failpoint("client.capture.begun")

    def advance(self) -> bool:
        """Copy the next block of units; return whether there was one. Any thread may help."""
        with self._lock:
            first = self._next_unit
            count = min(BLOCK_UNITS, self.units - first)
            if count <= 0 or self._given_up:
                return False
            self._next_unit += count
        failpoint("client.capture.block")
        capture_units(
            self.plan.lazy_pieces,
            self._address,
            self.image_bytes,
            UNIT_BYTES,
            first,
            count,
            self.digests,
        )
        with self._lock:
            self._copied_units += count
            complete = self._copied_units == self.units and not self._given_up
            last_after_giving_up = self._given_up and self._copied_units == self._next_unit
        if complete:
            self._complete()
        elif last_after_giving_up:
            self.done.set()
        return True

    def finish(self, timeout_s: float) -> bool:
        """The fence: help until everything is copied; return whether it is in time."""
        while self.advance():
            pass
        return self.done.wait(timeout_s)

    def give_up(self) -> None:
        """Copy no further; blocks under way still end before `done` is set."""
        with self._lock:
            self._given_up = True
            under_way = self._next_unit > self._copied_units
        if not under_way:
            self.done.set()

    def release(self) -> None:
        """Let go of the slot's memory; only after `done`."""
        self._slot.release()

    def _copy_by_torch(self, source: Placed) -> None:
        leaf, tensor = source.leaf, source.tensor.detach()
        region = self._slot[leaf.offset : leaf.offset + source.bytes]
        if source.bytes == tensor.numel() * tensor.element_size():
            target = torch.frombuffer(region, dtype=tensor.dtype).view(tensor.shape)
            target.copy_(tensor)
        else:
            part = value_bytes(tensor)[leaf.start : leaf.stop]
            torch.frombuffer(region, dtype=torch.uint8).copy_(part)

    def _complete(self) -> None:
        plan = self.plan
        if [source.tensor._version for source in plan.lazy] != self._versions:
            self.torn = tuple(
                source.leaf.name
                for source, version in zip(plan.lazy, self._versions, strict=True)
                if source.tensor._version != version
            )
        after = plan.sampler.fingerprints(SAMPLES, self._seed)
        if after != self._fingerprints:
            changed = (
                source.leaf.name
                for index, source in enumerate(plan.lazy)
                if after[8 * index : 8 * index + 8] != self._fingerprints[8 * index : 8 * index + 8]
            )
            self.torn = tuple(dict.fromkeys([*self.torn, *changed]))
        self.complete = True
        self.done.set()
