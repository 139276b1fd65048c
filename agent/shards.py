"""One copy of one shard, read where it lies, unit by unit.

Owns reading an arena's slot or a shard file for `verify`, `inspect` and `export`, with no agent in
between. Promises that `UnitReader.unit` returns only bytes that passed their digest, in memory
bounded whatever the shard's size, and that bytes are read, never mapped: a bad sector is a damaged
copy, not a SIGBUS, and a slot that an agent overwrites meanwhile fails its digests. Chooses
nothing.
"""

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from everstep.agent.display import Advance
from everstep.proto.errors import EverstepError, FormatInvalid, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.proto.state_pb2 import Record
from everstep.snapshot.digest import check_unit, unit_count
from everstep.snapshot.layout import Layout, decode
from everstep.snapshot.record import open_record
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel

Store = MemoryLevel | NvmeLevel
_REMEMBERED_UNITS = 32
_UNITS_A_TASK = 16
_READ_THREADS = 4


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy of a shard: where it is, and what it should be."""

    job: str
    snapshot: SnapshotId
    rank: int
    level: str
    path: Path
    offset: int
    record: Record
    layout: Layout
    record_envelope: bytes
    layout_envelope: bytes

    def __str__(self) -> str:
        return f"{self.snapshot}, rank {self.rank}, {self.level}"


def locate(store: Store, job: str, snapshot: SnapshotId, rank: int) -> Copy:
    """Find a copy at a level. Its record and layout are checked, its image is not.

    Raises:
        FormatInvalid: If it is missing or its description is damaged.
    """
    with store.open_shard(job, snapshot, rank) as shard:
        path, offset, envelope = shard.path, shard.offset, shard.record
    record = open_record(envelope, str(path))
    layout_envelope = store.layout(job, record.layout_id)
    layout = decode(layout_envelope, f"the layout of {path}")
    if record.unit_bytes != UNIT_BYTES or layout.image_bytes != record.image_bytes:
        raise FormatInvalid(str(path), "its record and its layout contradict each other")
    return Copy(
        job, snapshot, rank, store.name, path, offset, record, layout, envelope, layout_envelope
    )


class UnitReader:
    """Reads a copy. Use as a context manager; from one thread, except `check`.

    Raises:
        FormatInvalid: On entry, if the file cannot be opened.
    """

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self._descriptor = -1
        self._recent: OrderedDict[int, bytes] = OrderedDict()

    def __enter__(self) -> Self:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._descriptor = os.open(self.copy.path, flags)
        except OSError as error:
            raise FormatInvalid(str(self.copy.path), f"it cannot be opened: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def unit(self, index: int) -> bytes:
        """One unit's bytes.

        Raises:
            ShardCorrupt: If they cannot be read or are not those of the record.
        """
        if index in self._recent:
            self._recent.move_to_end(index)
            return self._recent[index]
        data = self._read(index)
        self._recent[index] = data
        if len(self._recent) > _REMEMBERED_UNITS:
            self._recent.popitem(last=False)
        return data

    def _read(self, index: int) -> bytes:
        record = self.copy.record
        begin = index * UNIT_BYTES
        size = min(UNIT_BYTES, record.image_bytes - begin)
        try:
            data = os.pread(self._descriptor, size, self.copy.offset + begin)
        except OSError as error:
            raise ShardCorrupt(f"{self.copy.path} ({error.strerror})", (index,)) from error
        check_unit(data, record, index, str(self.copy.path))
        return data

    def check(self, advance: Advance) -> None:
        """Return only if every unit is right.

        Args:
            advance: Called, from several threads, as it goes on.

        Raises:
            ShardCorrupt: With all units that are not.
        """
        units = unit_count(self.copy.record.image_bytes)

        def damaged(first: int) -> list[int]:
            bad = []
            for unit in range(first, min(first + _UNITS_A_TASK, units)):
                try:
                    advance(len(self._read(unit)))
                except ShardCorrupt:
                    bad.append(unit)
            return bad

        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        with ThreadPoolExecutor(_READ_THREADS, "everstep-read") as executor:
            parts = executor.map(damaged, range(0, units, _UNITS_A_TASK))
            bad = [unit for part in parts for unit in part]
        if bad:
            raise ShardCorrupt(str(self.copy.path), tuple(bad))


def check_copy(copy: Copy, advance: Advance) -> None:
    """Return only if every byte of a copy is right.

    Raises:
        Damaged: If not.
    """
    with UnitReader(copy) as reader:
        reader.check(advance)


def problem_of(copy: Copy, advance: Advance) -> str:
    """What is wrong with a copy's bytes; empty if nothing is."""
    try:
        check_copy(copy, advance)
    except (EverstepError, OSError) as error:
        return str(error)
    return ""
