"""CUDA as a capture's device: torch's streams and allocator, the runtime's copies, our kernels.

Owns the lanes of a device, the pool that clones are allocated in, and the pinned memory that
kernels write their results to. Promises what `snapshot/device.py` asks. Does not keep memory alive
that a lane still reads, nor know what the bytes are.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from everstep.kernels import gather_triton, xxh3_triton
from everstep.kernels.cuda_runtime import CudaRuntime
from everstep.snapshot.device import (
    SAMPLE_COUNTS,
    Device,
    Lane,
    Mark,
    Memory,
    Prepared,
    Result,
    Tenant,
)
from everstep.snapshot.device_plan import Relative, Table, UnitTable
from everstep.snapshot.pinning import StagingRing
from everstep.snapshot.window import Window

log = logging.getLogger("everstep")


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

    def enter_thread(self) -> None:
        """See `Device`."""
        self._runtime.enter_thread(self._device.index)

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

    def allocate(self, sizes: Sequence[int]) -> list[Memory]:
        """See `Device`."""
        found: list[Memory] = []
        try:
            with self._own_pool():
                for size in sizes:
                    tensor = torch.empty(size, dtype=torch.uint8, device=self._device)
                    found.append(_CudaMemory(self, tensor, size, tensor.data_ptr()))
                    self.count_held(size)
        except torch.cuda.OutOfMemoryError:
            pass
        return found

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

    def clone(self, lane: Lane, rows: Table) -> None:
        """See `Device`."""
        if not self.has_kernels:
            self.copy(lane, rows)
            return
        # One launch: as many calls of the runtime took the host 14 ms (measured on an H100).
        with self._on(lane):
            gather_triton.gather(self._uploaded(rows), int(rows[:, 2].max()))

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

    def digest_lane(self) -> Lane:
        """See `Device`."""
        # Products whose programs stay on a multiprocessor to their end get fewer of them while
        # digests run beside them: snapshots at every second step cost 4.1 % so, and 3.5 with
        # digests in the training's own stream (measured on an H100). The default one is current on
        # our threads, too, and no graph can be recorded in it.
        is_default = torch.cuda.current_stream(self._device).cuda_stream == 0
        return "update" if is_default else "digests"

    def digest(
        self,
        lane: Lane,
        units: Sequence[tuple[UnitTable, Prepared]],
        base: int,
        clones: Sequence[Table | None],
    ) -> Result:
        """See `Device`."""
        count = sum(len(table.units) for table, _ in units)
        result = self._results.take(count * xxh3_triton.LANES)
        found = result.words.view(count, xxh3_triton.LANES)
        with self._on(lane):
            first = 0
            for (table, prepared), targets in zip(units, clones, strict=True):
                words = found[first : first + len(table.units)]
                addresses, alignment = prepared.at(base), table.alignment
                if table.scattered:
                    xxh3_triton.accumulate_blocks(addresses, words, alignment)
                else:
                    placed = self._uploaded(targets) if targets is not None else None
                    xxh3_triton.accumulate(addresses, words, alignment, clones=placed)
                first += len(table.units)
        result.written = self.mark(lane)
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
