"""The mapping of an arena."""

import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from everstep.client.arrangement import ArenaMapping, Arrangement, Arranger
from everstep.client.attachment import Collected
from everstep.proto import agent_pb2 as wire
from everstep.snapshot.pinning import PinnedArena

SLOT_BYTES = 4 * mmap.PAGESIZE


@pytest.fixture
def mapping(tmp_path: Path) -> ArenaMapping:
    path = tmp_path / "arena"
    path.write_bytes(bytes(2 * SLOT_BYTES))
    reply = wire.DeclareReply(
        arena_path=str(path), slot_bytes=SLOT_BYTES, slot_count=2, generation=3
    )
    return ArenaMapping(reply, "job", 0)


def test_slots_lie_one_after_the_other(mapping: ArenaMapping, tmp_path: Path) -> None:
    slot = mapping.slot(1, 100)
    slot[:] = b"x" * 100
    slot.release()
    mapping.close()
    assert (tmp_path / "arena").read_bytes()[SLOT_BYTES:][:101] == b"x" * 100 + b"\0"


def test_an_arena_that_cannot_be_pinned_says_so_once(
    mapping: ArenaMapping, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "everstep"):
        pinned = mapping.pin(None, 0)
        assert mapping.pin(None, 0) is pinned
    assert not pinned.is_pinned(0)
    assert caplog.text.count("not pinned") == 1
    mapping.close()


class FirstSlot:
    """Pinned, in pieces of two pages."""

    def is_pinned(self, slot: int) -> bool:
        return slot == 0

    def split(self, address: int, size: int) -> list[tuple[int, int]]:
        return [(address, size)] * -(-size // (2 * mmap.PAGESIZE))

    def close(self) -> bool:
        return True


def test_where_pinned_pieces_of_a_file_are(
    mapping: ArenaMapping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, page = str(tmp_path / "arena"), mmap.PAGESIZE
    assert mapping.pinned(path, 0, page) is None
    mapping._pinned = cast(PinnedArena, FirstSlot())
    begin = mapping.pinned(path, 0, page)
    assert begin is not None
    assert mapping.pinned(path, 2 * page, 2 * page) == begin + 2 * page
    assert mapping.pinned(path, 0, 3 * page) is None, "two pieces"
    assert mapping.pinned(path, 3 * page, 2 * page) is None, "two slots"
    (tmp_path / "other").write_bytes(b"")
    assert mapping.pinned(str(tmp_path / "other"), 0, page) is None
    assert mapping.pinned(str(tmp_path / "none"), 0, page) is None
    (tmp_path / "arena").unlink()
    assert mapping.pinned(path, 0, page) is None, "another file may get that name"
    monkeypatch.setattr(os, "stat", lambda *_, **__: pytest.fail("asked of what is not pinned"))
    assert mapping.pinned(path, SLOT_BYTES, page) is None
    mapping.close()


class Asked(Exception):
    pass


class AskedChannel:
    def call(self, *_: object) -> None:
        raise Asked


DOUBTS: dict[str, Callable[[Arranger], object]] = {
    "changed outside the fence": lambda arranger: arranger.distrust(["x"]),
    "differ between ranks": lambda arranger: arranger.replicas_drifted(["x"]),
    "another incarnation": Arranger.begin_anew,
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_form_that_fitted_is_looked_at_again_only_after_a_doubt(
    mapping: ArenaMapping, doubt: str
) -> None:
    channel: Any = AskedChannel()
    plan: Any = None
    arranger, session = Arranger(channel, 1.0, 1.0), wire.Session()
    known, equal = Collected(), Collected()
    current = Arrangement(plan, mapping, ((), (), (), (), frozenset(), ()), None)
    arranger._current = current
    for collected in (known, known, equal, known):
        assert arranger.arrange(session, [], collected, 1) is current
        assert current.form is collected.form
    with pytest.raises(Asked):
        arranger.arrange(session, [], Collected(aliases={"x": "y"}), 1)
    DOUBTS[doubt](arranger)
    with pytest.raises(Asked):
        arranger.arrange(session, [], known, 1)
    mapping.close()
