"""Which units are looked at, and units brought into memory unchecked and then checked."""

import ctypes
import errno
import itertools
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot import reading as snapshot_reading
from everstep.snapshot.reading import ShardReader, _spans

from .shards import Folder, flip, some

BLOCK = 16


class Memory:
    """Where units go: at the start of a page, or not."""

    def __init__(self, units: int, shift: int = 0) -> None:
        self.size = units * UNIT_BYTES
        self.whole = (ctypes.c_ubyte * (self.size + shift)).from_buffer(
            mmap.mmap(-1, self.size + shift)
        )
        self.address = ctypes.addressof(self.whole) + shift

    def read(self, size: int) -> bytes:
        return ctypes.string_at(self.address, size)


@pytest.mark.parametrize("shift", [0, 8])
@pytest.mark.parametrize("level", ["memory", "nvme"])
def test_units_in_memory(tmp_path: Path, level: str, shift: int) -> None:
    """The last one, which is not whole, as well."""
    shard = Folder(tmp_path, level).shard(some())
    image = Path(shard.path).read_bytes()[shard.offset :]
    units = -(-len(image) // UNIT_BYTES)
    with ShardReader(shard) as reader:
        for first, count in ((0, 1), (3, 4), (units - 2, 2), (0, units)):
            memory = Memory(count, shift)
            reader.into(memory.address, first, count)
            part = image[first * UNIT_BYTES : (first + count) * UNIT_BYTES]
            assert memory.read(len(part)) == part
            assert reader.damaged(memory.address, first, count) == []
        flip(shard, len(image) - 1)
        flip(shard, 5)
        reader.into(memory.address, 0, units)
        assert reader.damaged(memory.address, 0, units) == [0, units - 1]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EFAULT])
def test_what_cannot_be_read_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some file systems say so when they are asked to read, and so does some pinned memory."""
    shard = Folder(tmp_path, "nvme").shard(some())
    with ShardReader(shard) as reader:
        cached, read = reader._source._descriptor, os.preadv  # type: ignore[union-attr]

        def refusing(descriptor: int, *rest: Any) -> int:
            if descriptor != cached:
                raise OSError(number, os.strerror(number))
            return read(descriptor, *rest)

        monkeypatch.setattr(os, "preadv", refusing)
        memory = Memory(4)
        reader.into(memory.address, 0, 4)
        assert reader.damaged(memory.address, 0, 4) == []


def test_a_bad_sector_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Folder(tmp_path, "nvme").shard(some())

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "bad sector")

    with ShardReader(shard) as reader:
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(OSError, match="bad sector"):
            reader.into(Memory(1).address, 0, 1)


def units_of(ranges: Iterable[tuple[int, int]]) -> list[int]:
    return sorted(
        {
            unit
            for start, stop in ranges
            if start < stop
            for unit in range(start // UNIT_BYTES, (stop - 1) // UNIT_BYTES + 1)
        }
    )


POINT = st.integers(0, 60 * 4).map(lambda quarter: quarter * UNIT_BYTES // 4)


@given(st.lists(st.tuples(POINT, POINT), max_size=12))
def test_spans(ranges: list[tuple[int, int]]) -> None:
    spans = _spans(ranges)
    assert [unit for span in spans for unit in span] == units_of(ranges)
    assert all(span.start // BLOCK == (span.stop - 1) // BLOCK for span in spans)
    # Long ones: no two of a block could have been one.
    assert all(a.stop < b.start or b.start % BLOCK == 0 for a, b in itertools.pairwise(spans))
    parts = snapshot_reading.units_of(ranges, 61 * UNIT_BYTES)
    assert [unit for part in parts for unit in part] == units_of(ranges)
    assert all(a.stop < b.start for a, b in itertools.pairwise(parts))
