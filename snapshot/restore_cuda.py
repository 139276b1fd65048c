"""What restoring asks of a device (`snapshot/accelerator.py`), for CUDA.

Owns the stream that restored bytes travel on, the staging memory (torch's allocator's, so that what
it has cached counts as room), whether that goes back to the device afterwards, and the translation
of the runtime's errors. Promises that nothing waits for the device except copies of memory that is
not pinned; that nobody else is given staging memory before the copies to it have been made; and
that no more of it stays in the allocator's cache than is left beside it for those who do not use
that cache. Does not check any byte itself.
"""

import sys

import numpy
import torch

from everstep.kernels import xxh3_triton
from everstep.kernels.cuda_runtime import CudaFailure, CudaRuntime
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.accelerator import DeviceFailure, Table
from everstep.snapshot.pinning import StagingRing

_ALIGNMENT_BYTES = 16
_PROGRAMS = "everstep.kernels.xxh3_program_triton"
_found: list[CudaRuntime] = []
"""The runtime, once it is loaded: to look for it takes some 10 ms of a `rewind()`."""


def accelerator(device: torch.device) -> "CudaAccelerator | None":
    """The device as `DeviceFill` wants it; None for the CPU, and where there is no runtime."""
    if device.type != "cuda":
        return None
    if not _found and (runtime := CudaRuntime.find()) is not None:
        _found.append(runtime)
    return CudaAccelerator(device, _found[0]) if _found else None


class _CudaDigests:
    """See `accelerator.Digests`."""

    def __init__(
        self, found: torch.Tensor, done: torch.cuda.Event, reading: torch.cuda.Stream
    ) -> None:
        self._found = found
        self._done = done
        self._reading = reading

    def query(self) -> bool:
        """Whether they are there."""
        return bool(self._done.query())  # type: ignore[no-untyped-call]

    def read(self) -> bytes:
        """Merge what the device made of the units."""
        try:
            # Not on torch's current stream, where something may be under way for long, nor on that
            # of the digests, where the next ones wait for copies.
            with torch.cuda.stream(self._reading):
                return xxh3_triton.digests(self._found.cpu().numpy().view(numpy.uint64))
        except RuntimeError as error:
            raise DeviceFailure(f"no digests on {self._found.device}: {error}") from error


class CudaAccelerator:
    """One CUDA device, which torch has initialised already; see `accelerator.Accelerator`."""

    def __init__(self, device: torch.device, runtime: CudaRuntime) -> None:
        self._device = device
        self._runtime = runtime
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._digesting: torch.cuda.Stream | None = None
        self._reading: torch.cuda.Stream | None = None
        self._staging: list[torch.Tensor] = []
        self._reserved_bytes = 0

    @property
    def can_digest(self) -> bool:
        """Whether triton is there, and in use already.

        To import it and to compile takes longer than all the bytes on their way, and would hold
        them up, both being Python. The host digests fast enough where it has the cores.
        """
        return xxh3_triton.available() and _PROGRAMS in sys.modules

    def enter_thread(self) -> None:
        """Make this thread use the device, and disturb no graph that is being recorded."""
        try:
            self._runtime.enter_thread(self._device.index)
        except CudaFailure as failure:
            raise DeviceFailure(str(failure)) from failure

    def ring(self, buffers: int, buffer_bytes: int) -> StagingRing:
        """Pinned memory; not pinned, if that is impossible: slower, but right."""
        return StagingRing(self._runtime, buffers, buffer_bytes, device=self._device.index)

    def room(self) -> int:
        """What the device has free, and what torch keeps for later."""
        free, _ = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        return int(free + reserved - torch.cuda.memory_allocated(self._device))

    def allocate(self, size: int) -> int | None:
        """Memory from torch's allocator."""
        if not self._staging:
            self._reserved_bytes = torch.cuda.memory_reserved(self._device)
        try:
            staging = torch.empty(size, dtype=torch.uint8, device=self._device)
        except torch.cuda.OutOfMemoryError:
            return None
        staging.record_stream(self._stream)
        self._staging.append(staging)
        return staging.data_ptr()

    def free(self) -> None:
        """Give it back to the allocator, and to the device if that is short of memory.

        What came from the cache may stay there. What the cache grew by stays, for training's
        scratch and the next time, if there is still as much free for those who allocate otherwise
        (NCCL, other processes); torch itself empties its cache before it gives up. Allocating
        15 GB took 47 ms on an H100; freeing them is estimated to take no less.
        """
        if not self._staging:
            return
        self._staging.clear()
        grown = torch.cuda.memory_reserved(self._device) - self._reserved_bytes
        free, _ = torch.cuda.mem_get_info(self._device)
        if grown > free:
            torch.cuda.empty_cache()

    def follow(self) -> None:
        """Wait, on the device, for what torch's current stream has been given."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, table: Table) -> None:
        """Enqueue copies."""
        try:
            self._runtime.copy_async(table, self._stream.cuda_stream)
        except CudaFailure as failure:
            raise DeviceFailure(str(failure)) from failure

    def mark(self) -> torch.cuda.Event:
        """An event."""
        if self._digesting is not None:
            self._stream.wait_stream(self._digesting)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def digests(self, address: int, count: int) -> _CudaDigests:
        """Digest units on a stream of its own, beside the copies that follow."""
        try:
            digesting, reading = self._digest_streams()
            digesting.wait_stream(self._stream)
            with torch.cuda.stream(digesting):
                # Made there: to bring a table over would wait for the copies before.
                units = torch.arange(
                    address,
                    address + count * UNIT_BYTES,
                    UNIT_BYTES,
                    dtype=torch.int64,
                    device=self._device,
                )
                found = torch.empty((count, 8), dtype=torch.int64, device=self._device)
                xxh3_triton.accumulate(units, found, _ALIGNMENT_BYTES)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(digesting)
            return _CudaDigests(found, done, reading)
        except Exception as error:
            # Triton needs a compiler and a driver that fit, and says so in many ways.
            raise DeviceFailure(f"no digests on {self._device}: {error}") from error

    def _digest_streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """One that digests, beside the copies, and one that brings results, beside both."""
        if self._digesting is None or self._reading is None:
            self._digesting = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._reading = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return self._digesting, self._reading
