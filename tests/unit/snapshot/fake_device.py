"""A device over host memory whose lanes run only when the test says so.

Each lane is a queue of operations. Nothing of it happens when it is enqueued, as on a GPU whose
host is far ahead, and lanes run in any order that their marks allow. Memory that is released is
overwritten at once, so that whoever reads it late reads rubbish.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy
import torch
import xxhash

from everstep.kernels.capture import Sampler
from everstep.kernels.cuda_runtime import CudaFailure
from everstep.snapshot.capture_plan import value_bytes
from everstep.snapshot.device import Lane, Mark, Memory, Tenant
from everstep.snapshot.device_plan import Relative, Table, UnitTable
from everstep.snapshot.window import Window

RUBBISH = 0xDD
BANDWIDTH = 1e9
ALIGNMENT = 512


class FakeMark:
    """Done once its lane has come past it."""

    def __init__(self) -> None:
        self.done = False
        self.time_s = 0.0

    def query(self) -> bool:
        return self.done


class FakeMemory:
    def __init__(self, device: "FakeDevice", size: int) -> None:
        self._device = device
        self.size = size
        self.array = numpy.full(size + ALIGNMENT, RUBBISH, dtype=numpy.uint8)
        start = int(self.array.ctypes.data)
        self.address = start + -start % ALIGNMENT
        self.released = False

    def release(self) -> None:
        if not self.released:
            self.released = True
            self._device.used_bytes -= self.size
            self.array[:] = RUBBISH


class FakeBuffer:
    def __init__(self, ring: "FakeRing", address: int) -> None:
        self._ring = ring
        self.address = address

    def release(self) -> None:
        self._ring.free.append(self.address)


class FakeRing:
    def __init__(self, buffers: int = 2, buffer_bytes: int = 200_000) -> None:
        self.buffer_bytes = buffer_bytes
        self._memory = [numpy.zeros(buffer_bytes, dtype=numpy.uint8) for _ in range(buffers)]
        self.free = [int(memory.ctypes.data) for memory in self._memory]

    def acquire(self, timeout_s: float) -> FakeBuffer | None:
        return FakeBuffer(self, self.free.pop()) if self.free else None


class FakeResult:
    def __init__(self) -> None:
        self.bytes: bytes | None = None


class FakeDevice:
    """See `everstep.snapshot.device.Device`."""

    def __init__(self, *, memory_bytes: int = 1 << 40, has_kernels: bool = True) -> None:
        self.name = "fake:0"
        self.window = Window()
        self.tenants: list[Tenant] = []
        self.has_kernels = has_kernels
        self.ring = FakeRing()
        self.lanes: dict[Lane, deque[Callable[[], bool]]] = {
            "update": deque(),
            "copies": deque(),
            "digests": deque(),
        }
        self.memory_bytes = memory_bytes
        self.used_bytes = 0
        self.free_for_scratch = 1 << 40
        self.lies_about_room = 0
        self.recording = False
        self.lane_of_digests: Lane = "digests"
        self.now_s = 0.0
        self.fail_copies = False
        self.copied_off = 0
        self.fused_clones = 0
        self.entered: set[int] = set()
        self._memory: list[FakeMemory] = []

    # What the test does.

    def step(self, lane: Lane) -> bool:
        """Run one operation of the lane; return whether it could."""
        queue = self.lanes[lane]
        if queue and queue[0]():
            queue.popleft()
            return True
        return False

    def run(self, *lanes: Lane) -> None:
        """Run the lanes, or all, as far as they come."""
        chosen = lanes or tuple(self.lanes)
        moved = True
        while moved:
            steps = [self.step(lane) for lane in chosen]
            moved = any(steps)

    def random_step(self, random: Random) -> None:
        for _ in range(random.randrange(1, 6)):
            self.step(random.choice(list(self.lanes)))

    def train(self, tensor: torch.Tensor, change: Callable[[torch.Tensor], object]) -> None:
        """A kernel that changes a tensor: the host counts the version up now, the data later."""
        if tensor.numel():
            tensor.detach().add_(0)
        self._enqueue("update", lambda: change(tensor.data))

    def work(self, seconds: float) -> None:
        """A kernel of training that takes so long."""

        def pass_time() -> None:
            self.now_s += seconds

        self._enqueue("update", pass_time)

    # What the capture calls.

    def enter_thread(self) -> None:
        self.entered.add(threading.get_ident())

    def mark(self, lane: Lane, *, timed: bool = False) -> FakeMark:
        mark = FakeMark()

        def reach() -> None:
            mark.done, mark.time_s = True, self.now_s

        self._enqueue(lane, reach)
        return mark

    def follow(self, lane: Lane, mark: Mark) -> None:
        assert isinstance(mark, FakeMark)
        self.lanes[lane].append(mark.query)

    def seconds(self, first: Mark, last: Mark) -> float:
        assert isinstance(first, FakeMark)
        assert isinstance(last, FakeMark)
        assert first.done
        assert last.done
        return last.time_s - first.time_s

    def is_recording(self) -> bool:
        return self.recording

    def room_bytes(self) -> int:
        return self.memory_bytes - self.used_bytes + self.lies_about_room

    def allocate(self, sizes: Sequence[int]) -> list[Memory]:
        found: list[Memory] = []
        for size in sizes:
            if self.used_bytes + size > self.memory_bytes:
                break
            self.used_bytes += size
            self._memory.append(FakeMemory(self, size))
            found.append(self._memory[-1])
        return found

    def scratch_bytes(self, most: int | None) -> int:
        room = max(0, self.memory_bytes - self.used_bytes + self.lies_about_room)
        return self.free_for_scratch if most is None else max(0, min(most - self.used_bytes, room))

    def copy(self, lane: Lane, rows: Table) -> None:
        if self.fail_copies and lane == "copies":
            raise CudaFailure("cudaMemcpyAsync", 1, "cudaErrorInvalidValue", "invalid argument")
        for target, source, size in rows.tolist():
            self._enqueue(lane, self._moving(lane, target, source, size))

    def clone(self, lane: Lane, rows: Table) -> None:
        self.copy(lane, rows)

    def store(self, tensor: torch.Tensor, address: int, memory: Memory) -> None:
        def move() -> None:
            value = value_bytes(tensor.detach()).numpy().tobytes()
            ctypes.memmove(address, value, len(value))

        self._enqueue("update", move)

    def prepare(self, rows: Relative) -> Relative:
        return rows

    def gather(self, rows: Relative, base: int) -> None:
        self.copy("update", rows.at(base))

    def sample(self, lane: Lane, sources: Relative, base: int, samples: int, seed: int) -> Any:
        assert self.has_kernels
        result = FakeResult()
        rows = sources.at(base).tolist()
        sampler = Sampler([row[0] for row in rows], [row[1] for row in rows])

        def look() -> None:
            result.bytes = sampler.fingerprints(samples, seed)

        self._enqueue(lane, look)
        return result

    def digest_lane(self) -> Lane:
        return self.lane_of_digests

    def digest(
        self,
        lane: Lane,
        units: Sequence[tuple[UnitTable, Any]],
        base: int,
        clones: Sequence[Table | None],
    ) -> Any:
        assert self.has_kernels
        result = FakeResult()
        for (table, addresses), targets in zip(units, clones, strict=True):
            if targets is None:
                continue
            assert not table.scattered
            assert table.alignment == 16
            assert not (targets % 16).any()
            rows = zip(targets.tolist(), addresses.at(base).tolist(), strict=True)
            copies = [(target, source, 1 << 20) for target, source in rows if target]
            self.fused_clones += len(copies)
            self.copy(lane, numpy.array(copies, dtype=numpy.int64).reshape(-1, 3))

        def look() -> None:
            result.bytes = b"".join(
                _digest(row, 1024 if table.scattered else 1 << 20)
                for table, addresses in units
                for row in addresses.at(base).reshape(len(table.units), -1).tolist()
            )

        for table, addresses in units:
            assert not (addresses.at(base) % table.alignment).any()
        self._enqueue(lane, look)
        return result

    def fingerprints(self, result: Any) -> bytes:
        assert result.bytes is not None, "read before it was there: the device was not waited for"
        return bytes(result.bytes)

    unit_digests = fingerprints

    def _enqueue(self, lane: Lane, work: Callable[[], object]) -> None:
        def run() -> bool:
            work()
            return True

        self.lanes[lane].append(run)

    def _moving(self, lane: Lane, target: int, source: int, size: int) -> Callable[[], None]:
        def move() -> None:
            ctypes.memmove(target, source, size)
            if lane == "copies":
                self.now_s += size / BANDWIDTH
                self.copied_off += size

        return move


class FakeDevices:
    """Takes the tensors that it is told for tensors on a device."""

    def __init__(self) -> None:
        self._devices: dict[int, FakeDevice] = {}

    def put(self, tensor: torch.Tensor, device: FakeDevice) -> None:
        self._devices[tensor.untyped_storage().data_ptr()] = device

    def of(self, tensor: torch.Tensor) -> FakeDevice | None:
        return self._devices.get(tensor.untyped_storage().data_ptr())


class FakeArena:
    """Pinned or not, with borders that no copy may cross."""

    def __init__(self, *, pinned: bool, border_bytes: int = 777_777) -> None:
        self.pinned = pinned
        self._border_bytes = border_bytes
        self.problem = ""

    def is_pinned(self, slot: int) -> bool:
        return self.pinned

    def split_copies(self, table: Any) -> Any:
        rows = []
        for target, source, size in table.tolist():
            done = 0
            while done < size:
                part = min(size - done, self._border_bytes - (target + done) % self._border_bytes)
                rows.append((target + done, source + done, part))
                done += part
        return numpy.array(rows, dtype=numpy.uint64).reshape(-1, 3)


def _digest(addresses: Sequence[int], size: int) -> bytes:
    data = b"".join(ctypes.string_at(address, size) for address in addresses)
    return xxhash.xxh3_128_digest(data)
