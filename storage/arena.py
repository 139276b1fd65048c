"""The memory level: arenas in tmpfs, which outlive trainer and agent.

Owns ``<root>/<job>`` on a tmpfs: ``rank-00003-g000001-s2.arena`` holds the slots of one rank (here
two, equal parts of the file), ``rank-00003-g000001-slot-0.record`` says what is in a slot, and
``membership`` who belongs to the job. A slot holds a shard exactly while it has a record; a
snapshot is complete when the records of all ranks of its world are here.

Promises to survive the death of every process, and that a reservation fails early, whole, and
with advice: never as a SIGBUS at first touch. Promises nothing after a reboot. Does not decide
which slot may be overwritten: the agent drops a record before it offers the slot again.
Images are mapped on demand and unmapped after use, since mapped pages count as resident.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from everstep.kernels.digest import verify_units
from everstep.proto import state_pb2
from everstep.proto.errors import FormatInvalid, ShardCorrupt
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES, ShardId, SnapshotId, checked_name, rank_stem
from everstep.storage.directory import Directory, storage_error
from everstep.storage.identity import (
    check_committed,
    check_digested,
    check_image_bytes,
    check_shard,
    check_snapshot,
    parse_commit,
    parse_record,
    snapshot_of,
)
from everstep.storage.jobs import Jobs
from everstep.storage.level import Problem, ShardImage
from everstep.storage.mapping import map_range, writable_range
from everstep.storage.reservation import reserve_file

SLOT_ALIGNMENT_BYTES = 4096
_ARENA = re.compile(r"rank-(\d{5,7})-g(\d{6,19})-s(\d{1,4})\.arena")
_RECORD = re.compile(r"rank-(\d{5,7})-g(\d{6,19})-slot-(\d{1,4})\.record")
_MEMBERSHIP = "membership"
_COPY_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, order=True)
class ArenaFile:
    """One reserved file: the slots of one rank. Orders by rank, then generation."""

    rank: int
    generation: int
    slot_count: int
    slot_bytes: int
    job: str
    path: Path

    @property
    def total_bytes(self) -> int:
        """The length of the file."""
        return self.slot_count * self.slot_bytes


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """A slot that holds a shard."""

    arena: ArenaFile
    slot: int
    envelope: bytes
    record: state_pb2.Record

    @property
    def rank(self) -> int:
        """The rank."""
        return self.arena.rank

    @property
    def generation(self) -> int:
        """The arena's generation."""
        return self.arena.generation

    @property
    def snapshot(self) -> SnapshotId:
        """The snapshot the shard belongs to."""
        return snapshot_of(self.record)


