"""What the tests of captures share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.snapshot import device_plan, device_scratch, device_timing
from tests.unit.fake_cuda import FakeCuda


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors of a test have many pieces and chunks."""
    monkeypatch.setattr(device_plan, "PIECE_BYTES", 333_000)
    monkeypatch.setattr(device_scratch, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(device_timing, "MEASURED_BYTES", 1 << 16)


@pytest.fixture
def cuda(tmp_path: Path) -> Iterator[FakeCuda]:
    fake = FakeCuda(tmp_path)
    yield fake
    fake.control.fake_gate(0)
