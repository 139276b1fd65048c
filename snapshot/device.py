"""What a capture needs of an accelerator, and how CUDA gives it.

Owns the options of a capture on a device, the protocol of a device (`Device`, which tests
implement over host memory, with streams that run when the test says so), and `CudaDevice`.
Promises that nothing called on the training thread waits for the device, and that an allocation
which does not fit returns None instead of raising. Does not keep memory alive that a lane still
reads: whoever enqueues keeps it until a later mark is done.

A *lane* is a stream by its part: "update" is the stream that is current on the calling thread,
where the training runs; "copies" and "digests" are the device's own.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy
import torch

from everstep.kernels import gather_triton, xxh3_triton
from everstep.kernels.cuda_runtime import CudaRuntime
from everstep.snapshot.device_plan import Relative, Table, UnitTable
from everstep.snapshot.pinning import StagingRing
from everstep.snapshot.window import Window

log = logging.getLogger("everstep")

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

    def allocate(self, size: int) -> Memory | None:
        """Memory for use on the update lane first; None if there is none."""

    def scratch_bytes(self, most: int | None) -> int:
        """How much more memory clones may take at the moment.

        Args:
            most: Of all captures together; None for the default rule.
        """

    def copy(self, lane: Lane, rows: Table) -> None:
        """Enqueue copies, rows (target, source, bytes), between device and host or device."""

    def clone(self, lane: Lane, rows: Table) -> object:
        """Enqueue copies within the device, rows (target, source, bytes).

        Returns:
            Something to keep until the lane has come past them.
        """

    def store(self, tensor: torch.Tensor, address: int, memory: Memory) -> None:
        """Enqueue on the update lane: the tensor's value, in order, to an address in memory."""

    def prepare(self, rows: Relative) -> Prepared:
        """Make a table ready for the calls below; the numbers must not change."""

    def gather(self, rows: Prepared, base: int) -> None:
        """Enqueue many small copies on the update lane, rows (target, source, bytes)."""

    def sample(self, lane: Lane, sources: Prepared, base: int, samples: int, seed: int) -> Result:
        """Enqueue the sampling of sources, rows (address, bytes)."""

    def digest(self, units: Sequence[tuple[UnitTable, Prepared]], base: int) -> Result:
        """Enqueue the digests of units on the digests lane."""

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


class CudaDevices:
    """The CUDA devices of this process, each made when its first tensor is seen."""

    def __init__(self) -> None:
        self._runtime: CudaRuntime | None = None
        self._known: dict[int, CudaDevice] = {}

    def of(self, tensor: torch.Tensor) -> Device | None:
        """See `Devices.of`."""
        if tensor.device.type != "cuda":
            return None
        self._runtime = self._runtime or CudaRuntime.find()
        if self._runtime is None:
            return None  # e.g. another vendor's, under the same name
        index = tensor.device.index
        if index not in self._known:
            self._known[index] = CudaDevice(tensor.device, self._runtime)
        return self._known[index]

    @property
    def runtime(self) -> CudaRuntime | None:
        """With which memory is pinned; None before a CUDA tensor was seen."""
        return self._runtime


@dataclass(slots=True)
class _CudaMemory:
    device: "CudaDevice"
    tensor: torch.Tensor | None
    size: int
    address: int

    def release(self) -> None:
        if self.tensor is not None:
            self.tensor = None
            self.device.count_held(-self.size)


@dataclass(frozen=True, slots=True)
class _CudaTable:
    host: Relative
    numbers: torch.Tensor
    factors: torch.Tensor | None
    largest_bytes: int  # of a table of pieces

    def at(self, base: int) -> torch.Tensor:
        if self.factors is None:
            return self.numbers
        # On the lane that is current: freed memory goes to the same one's later work.
        return torch.add(self.numbers, self.factors, alpha=base)


_SPARE_RESULTS = 32


class _Result:
    """Pinned host memory that a kernel writes to; back in `_Results` when nobody refers to it."""

    def __init__(self, home: "_Results", words: torch.Tensor) -> None:
        self.words = words
        self.written: Mark | None = None
        self._home = home

    def __del__(self) -> None:
        if self.written is not None:
            self._home.free.append((self.words, self.written))


