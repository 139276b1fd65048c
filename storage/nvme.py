"""The NVMe level: shards on this node's disk, which survive power loss.

Owns ``<root>/<job>/step-000000001234/`` with ``rank-00003.safetensors``, ``rank-00003.record`` and
``commit``, and ``<root>/<job>/layouts/<id>``. A snapshot exists exactly when its commit can be
read, and the commit is written last. The parity that may lie beside them is `parity_nvme`'s.

Promises that what `snapshots` lists survives power loss, and that a step which is taken again by a
later incarnation never costs the earlier one: that is moved aside to ``.superseded-step-...``,
stays readable there, and goes when its successor is committed. Records, commits and layouts carry
parity of their own. Does not promise that bytes on disk stay right: `verify` tells.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from everstep.proto import state_pb2
from everstep.proto.envelope import open_envelope, seal
from everstep.proto.errors import FormatInvalid
from everstep.proto.ids import (
    SnapshotId,
    checked_name,
    rank_stem,
    step_directory,
)
from everstep.storage.direct import ImageWriter
from everstep.storage.directory import Directory, storage_error
from everstep.storage.identity import (
    check_committed,
    check_digested,
    check_image_bytes,
    check_shard,
    check_snapshot,
    parse_commit,
    parse_record,
)
from everstep.storage.images import damaged_units, publish_image
from everstep.storage.jobs import Jobs
from everstep.storage.level import Problem, ShardImage
from everstep.storage.mapping import map_range
from everstep.storage.parity_nvme import ParityNvme
from everstep.storage.steps import (
    COMMIT,
    clear_uncommitted,
    committed_steps,
    find_step,
    make_room,
    remove_step,
    remove_superseded,
    steps_of,
    sweep_steps,
)

_IMAGE_SUFFIX = ".safetensors"
_RECORD_SUFFIX = ".record"
_RECORD_NAME = re.compile(r"rank-(\d{5,7})\.record")


@dataclass(frozen=True, slots=True)
class _OpenShard:
    path: Path
    descriptor: int
    envelope: bytes
    record: state_pb2.Record


class NvmeLevel:
    """The NVMe level. See `Level` for the methods that every level has.

    Args:
        root: A directory on a local disk.
        write_threads: Threads that write images; two keep one disk busy.
        chunk_bytes: How much one thread writes at a time.
        direct: Whether to write past the page cache where the file system allows it.
    """

    def __init__(
        self,
        root: Path,
        *,
        write_threads: int = 2,
        chunk_bytes: int = 4 << 20,
        direct: bool = True,
    ) -> None:
        self.root = root
        self._jobs = Jobs(root, repairable=True)
        self._writer = ImageWriter(threads=write_threads, chunk_bytes=chunk_bytes, direct=direct)
        self.parity = ParityNvme(root, self._jobs, self._writer)
        """The parity in the same step directories."""

    def close(self) -> None:
        """End the writer threads."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        """``nvme``."""
        return "nvme"

    def jobs(self) -> list[str]:
        """See `Level.jobs`."""
        return self._jobs.names()

    def put_layout(self, job: str, layout_id: str, envelope: bytes) -> None:
        """See `Level.put_layout`."""
        self._jobs.put_layout(job, layout_id, envelope)

    def layout(self, job: str, layout_id: str) -> bytes:
        """See `Level.layout`."""
        return self._jobs.layout(job, layout_id)

    def commits(self, job: str) -> list[state_pb2.Commit]:
        """The commits of the complete snapshots, oldest first."""
        directory = self._jobs.open(job)
        if directory is None:
            return []
        with directory:
            found, _ = committed_steps(directory, job)
        return [found[snapshot].commit for snapshot in sorted(found)]

    def snapshots(self, job: str) -> list[SnapshotId]:
        """See `Level.snapshots`. Complete: the commit can be read."""
        return [SnapshotId(commit.incarnation, commit.step) for commit in self.commits(job)]

    def ranks(self, job: str, snapshot: SnapshotId) -> list[int]:
        """See `Level.ranks`: those on this disk."""
        directory = self._jobs.open(job)
        if directory is None:
            return []
        with directory:
            try:
                name = find_step(directory, job, snapshot).directory_name
            except FormatInvalid:
                name = step_directory(snapshot.step)
            try:
                step = directory.child(name)
            except FileNotFoundError:
                return []
            with step:
                records, _ = _stored_records(step, job, snapshot)
                return sorted(records)

    def begin(self, job: str, snapshot: SnapshotId) -> None:
        """See `Level.begin`. A committed snapshot of another incarnation is moved aside."""
        with self._jobs.create(job) as directory, _writing(directory.path):
            make_room(directory, job, snapshot)

    def store(
        self, job: str, snapshot: SnapshotId, rank: int, image: memoryview, record: bytes
    ) -> None:
        """See `Level.store`. Fastest from a page-aligned mapping, as `MemoryLevel.image` gives.

        Storing a shard of a committed snapshot again replaces a damaged copy of it.
        """
        where = str(self._step_path(job, snapshot) / rank_stem(rank))
        parsed = parse_record(record, where)
        check_shard(parsed, job, snapshot, rank, where)
        check_image_bytes(parsed, image.nbytes, where)
        check_digested(parsed, where)
        sealed = seal("record", open_envelope("record", record, where), repairable=True)
        with self._begun(job, snapshot) as (directory, step):
            if step.exists(COMMIT):
                commit = find_step(directory, job, snapshot).commit
                check_committed(commit, {rank: record}, where)
            name = rank_stem(rank) + _IMAGE_SUFFIX
            publish_image(self._writer, step, name, image, parsed.unit_digests)
            step.publish(rank_stem(rank) + _RECORD_SUFFIX, sealed, "record")

    def commit(self, job: str, snapshot: SnapshotId, commit: bytes) -> None:
        """See `Level.commit`. On one node of several, only this node's ranks are looked at."""
        where = str(self._step_path(job, snapshot) / COMMIT)
        parsed = parse_commit(commit, where)
        check_snapshot(parsed, job, snapshot, where)
        sealed = seal("commit", open_envelope("commit", commit, where), repairable=True)
        with self._begun(job, snapshot) as (directory, step):
            records, strangers = _stored_records(step, job, snapshot)
            if strangers:
                raise strangers[0]
            check_committed(parsed, records, where)
            for shard in parsed.shards:
                if shard.rank in records:
                    self.layout(job, shard.layout_id)
                    image_bytes = _image_bytes(step, shard.rank)
                    check_image_bytes(parse_record(records[shard.rank], where), image_bytes, where)
            step.publish(COMMIT, sealed, "commit")
            try:
                remove_superseded(directory, snapshot.step)
            except OSError:
                # Committed it is. What it supersedes is found again by `sweep`.
                pass

    def give_up(self, job: str, snapshot: SnapshotId) -> None:
        """Give back the space of what was stored of a snapshot that is not committed."""
        directory = self._jobs.open(job)
        if directory is None:
            return
        with directory, _writing(directory.path):
            clear_uncommitted(directory, job, snapshot.step)

    def open_shard(self, job: str, snapshot: SnapshotId, rank: int) -> ShardImage:
        """See `Level.open_shard`."""
        with self._shard(job, snapshot, rank) as shard:
            view, mapping = map_range(shard.descriptor, 0, shard.record.image_bytes)
            return ShardImage(view.toreadonly(), shard.envelope, shard.path, 0, mapping)

    def verify(self, job: str, snapshot: SnapshotId, rank: int) -> list[int]:
        """See `Level.verify`. Reads rather than maps: a bad sector is a bad unit, not a SIGBUS."""
        with self._shard(job, snapshot, rank) as shard:
            check_digested(shard.record, str(shard.path))
            record = shard.record
            return damaged_units(shard.descriptor, record.image_bytes, record.unit_digests)

    def delete(self, job: str, snapshot: SnapshotId) -> None:
        """See `Level.delete`. Its parity goes too, also where there is nothing else of it."""
        directory = self._jobs.open(job)
        if directory is None:
            return
        with directory, _writing(directory.path):
            for name in steps_of(directory, job, snapshot):
                remove_step(directory, name)

    def remove_job(self, job: str) -> None:
        """See `Level.remove_job`."""
        self._jobs.remove(job)

    def finish_removals(self) -> list[str]:
        """Finish every interrupted `remove_job`, and say which. Only at a start, like `sweep`."""
        return self._jobs.finish_removals()

    def sweep(self, job: str) -> list[str]:
        """See `Level.sweep`. A snapshot moved aside comes back if its successor never came."""
        done = self._jobs.sweep(job)
        directory = self._jobs.open(job)
        if directory is None:
            return done
        with directory, _writing(directory.path):
            done += sweep_steps(directory, job)
        return done + self.parity.sweep(job)

    def problems(self, job: str) -> list[Problem]:
        """See `Level.problems`. Images are not read: that is `verify`."""
        directory = self._jobs.open(job)
        if directory is None:
            return []
        with directory:
            found, problems = committed_steps(directory, job)
            for snapshot, step in sorted(found.items()):
                with directory.child(step.directory_name) as opened:
                    names = set(opened.names())
                for shard in step.commit.shards:
                    stem = rank_stem(shard.rank)
                    # Ranks without a trace here are on other nodes.
                    if names & {stem + _IMAGE_SUFFIX, stem + _RECORD_SUFFIX}:
                        problems += self._shard_problems(job, snapshot, shard.rank)
        return problems + self.parity.problems(job) + self._jobs.layout_problems(job)

    def _shard_problems(self, job: str, snapshot: SnapshotId, rank: int) -> list[Problem]:
        try:
            with self._shard(job, snapshot, rank):
                return []
        except FormatInvalid as error:
            return [Problem(error.where, error.problem)]

    def _step_path(self, job: str, snapshot: SnapshotId) -> Path:
        return self.root / checked_name("job", job) / step_directory(snapshot.step)

    @contextmanager
    def _begun(self, job: str, snapshot: SnapshotId) -> Iterator[tuple[Directory, Directory]]:
        """The directories of a job and of a snapshot that `begin` has made."""
        with self._jobs.create(job) as directory:
            try:
                step = directory.child(step_directory(snapshot.step))
            except FileNotFoundError as error:
                path = self._step_path(job, snapshot)
                raise FormatInvalid(str(path), f"{snapshot} was not begun") from error
            with step:
                yield directory, step

    @contextmanager
    def _shard(self, job: str, snapshot: SnapshotId, rank: int) -> Iterator[_OpenShard]:
        """A shard of a committed snapshot, checked to be the one that was asked for."""
        directory = self._jobs.open(job)
        if directory is None:
            where = str(self._step_path(job, snapshot))
            raise FormatInvalid(where, f"{snapshot} is not committed on this disk")
        with directory:
            found = find_step(directory, job, snapshot)
            with directory.child(found.directory_name) as step:
                path = step.path / (rank_stem(rank) + _IMAGE_SUFFIX)
                envelope = _plain_record(step, rank)
                record = parse_record(envelope, str(path))
                check_committed(found.commit, {rank: envelope}, str(path))
                check_image_bytes(record, _image_bytes(step, rank), str(path))
                descriptor = step.open_file(path.name, os.O_RDONLY)
        try:
            yield _OpenShard(path, descriptor, envelope, record)
        finally:
            os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(str(path), 4096, error) from error


