"""How a restore that cannot go on yet waits."""

import logging

import pytest

from everstep.client.restoring import _Patience
from everstep.proto.errors import CoordinatorUnknown, PeerUnavailable


class Session:
    """Takes note of how long it is given."""

    def __init__(self) -> None:
        self.pauses_s: list[float] = []

    def await_return(self, deadline: float, pause_s: float) -> None:
        self.pauses_s.append(pause_s)


def test_it_waits_longer_each_time_up_to_a_bound() -> None:
    session = Session()
    patience = _Patience(session, 3, 1e6)  # type: ignore[arg-type]
    for _ in range(9):
        patience.wait(PeerUnavailable("n2", "it is down"))
    assert session.pauses_s == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


def test_it_says_for_what_and_once(caplog: pytest.LogCaptureFixture) -> None:
    patience = _Patience(Session(), 3, 1e6)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "everstep"):
        for problem in (PeerUnavailable("n2", "it is down"), CoordinatorUnknown(("n7",))):
            for _ in range(3):
                patience.wait(problem)
    first, second = (record.getMessage() for record in caplog.records)
    assert "rank 3" in first and "n2" in first
    assert "n7" in second


def test_in_the_end_it_raises_what_is_wrong() -> None:
    session = Session()
    with pytest.raises(PeerUnavailable, match="n2"):
        _Patience(session, 3, 0.0).wait(PeerUnavailable("n2", "it is down"))  # type: ignore[arg-type]
    assert session.pauses_s == []
