"""The next draw after a restore is the one that would have followed the capture."""

import random

import numpy
import pytest
import torch

from everstep.client import rng
from everstep.client.attachment import decode_torch_value
from everstep.proto.errors import FormatInvalid
from everstep.snapshot import values


def draws() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        random.getrandbits(70),
        numpy.random.standard_normal(3).tobytes(),
        numpy.random.randint(1 << 30),
        torch.randn(5).numpy().tobytes(),
        torch.randperm(9).tolist(),
    ]


@pytest.mark.parametrize("odd", [0, 1])
def test_next_draws(odd: int) -> None:
    """Also with a second gaussian left over in Python's and NumPy's generators."""
    for _ in range(odd):
        random.gauss(0, 1)
        numpy.random.standard_normal()
        torch.randn(1)
    stored = values.encode(rng.capture(), "rng")
    expected = draws()
    draws()
    assert rng.restore(values.decode(stored, hook=decode_torch_value)) == []
    assert draws() == expected


def test_what_is_drawn_later_is_not_in_what_was_captured() -> None:
    """A capture's thread encodes it when the training has gone on."""
    captured = rng.capture()
    expected = draws()
    stored = values.encode(captured, "rng")
    assert rng.restore(values.decode(stored, hook=decode_torch_value)) == []
    assert draws() == expected


def test_capture_draws_nothing() -> None:
    random.seed(1)
    torch.manual_seed(1)
    numpy.random.seed(1)
    expected = draws()
    random.seed(1)
    torch.manual_seed(1)
    numpy.random.seed(1)
    rng.capture()
    assert draws() == expected


def test_devices_that_nothing_has_used_stay_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask torch for their generators would initialise CUDA, and end the way to fork."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("initialised"))
    assert "cuda" not in rng.capture()


def test_devices_that_are_not_here_are_reported() -> None:
    states = rng.capture() | {"cuda": [b"x" * 16] * 2}
    (left,) = rng.restore(states)
    assert "2 CUDA device" in left


@pytest.mark.parametrize(
    "damage",
    [
        {"torch": b"short"},
        {"python": [3, b"", None]},
        {"python": None},
        {"numpy": ["MT19937", b"\x00" * 7, 1, 0, 0.0]},
    ],
)
def test_malformed_states(damage: dict[str, object]) -> None:
    with pytest.raises(FormatInvalid, match="random number generators"):
        rng.restore(rng.capture() | damage)
    states = rng.capture()
    del states["torch"]
    with pytest.raises(FormatInvalid):
        rng.restore(states)
