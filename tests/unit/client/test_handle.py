"""What a handle says, and that it never takes it back."""

import threading
import time

import pytest

from everstep.client.handle import Snapshot
from everstep.proto.errors import DeadlineExceeded, Refused


def test_states_in_order() -> None:
    handle = Snapshot(3)
    seen = [handle.state]
    for progress in ({"sealed": True}, {"committed": "memory"}, {"committed": "nvme"}):
        assert handle.mark(**progress)
        seen.append(handle.state)
    assert seen == ["copying", "sealed", "memory", "nvme"]
    assert handle.done("memory")
    assert handle.done("nvme")
    assert repr(handle) == "Snapshot(step=3, nvme)"


def test_nvme_implies_memory() -> None:
    handle = Snapshot(3)
    handle.mark(committed="nvme")
    assert handle.done("memory")


def test_an_outcome_never_changes() -> None:
    committed = Snapshot(1)
    committed.mark(committed="memory")
    assert not committed.mark(dropped="too late")
    assert committed.state == "memory"
    assert committed.dropped == ""
    dropped = Snapshot(2)
    assert dropped.mark(dropped="torn")
    assert not dropped.mark(dropped="again")
    assert dropped.dropped == "torn"
    assert repr(dropped) == "Snapshot(step=2, dropped: torn)"


def test_waiting_for_what_will_never_be_returns_at_once() -> None:
    skipped = Snapshot(1, "not due")
    dropped = Snapshot(2)
    dropped.mark(dropped="torn")
    for handle in (skipped, dropped):
        assert handle.wait() is False
        assert handle.wait("nvme") is False


def test_waiting_helps_and_ends_with_the_commit() -> None:
    handle = Snapshot(1)
    helped = threading.Event()
    handle.on_wait(helped.set, lambda timeout_s: None)

    def commit() -> None:
        assert helped.wait(30)
        handle.mark(sealed=True, committed="memory")

    thread = threading.Thread(target=commit)
    thread.start()
    assert handle.wait(timeout=30)
    thread.join()


def test_waiting_for_nvme_asks_for_the_flush() -> None:
    handle = Snapshot(1)
    asked = []

    def persist(timeout_s: float) -> None:
        asked.append(timeout_s)
        handle.mark(committed="nvme")

    handle.on_wait(lambda: None, persist)
    handle.mark(sealed=True, committed="memory")
    assert handle.wait("nvme", timeout=20)
    assert len(asked) == 1
    assert 0 < asked[0] <= 20
    assert handle.wait("nvme")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("sealed", "late"), [(False, "this rank"), (True, "other ranks or the agent")]
)
def test_a_deadline_names_who_is_late(sealed: bool, late: str) -> None:
    handle = Snapshot(4)
    handle.mark(sealed=sealed)
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="step 4") as raised:
        handle.wait(timeout=0.05)
    assert time.monotonic() - begun < 5
    assert raised.value.late == (late,)


def test_unknown_levels() -> None:
    for call in (Snapshot(1).wait, Snapshot(1).done):
        with pytest.raises(Refused, match="levels are memory, parity, nvme"):
            call("disk")


def test_help_is_let_go_of_once_it_is_of_no_use() -> None:
    """It would keep the state alive that was captured."""
    for progress in ({"sealed": True}, {"dropped": "torn"}, {"committed": "memory"}):
        handle = Snapshot(1)
        calls: list[int] = []
        handle.on_wait(lambda calls=calls: calls.append(1), lambda timeout_s: None)  # type: ignore[misc]
        handle.mark(**progress)  # type: ignore[arg-type]
        assert handle._help is None, progress