class _Results:
    """What kernels have to tell the host, written by them straight into pinned host memory.

    A copy would wait behind the gigabytes that captures have under way in the same direction, and
    the driver with it: measured on an H100, the training's launches stood still until those were
    over. Memory is used again only once the kernel that wrote to it has ended, whatever became of
    the capture.
    """

    def __init__(self) -> None:
        self.free: deque[tuple[torch.Tensor, Mark]] = deque()

    def take(self, count: int) -> _Result:
        """So many words of 8 bytes."""
        for index, (words, written) in enumerate(list(self.free)):
            if len(words) == count and written.query():
                del self.free[index]
                return _Result(self, words)
        while len(self.free) > _SPARE_RESULTS and self.free[0][1].query():
            self.free.popleft()
        return _Result(self, torch.empty(count, dtype=torch.int64, pin_memory=True))


class CudaDevice:
    """A CUDA device, through torch, the runtime and our Triton kernels."""

    def __init__(self, device: torch.device, runtime: CudaRuntime) -> None:
        self.name = str(device)
        self.window = Window()
        self.tenants: list[Tenant] = []
        self.has_kernels = _compiles(device)
        self.ring = StagingRing(runtime, device=device.index)
        self._device = device
        self._runtime = runtime
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The training's stream has the same priority, the lowest: digests must not come first.
        self._digests = torch.cuda.Stream(device, priority=0)  # type: ignore[no-untyped-call]
        # Else clones take the blocks that activations were in a moment ago, and the next forward
        # allocates anew, which waits for the device and for the copies on it (measured on an H100:
        # 0.15 s a snapshot). Before the training is out of memory, it gets what lies idle here.
        self._pool = _last_resort_pool(device)
        self._results = _Results()
        self._lock = threading.Lock()
        self._held = 0
        self._held_most = 0
        self._others_peak = 0

    def mark(self, lane: Lane, *, timed: bool = False) -> Mark:
        """See `Device`."""
        event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
        event.record(self._stream(lane))
        return event

    def follow(self, lane: Lane, mark: Mark) -> None:
        """See `Device`."""
        assert isinstance(mark, torch.cuda.Event)
        self._stream(lane).wait_event(mark)

    def seconds(self, first: Mark, last: Mark) -> float:
        """See `Device`."""
        assert isinstance(first, torch.cuda.Event)
        assert isinstance(last, torch.cuda.Event)
        return float(first.elapsed_time(last)) / 1000

    def is_recording(self) -> bool:
        """See `Device`."""
        with torch.cuda.device(self._device):
            return bool(torch.cuda.is_current_stream_capturing())

    def allocate(self, size: int) -> Memory | None:
        """See `Device`."""
        try:
            with self._own_pool():
                tensor = torch.empty(size, dtype=torch.uint8, device=self._device)
        except torch.cuda.OutOfMemoryError:
            return None
        self.count_held(size)
        return _CudaMemory(self, tensor, size, tensor.data_ptr())

    def _own_pool(self) -> AbstractContextManager[Any]:
        if self._pool is None:
            return nullcontext()
        return torch.cuda.use_mem_pool(self._pool, self._device)

    def room_bytes(self) -> int:
        """See `Device`."""
        usable, allocated, _ = self._memory()
        return usable - allocated

    def scratch_bytes(self, most: int | None) -> int:
        """See `Device`."""
        usable, allocated, peak = self._memory()
        with self._lock:
            # Clones of earlier captures may be part of the peak, which then says less of what the
            # training needs: that is at least the rest, and at least what was seen before.
            self._others_peak = max(self._others_peak, peak - self._held_most)
            most = (usable - self._others_peak) // 2 if most is None else most
            return max(0, min(usable - allocated, most - self._held))

    def count_held(self, change: int) -> None:
        """Note that clones hold more of the device's memory, or less."""
        with self._lock:
            self._held += change
            self._held_most = max(self._held_most, self._held)

    def copy(self, lane: Lane, rows: Table) -> None:
        """See `Device`."""
        # A thread that has not chosen a device would make a context on the first one.
        with torch.cuda.device(self._device):
            table = numpy.ascontiguousarray(rows).view(numpy.uint64)
            self._runtime.copy_async(table, self._stream(lane).cuda_stream)

    def clone(self, lane: Lane, rows: Table) -> object:
        """See `Device`."""
        if not self.has_kernels:
            self.copy(lane, rows)
            return None
        # One launch: as many calls of the runtime took the host 14 ms (measured on an H100).
        with self._on(lane):
            pieces = self._uploaded(rows)
            gather_triton.gather(pieces, int(rows[:, 2].max()))
        return pieces

    def store(self, tensor: torch.Tensor, address: int, memory: Memory) -> None:
        """See `Device`."""
        assert isinstance(memory, _CudaMemory)
        assert memory.tensor is not None
        place = address - memory.address
        region = memory.tensor[place : place + tensor.nbytes]
        region.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())

    def prepare(self, rows: Relative) -> Prepared:
        """See `Device`."""
        factors = self._uploaded(rows.factors) if rows.factors.any() else None
        is_pieces = rows.numbers.ndim == 2 and rows.numbers.size
        largest = int(rows.numbers[:, -1].max()) if is_pieces else 0
        return _CudaTable(rows, self._uploaded(rows.numbers), factors, largest)

    def gather(self, rows: Prepared, base: int) -> None:
        """See `Device`."""
        if not len(rows.host):
            return
        if not self.has_kernels:
            self.copy("update", rows.host.at(base))
            return
        with self._on("update"):
            gather_triton.gather(rows.at(base), rows.largest_bytes)

    def sample(self, lane: Lane, sources: Prepared, base: int, samples: int, seed: int) -> Result:
        """See `Device`."""
        found = self._results.take(len(sources.host))
        if len(sources.host):
            with self._on(lane):
                gather_triton.sample(sources.at(base), samples, seed, found.words)
        found.written = self.mark(lane)
        return found

    def digest(self, units: Sequence[tuple[UnitTable, Prepared]], base: int) -> Result:
        """See `Device`."""
        count = sum(len(table.units) for table, _ in units)
        result = self._results.take(count * xxh3_triton.LANES)
        found = result.words.view(count, xxh3_triton.LANES)
        with self._on("digests"):
            first = 0
            for table, prepared in units:
                last = first + len(table.units)
                launch = (
                    xxh3_triton.accumulate_blocks if table.scattered else xxh3_triton.accumulate
                )
                launch(prepared.at(base), found[first:last], table.alignment)
                first = last
        result.written = self.mark("digests")
        return result

    def fingerprints(self, result: Result) -> bytes:
        """See `Device`."""
        return bytes(result.words.numpy().tobytes())

    def unit_digests(self, result: Result) -> bytes:
        """See `Device`."""
        words = result.words.numpy().view(numpy.uint64)
        return xxh3_triton.digests(words.reshape(-1, xxh3_triton.LANES))

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        if lane == "update":
            return torch.cuda.current_stream(self._device)
        return self._copies if lane == "copies" else self._digests

    def _on(self, lane: Lane) -> AbstractContextManager[Any]:
        if lane == "update":
            return torch.cuda.device(self._device)
        return torch.cuda.stream(self._stream(lane))

    def _memory(self) -> tuple[int, int, int]:
        """What torch's allocator could have, has given out, and had given out at most."""
        free, _ = torch.cuda.mem_get_info(self._device)
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        reserved = stats["reserved_bytes"]["all"]["current"]
        allocated = stats["allocated_bytes"]["all"]
        return free + reserved, allocated["current"], allocated["peak"]

    def _uploaded(self, numbers: Table) -> torch.Tensor:
        # From pinned memory, since anything else would make this thread wait for the device.
        pinned = torch.from_numpy(numpy.ascontiguousarray(numbers)).pin_memory()
        return pinned.to(self._device, non_blocking=True)


def _last_resort_pool(device: torch.device) -> Any:
    """A pool that others may use before they are out of memory; None if torch has no such thing."""
    try:
        with torch.cuda.device(device):
            return torch.cuda.MemPool(use_on_oom=True)
    except (AttributeError, TypeError):
        return None


def _compiles(device: torch.device) -> bool:
    """Whether the kernels can be used; compiles them, which takes seconds the first time."""
    if not xxh3_triton.available():
        return False
    try:
        with torch.cuda.device(device):
            xxh3_triton.prepare(device)
            gather_triton.prepare(device, SAMPLE_COUNTS)
    except Exception as error:  # Triton raises whatever its compilers do
        log.warning(
            "GPU kernels cannot be compiled on %s (%s: %s); the host digests instead, and "
            "changes of GPU state outside the optimizer are seen by their version only.",
            *(device, type(error).__name__, error),
        )
        return False
    return True
