"""The mapping of an arena."""

import logging
import mmap
from pathlib import Path

import pytest

from everstep.client.arrangement import ArenaMapping
from everstep.proto import agent_pb2 as wire

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