class MemoryLevel:
    """The memory level. See `Level` for the methods that every level has.

    Args:
        root: A directory on a tmpfs.
        keep_free_bytes: Memory that a reservation must leave to everyone else.
    """

    def __init__(self, root: Path, *, keep_free_bytes: int) -> None:
        self.root = root
        self._keep_free_bytes = keep_free_bytes
        self._jobs = Jobs(root, repairable=False)

    @property
    def name(self) -> str:
        """``memory``."""
        return "memory"

    def reserve(
        self, job: str, rank: int, generation: int, slot_count: int, slot_bytes: int
    ) -> ArenaFile:
        """Reserve an arena, every page of it. The same reservation again returns the same file.

        Args:
            job: The job.
            rank: The rank.
            generation: Distinguishes a rank's arenas when the layout outgrows one.
            slot_count: How many slots.
            slot_bytes: The size of each; a multiple of 4096.

        Raises:
            OutOfSpace: If tmpfs or memory do not hold it. Nothing stays behind.
            FormatInvalid: If this generation exists with other slots.
        """
        assert slot_count > 0, slot_count
        assert slot_bytes > 0, slot_bytes
        assert slot_bytes % SLOT_ALIGNMENT_BYTES == 0, slot_bytes
        name = f"{_arena_stem(rank, generation)}-s{slot_count}.arena"
        path = self.root / checked_name("job", job) / name
        wanted = ArenaFile(rank, generation, slot_count, slot_bytes, job, path)
        with self._jobs.create(job) as directory:
            arenas, _ = _arenas(directory, job)
            for arena in arenas:
                if arena == wanted:
                    return arena
                if (arena.rank, arena.generation) == (rank, generation):
                    raise FormatInvalid(
                        str(arena.path), f"exists; generation {generation} cannot be {name} too"
                    )
            reserve_file(directory, name, wanted.total_bytes, self._keep_free_bytes)
        return wanted

    def arenas(self, job: str) -> list[ArenaFile]:
        """All arenas of a job, by rank and generation."""
        directory = self._jobs.open(job)
        if directory is None:
            return []
        with directory:
            return _arenas(directory, job)[0]

    def records(self, job: str) -> list[SlotRecord]:
        """The slots that hold a shard, by rank, generation and slot. See also `problems`."""
        return self._scan(job)[0]

    def publish(
        self, job: str, rank: int, generation: int, slot: int, record_envelope: bytes
    ) -> None:
        """Say what a slot holds, or say it anew: when its unit digests have become known.

        Raises:
            FormatInvalid: If the record is of another rank or job, or such an image cannot be in
                such a slot. The slot stays as it was.
            OutOfSpace: If tmpfs is full. The slot stays as it was.
        """
        name = _record_name(rank, generation, slot)
        with self._jobs.create(job) as directory:
            arenas, _ = _arenas(directory, job)
            _checked_record(directory, name, arenas, job, record_envelope)
            directory.publish(name, record_envelope, "publish")

    def drop(self, job: str, rank: int, generation: int, slot: int) -> None:
        """Say that a slot holds nothing. Must happen before the slot is written to again."""
        name = _record_name(rank, generation, slot)
        directory = self._jobs.open(job)
        if directory is None:
            return
        with directory:
            try:
                failpoint("storage.drop.before_unlink")
                directory.unlink(name)
                failpoint("storage.drop.after_unlink")
            except OSError as error:
                raise storage_error(str(directory.path / name), 0, error) from error

    def image(self, arena: ArenaFile, slot: int, image_bytes: int) -> ShardImage:
        """Map the image in a slot, read-only. `record` stays empty: see `open_shard`.

        Raises:
            FormatInvalid: If the arena is gone or was replaced by something smaller.
        """
        offset = _slot_offset(arena, slot, image_bytes)
        with self._opened(arena, os.O_RDONLY) as descriptor:
            view, mapping = map_range(descriptor, offset, image_bytes)
        return ShardImage(view.toreadonly(), b"", arena.path, offset, mapping)

    @contextmanager
    def writable(self, arena: ArenaFile, slot: int, image_bytes: int) -> Iterator[memoryview]:
        """Map a slot for writing, to receive or decode into it. Drop its record first.

        Raises:
            FormatInvalid: If the arena is gone or was replaced by something smaller.
        """
        offset = _slot_offset(arena, slot, image_bytes)
        with (
            self._opened(arena, os.O_RDWR) as descriptor,
            writable_range(descriptor, offset, image_bytes) as view,
        ):
            yield view

    def release(self, job: str, rank: int, generation: int) -> None:
        """Remove an arena and what its slots held. Mappings of it stay valid until unmapped."""
        stem = _arena_stem(rank, generation) + "-"
        directory = self._jobs.open(job)
        if directory is None:
            return
        with directory:
            names = [name for name in directory.names() if name.startswith(stem)]
            # Records first: an arena without records holds nothing, a record without an arena
            # is a problem.
            try:
                for name in sorted(names, key=lambda name: name.endswith(".arena")):
                    failpoint("storage.release.before_unlink")
                    directory.unlink(name)
            except OSError as error:
                raise storage_error(str(directory.path / stem), 0, error) from error

    def membership(self, job: str) -> bytes | None:
        """The job's membership as it was written, or None.

        Raises:
            FormatInvalid: If it is there and cannot be read.
        """
        directory = self._jobs.open(job)
        if directory is None:
            return None
        with directory:
            try:
                return directory.read(_MEMBERSHIP)
            except FileNotFoundError:
                return None
            except OSError as error:
                where = str(directory.path / _MEMBERSHIP)
                raise FormatInvalid(where, f"it cannot be read: {error}") from error

    def write_membership(self, job: str, data: bytes) -> None:
        """Replace the job's membership in one move."""
        with self._jobs.create(job) as directory:
            directory.publish(_MEMBERSHIP, data, "membership")

    def jobs(self) -> list[str]:
        """See `Level.jobs`."""
        return self._jobs.names()

    def put_layout(self, job: str, layout_id: str, envelope: bytes) -> None:
        """See `Level.put_layout`."""
        self._jobs.put_layout(job, layout_id, envelope)

    def layout(self, job: str, layout_id: str) -> bytes:
        """See `Level.layout`."""
        return self._jobs.layout(job, layout_id)

    def snapshots(self, job: str) -> list[SnapshotId]:
        """See `Level.snapshots`. Complete: the records of all ranks of one world are here."""
        ranks = defaultdict(set)
        for held in self.records(job):
            ranks[held.snapshot, held.record.world].add(held.rank)
        return sorted({snapshot for (snapshot, world), got in ranks.items() if len(got) == world})

    def ranks(self, job: str, snapshot: SnapshotId) -> list[int]:
        """See `Level.ranks`."""
        return sorted({held.rank for held in self.records(job) if held.snapshot == snapshot})

    def begin(self, job: str, snapshot: SnapshotId) -> None:
        """See `Level.begin`. Slots are made room for by `reserve` and `drop`."""
        self._jobs.create(job).close()

    def store(
        self, job: str, snapshot: SnapshotId, rank: int, image: memoryview, record: bytes
    ) -> None:
        """See `Level.store`. Copies into a slot without a record, or into a new arena.

        Only while no trainer of this rank captures: a slot being captured into has no record.
        """
        where = f"{ShardId(snapshot, rank)} of job {job}, to be stored in memory"
        parsed = parse_record(record, where)
        check_shard(parsed, job, snapshot, rank, where)
        check_image_bytes(parsed, image.nbytes, where)
        held = [one for one in self.records(job) if (one.rank, one.snapshot) == (rank, snapshot)]
        if any(one.envelope == record for one in held):
            return
        arena, slot = self._free_slot(job, rank, image.nbytes)
        self._copy(image.cast("B"), arena, slot)
        if parsed.unit_digests:
            with self.image(arena, slot, image.nbytes) as copy:
                bad = verify_units(copy.image, UNIT_BYTES, parsed.unit_digests)
            if bad:
                raise ShardCorrupt(where, tuple(bad))
        self.publish(job, rank, arena.generation, slot, record)
        for one in held:
            self.drop(job, rank, one.generation, one.slot)

    def commit(self, job: str, snapshot: SnapshotId, commit: bytes) -> None:
        """See `Level.commit`. Writes nothing: here completeness follows from the records."""
        where = f"the commit of {snapshot} of job {job}"
        parsed = parse_commit(commit, where)
        check_snapshot(parsed, job, snapshot, where)
        held = [one for one in self.records(job) if one.snapshot == snapshot]
        check_committed(parsed, {one.rank: one.envelope for one in held}, where)
        for layout_id in sorted({one.record.layout_id for one in held}):
            self.layout(job, layout_id)
        if snapshot not in self.snapshots(job):
            missing = sorted(set(range(parsed.world)) - {one.rank for one in held})
            raise FormatInvalid(where, f"these ranks have no shard in memory: {missing}")

    def open_shard(self, job: str, snapshot: SnapshotId, rank: int) -> ShardImage:
        """See `Level.open_shard`."""
        held = self._held(job, snapshot, rank)
        shard = self.image(held.arena, held.slot, held.record.image_bytes)
        shard.record = held.envelope
        return shard

    def verify(self, job: str, snapshot: SnapshotId, rank: int) -> list[int]:
        """See `Level.verify`."""
        held = self._held(job, snapshot, rank)
        check_digested(held.record, str(held.arena.path))
        with self.image(held.arena, held.slot, held.record.image_bytes) as shard:
            return list(verify_units(shard.image, UNIT_BYTES, held.record.unit_digests))

    def delete(self, job: str, snapshot: SnapshotId) -> None:
        """See `Level.delete`. The slots stay reserved, free to be used again."""
        for held in self.records(job):
            if held.snapshot == snapshot:
                self.drop(job, held.rank, held.generation, held.slot)

    def remove_job(self, job: str) -> None:
        """See `Level.remove_job`. Arenas and membership go too."""
        self._jobs.remove(job)

    def finish_removals(self) -> list[str]:
        """Finish every interrupted `remove_job`, and say which. Only at a start, like `sweep`."""
        return self._jobs.finish_removals()

    def sweep(self, job: str) -> list[str]:
        """See `Level.sweep`."""
        return self._jobs.sweep(job)

    def problems(self, job: str) -> list[Problem]:
        """See `Level.problems`."""
        return self._scan(job)[1] + self._jobs.layout_problems(job)

    def _held(self, job: str, snapshot: SnapshotId, rank: int) -> SlotRecord:
        held = [one for one in self.records(job) if (one.rank, one.snapshot) == (rank, snapshot)]
        if not held:
            raise FormatInvalid(
                str(self.root / job), f"{ShardId(snapshot, rank)} is not in memory here"
            )
        # Two while `store` replaces a record: both are whole, the newest arena is kept longest.
        return max(held, key=lambda one: (one.generation, one.slot))

    def _scan(self, job: str) -> tuple[list[SlotRecord], list[Problem]]:
        directory = self._jobs.open(job)
        if directory is None:
            return [], []
        held = []
        with directory:
            arenas, problems = _arenas(directory, job)
            for name in directory.names():
                if not _RECORD.fullmatch(name):
                    continue
                try:
                    held.append(_checked_record(directory, name, arenas, job))
                except FormatInvalid as error:
                    problems.append(Problem(error.where, error.problem))
                except FileNotFoundError:
                    continue
                except OSError as error:
                    problems.append(Problem(str(directory.path / name), str(error)))
        return sorted(held, key=lambda one: (one.arena, one.slot)), problems

    def _free_slot(self, job: str, rank: int, image_bytes: int) -> tuple[ArenaFile, int]:
        arenas = [arena for arena in self.arenas(job) if arena.rank == rank]
        taken = {(held.arena, held.slot) for held in self.records(job)}
        for arena in reversed(arenas):
            for slot in range(arena.slot_count):
                if arena.slot_bytes >= image_bytes and (arena, slot) not in taken:
                    return arena, slot
        generation = max((arena.generation for arena in arenas), default=0) + 1
        slot_bytes = max(1, -(-image_bytes // SLOT_ALIGNMENT_BYTES)) * SLOT_ALIGNMENT_BYTES
        return self.reserve(job, rank, generation, 1, slot_bytes), 0

    def _copy(self, image: memoryview, arena: ArenaFile, slot: int) -> None:
        offset = _slot_offset(arena, slot, image.nbytes)
        with self._opened(arena, os.O_RDWR) as descriptor:
            done = 0
            # Written, not assigned through a mapping: only the former lets other threads run.
            while done < image.nbytes:
                chunk = image[done : done + _COPY_CHUNK_BYTES]
                done += os.pwrite(descriptor, chunk, offset + done)

    @contextmanager
    def _opened(self, arena: ArenaFile, flags: int) -> Iterator[int]:
        directory = self._jobs.open(arena.job)
        if directory is None:
            raise FormatInvalid(str(arena.path), "the arena is gone")
        with directory:
            try:
                descriptor = directory.open_file(arena.path.name, flags)
            except OSError as error:
                raise FormatInvalid(str(arena.path), f"it cannot be opened: {error}") from error
            try:
                # A mapping beyond the end of a file is a SIGBUS, so look before mapping.
                if os.fstat(descriptor).st_size < arena.total_bytes:
                    raise FormatInvalid(str(arena.path), "it is shorter than when it was found")
                yield descriptor
            finally:
                os.close(descriptor)


def _arena_stem(rank: int, generation: int) -> str:
    return f"{rank_stem(rank)}-g{generation:06d}"


def _record_name(rank: int, generation: int, slot: int) -> str:
    return f"{_arena_stem(rank, generation)}-slot-{slot}.record"


def _slot_offset(arena: ArenaFile, slot: int, image_bytes: int) -> int:
    assert 0 <= slot < arena.slot_count, slot
    assert 0 <= image_bytes <= arena.slot_bytes, image_bytes
    return slot * arena.slot_bytes


def _arenas(directory: Directory, job: str) -> tuple[list[ArenaFile], list[Problem]]:
    found, problems = [], []
    for name in directory.names():
        match = _ARENA.fullmatch(name)
        if not match:
            continue
        rank, generation, slot_count = (int(part) for part in match.groups())
        path = directory.path / name
        try:
            total_bytes = directory.size(name)
        except FileNotFoundError:
            continue
        if not slot_count or not total_bytes or total_bytes % (slot_count * SLOT_ALIGNMENT_BYTES):
            problems.append(Problem(str(path), f"{total_bytes} bytes are not {slot_count} slots"))
            continue
        slot_bytes = total_bytes // slot_count
        found.append(ArenaFile(rank, generation, slot_count, slot_bytes, job, path))
    return sorted(found), problems


def _checked_record(
    directory: Directory,
    name: str,
    arenas: list[ArenaFile],
    job: str,
    envelope: bytes | None = None,
) -> SlotRecord:
    """A slot's record, read if not given, checked against its name and the arena it is for."""
    match = _RECORD.fullmatch(name)
    assert match, name
    rank, generation, slot = (int(part) for part in match.groups())
    where = str(directory.path / name)
    envelope = directory.read(name) if envelope is None else envelope
    record = parse_record(envelope, where)
    check_shard(record, job, snapshot_of(record), rank, where)
    for arena in arenas:
        if (arena.rank, arena.generation) == (rank, generation):
            if slot < arena.slot_count and record.image_bytes <= arena.slot_bytes:
                return SlotRecord(arena, slot, envelope, record)
            raise FormatInvalid(where, f"{arena.path.name} is too small for what it describes")
    raise FormatInvalid(where, "the arena it describes is missing")
