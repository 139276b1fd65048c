"""What the tests of captures share."""

import pytest

from everstep.snapshot import device_plan, device_scratch, device_timing


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors of a test have many pieces and chunks."""
    monkeypatch.setattr(device_plan, "PIECE_BYTES", 333_000)
    monkeypatch.setattr(device_scratch, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(device_timing, "MEASURED_BYTES", 1 << 16)
