"""What restoring asks of a device (`snapshot/accelerator.py`), for CUDA.

Owns the stream that restored bytes travel on, the staging memory (torch's allocator's, so that what
it has cached counts as room) and the translation of the runtime's errors. Promises that nothing
waits for the device except `digests`, which comes after all copies have arrived, and that staging
memory goes back to the device and not only into the allocator's cache, where training could not
use it in other sizes. Does not check any byte itself.
"""

import sys

import numpy
import torch
from numpy.typing import NDArray

from everstep.kernels import xxh3_triton
from everstep.kernels.cuda_runtime import CudaFailure, CudaRuntime
from everstep.snapshot.accelerator import DeviceFailure, Table
from everstep.snapshot.pinning import StagingRing

_ALIGNMENT_BYTES = 16
_PROGRAMS = "everstep.kernels.xxh3_program_triton"


def accelerator(device: torch.device) -> "CudaAccelerator | None":
    """The device as `DeviceFill` wants it; None for the CPU, and where there is no runtime."""
    if device.type != "cuda":
        return None
    runtime = CudaRuntime.find()
    return None if runtime is None else CudaAccelerator(device, runtime)


class CudaAccelerator:
    """One CUDA device, which torch has initialised already; see `accelerator.Accelerator`."""

    def __init__(self, device: torch.device, runtime: CudaRuntime) -> None:
        self._device = device
        self._runtime = runtime
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging: list[torch.Tensor] = []

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
        try:
            staging = torch.empty(size, dtype=torch.uint8, device=self._device)
        except torch.cuda.OutOfMemoryError:
            return None
        self._staging.append(staging)
        return staging.data_ptr()

    def free(self) -> None:
        """Give it back to the device."""
        if self._staging:
            self._staging.clear()
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
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def digests(self, addresses: NDArray[numpy.int64]) -> bytes:
        """Digest units that have arrived."""
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                units = torch.from_numpy(addresses).to(self._device)
                found = torch.empty((len(units), 8), dtype=torch.int64, device=self._device)
                xxh3_triton.accumulate(units, found, _ALIGNMENT_BYTES)
                return xxh3_triton.digests(found.cpu().numpy().view(numpy.uint64))
        except Exception as error:
            # Triton needs a compiler and a driver that fit, and says so in many ways.
            raise DeviceFailure(f"no digests on {self._device}: {error}") from error