def _plain_record(step: Directory, rank: int) -> bytes:
    """The record's envelope as it was given to `store`, without what was added for the disk."""
    name = rank_stem(rank) + _RECORD_SUFFIX
    where = str(step.path / name)
    try:
        data = step.read(name)
    except OSError as error:
        raise FormatInvalid(where, f"it cannot be read: {error}") from error
    return seal("record", open_envelope("record", data, where))


def _image_bytes(step: Directory, rank: int) -> int:
    name = rank_stem(rank) + _IMAGE_SUFFIX
    try:
        return step.size(name)
    except OSError as error:
        raise FormatInvalid(str(step.path / name), f"it cannot be read: {error}") from error


def _stored_records(
    step: Directory, job: str, snapshot: SnapshotId
) -> tuple[dict[int, bytes], list[FormatInvalid]]:
    """The plain records of a snapshot's shards in a directory, and why others are not."""
    records, strangers = {}, []
    for name in step.names():
        match = _RECORD_NAME.fullmatch(name)
        if not match:
            continue
        rank = int(match[1])
        where = str(step.path / name)
        try:
            envelope = _plain_record(step, rank)
            check_shard(parse_record(envelope, where), job, snapshot, rank, where)
        except FormatInvalid as error:
            strangers.append(error)
        else:
            records[rank] = envelope
    return records, strangers
