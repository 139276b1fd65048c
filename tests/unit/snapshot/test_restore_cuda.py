"""What becomes of staging memory, with torch's allocator stood in for: no device is needed."""

from dataclasses import dataclass

import pytest
import torch

from everstep.snapshot import restore_cuda
from everstep.snapshot.restore_cuda import CudaAccelerator

CPU = torch.device("cpu")
PIECE_BYTES = 1 << 10


@dataclass
class Allocator:
    """What torch would say of a device; every piece of staging memory is new to it, or none is."""

    reserved: int = 1000
    free: int = 0
    grows: bool = True
    emptied: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 1 << 40))
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.record())

    def empty(self) -> None:
        self.emptied += 1

    def record(self) -> None:
        if self.grows:
            self.reserved += PIECE_BYTES
            self.free -= PIECE_BYTES


@pytest.mark.parametrize(
    ("grows", "free", "emptied"),
    [
        (True, 4 * PIECE_BYTES, 0),  # As much is left as was taken: others find room.
        (True, 4 * PIECE_BYTES - 1, 1),
        (True, 2 * PIECE_BYTES, 1),
        (False, 0, 0),  # It was torch's before, and training's scratch may lie there again.
    ],
)
def test_staging_goes_back_to_the_device_where_that_is_short_of_memory(
    monkeypatch: pytest.MonkeyPatch, grows: bool, free: int, emptied: int
) -> None:
    allocator = Allocator(free=free, grows=grows)
    allocator.install(monkeypatch)
    device = CudaAccelerator(CPU, runtime=None)  # type: ignore[arg-type]
    for _ in range(2):
        assert device.allocate(PIECE_BYTES)
    device.free()
    assert allocator.emptied == emptied
    device.free()
    assert allocator.emptied == emptied, "nothing was allocated since"


def test_each_restore_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache grew by before is not given back because of a later, small one."""
    allocator = Allocator(free=10 * PIECE_BYTES)
    allocator.install(monkeypatch)
    device = CudaAccelerator(CPU, runtime=None)  # type: ignore[arg-type]
    for _ in range(5):
        device.allocate(PIECE_BYTES)
    device.free()
    device.allocate(PIECE_BYTES)
    device.free()
    assert not allocator.emptied


def test_the_host_is_no_such_device() -> None:
    assert restore_cuda.accelerator(CPU) is None
