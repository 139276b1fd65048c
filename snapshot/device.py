"""What a capture needs of an accelerator.

Owns the options of a capture on a device and the protocol of a device: `snapshot/device_cuda.py`
has the one for CUDA, tests have one over host memory whose lanes run when the test says so.
Promises, for every device, that nothing called on the training thread waits for it, and that an
allocation which does not fit returns None instead of raising. Memory that a lane still reads is
kept alive by whoever enqueued that, until a later mark is done.

A *lane* is a stream by its part: "update" is the stream that is current on the calling thread,
where the training runs; "copies" and "digests" are the device's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from everstep.snapshot.device_plan import Relative, Table, UnitTable
from everstep.snapshot.window import Window

SAMPLES = 8
"""Words of each live leaf that the tripwire looks at."""
REPLICA_SAMPLES = 32
"""Words of each replicated leaf that are compared between ranks."""
SAMPLE_COUNTS = (SAMPLES, REPLICA_SAMPLES)

Lane = Literal["update", "copies", "digests"]
Prepared = Any
"""A table where the device can read it; only its device knows what it is."""
Result = Any
"""What a kernel will have written; to be read once a later mark is done."""


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """How tensors on a device are captured.

    Attributes:
        scratch_bytes: Most device memory, of all captures together, for clones of what an update
            would overtake; None: half of what the training leaves free.
        incremental: Leave out units that the slot holds already, by their 128-bit digests.
        digests: Who digests the units: "device" from the sources, "host" from the slot.
        check_units: Units of each capture whose digest from the device is compared with one that
            the host takes of the slot.
    """

    scratch_bytes: int | None = None
    incremental: bool = False
    digests: Literal["device", "host"] = "device"
    check_units: int = 4


class Mark(Protocol):
    """A point on a lane."""

    def query(self) -> bool:
        """Whether the lane has come past it; never waits."""


class Memory(Protocol):
    """Memory of the device; free for others once it is released."""

    @property
    def address(self) -> int:
        """Of its first byte, a multiple of 256."""

    def release(self) -> None:
        """Let go of it. Work of the lane it was allocated on may still be using it."""


class Tenant(Protocol):
    """A capture on the device that has not ended."""

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody carries it any more, though the device may not be done with it."""

    def poll(self) -> bool:
        """Go on as far as possible; return whether it has ended."""


class Buffer(Protocol):
    """Host memory that a copy takes on its way; see `pinning.StagingBuffer`."""

    address: int

    def release(self) -> None:
        """Give it back."""


class Ring(Protocol):
    """See `pinning.StagingRing`."""

    buffer_bytes: int

    def acquire(self, timeout_s: float) -> Buffer | None:
        """A buffer, once there is one."""


class Device(Protocol):
    """One accelerator.

    Attributes:
        name: For messages.
        window: How much leaves the device before an update.
        tenants: Captures that have not ended, oldest first.
        has_kernels: Whether `sample` and `digest` work.
        ring: For copies to memory that is not pinned.
    """

    name: str
    window: Window
    tenants: "list[Tenant]"
    has_kernels: bool

    @property
    def ring(self) -> Ring:
        """For copies to memory that is not pinned."""

    def enter_thread(self) -> None:
        """Make this thread, one of our own, one that breaks no graph that another one records."""

    def mark(self, lane: Lane, *, timed: bool = False) -> Mark:
        """A mark at the end of what the lane has to do now."""

    def follow(self, lane: Lane, mark: Mark) -> None:
        """What is enqueued on the lane from now on waits for the mark."""

    def seconds(self, first: Mark, last: Mark) -> float:
        """The time between two timed marks that are done."""

    def is_recording(self) -> bool:
        """Whether the update lane is being recorded into a graph instead of run."""

    def room_bytes(self) -> int:
        """How much memory could be had. An allocation that fails may wait for the device."""

    def allocate(self, sizes: Sequence[int]) -> list[Memory]:
        """Memory for use on the update lane first; the first ones only, if there is no more."""

    def scratch_bytes(self, most: int | None) -> int:
        """How much more memory clones may take at the moment.

        Args:
            most: Of all captures together; None for the default rule.
        """

    def copy(self, lane: Lane, rows: Table) -> None:
        """Enqueue copies, rows (target, source, bytes), between device and host or device."""

    def clone(self, lane: Lane, rows: Table) -> None:
        """Enqueue copies within the device, rows (target, source, bytes)."""

    def store(self, tensor: torch.Tensor, address: int, memory: Memory) -> None:
        """Enqueue on the update lane: the tensor's value, in order, to an address in memory."""

    def prepare(self, rows: Relative) -> Prepared:
        """Make a table ready for the calls below; the numbers must not change."""

    def gather(self, rows: Prepared, base: int) -> None:
        """Enqueue many small copies on the update lane, rows (target, source, bytes)."""

    def sample(self, lane: Lane, sources: Prepared, base: int, samples: int, seed: int) -> Result:
        """Enqueue the sampling of sources, rows (address, bytes)."""

    def digest_lane(self) -> Lane:
        """Where digests cost least: the update lane, if our own threads' is the calling one's."""

    def digest(
        self,
        lane: Lane,
        units: Sequence[tuple[UnitTable, Prepared]],
        base: int,
        clones: Sequence[Table | None],
    ) -> Result:
        """Enqueue the digests of units, and clones of some by the same pass.

        Args:
            lane: Past the snapshot, and the gathers into the clone block.
            units: Tables, prepared.
            base: Of the clone block.
            clones: See `device_plan.split_clones`.
        """

    def fingerprints(self, result: Result) -> bytes:
        """What `sample` found, 8 bytes a source. A mark after it must be done."""

    def unit_digests(self, result: Result) -> bytes:
        """What `digest` found, 16 bytes a unit, in order. A mark after it must be done."""


class Devices(Protocol):
    """Which device a tensor is on."""

    def of(self, tensor: torch.Tensor) -> Device | None:
        """The tensor's device; None if its tensors are copied by torch."""


def is_ordered(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory holds its value, in order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
