"""Shards of other ranks, fetched for a restore that needs only some of their units.

Owns ``<root>/<job>/staged/inc-000001-step-000000001234-rank-00003.image`` on a tmpfs: sparse files
as long as the shard's image, with memory behind the units that were asked for and no others.
Promises that these units are allocated before anything is written, so that memory runs out early
and never as a SIGBUS, and that nothing but them can be written through `StagedFile`. Does not
verify what is written: whoever reads it does, and must not touch the holes through a mapping, since
even reading one there takes memory, and is a SIGBUS if there is none.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from everstep.proto.errors import FormatInvalid
from everstep.proto.ids import MAX_RANKS, UNIT_BYTES, ShardId, SnapshotId, checked_name, rank_stem
from everstep.storage.directory import Directory, storage_error
from everstep.storage.identity import unit_count
from everstep.storage.jobs import STAGED, Jobs
from everstep.storage.mapping import writable_range
from everstep.storage.reservation import allocate_ranges, reserve_ranges

MAX_IMAGE_BYTES = 1 << 44
"""No shard is larger; a larger one is damage, not a reason to make a file."""


@dataclass(slots=True)
class StagedFile:
    """A file that some units of a shard are fetched into. Use as a context manager, or `close`.

    Closing ends writing; the file stays.
    """

    path: Path
    """For the trainer, which maps it by itself."""
    image_bytes: int
    unit_ranges: tuple[range, ...]
    """The units that may be written, in order, none twice."""
    descriptor: int = field(repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it. Again is a no-op."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def unit_bytes(self, unit: int) -> int:
        """How long a unit is: all but the image's last have 1 MiB."""
        return min(UNIT_BYTES, self.image_bytes - unit * UNIT_BYTES)

    def writable(self, unit: int) -> AbstractContextManager[memoryview]:
        """Map one unit that was asked for, to receive or decode into."""
        assert self.descriptor >= 0, "closed"
        assert any(unit in units for units in self.unit_ranges), unit
        return writable_range(self.descriptor, unit * UNIT_BYTES, self.unit_bytes(unit))


class Staging:
    """The staged shards of all jobs. May be called from any thread; no two for the same shard.

    Args:
        root: The memory level's root, on a tmpfs.
        keep_free_bytes: Memory that a reservation must leave to everyone else.
    """

    def __init__(self, root: Path, *, keep_free_bytes: int) -> None:
        self.root = root
        self._keep_free_bytes = keep_free_bytes
        self._jobs = Jobs(root, repairable=False)

    def create(
        self,
        job: str,
        snapshot: SnapshotId,
        rank: int,
        image_bytes: int,
        unit_ranges: Iterable[range],
    ) -> StagedFile:
        """Make the file for a shard, replacing one of an earlier attempt.

        Whoever has mapped the earlier one keeps that.

        Args:
            job: The job.
            snapshot: The snapshot.
            rank: The rank whose shard it is.
            image_bytes: The length of its image.
            unit_ranges: The units that are needed; they may overlap, in any order.

        Raises:
            FormatInvalid: If there are no such units or no such shard. Nothing was made.
            OutOfSpace: If tmpfs or memory do not hold the units. Nothing was made.
        """
        units = _checked_units(job, snapshot, rank, image_bytes, unit_ranges)
        ranges = [_byte_range(one, image_bytes) for one in units]
        name = staged_name(snapshot, rank)
        with self._folder(job) as folder:
            reserve_ranges(folder, name, image_bytes, ranges, self._keep_free_bytes)
            try:
                descriptor = folder.open_file(name, os.O_RDWR)
            except OSError as error:
                raise storage_error(str(folder.path / name), image_bytes, error) from error
            return StagedFile(folder.path / name, image_bytes, tuple(units), descriptor)

    def extend(
        self,
        job: str,
        snapshot: SnapshotId,
        rank: int,
        image_bytes: int,
        unit_ranges: Iterable[range],
    ) -> StagedFile:
        """Open a shard's file for more units; those that are there stay, for whoever reads them.

        Args:
            job: The job.
            snapshot: The snapshot.
            rank: The rank whose shard it is.
            image_bytes: The length of its image.
            unit_ranges: The units that are needed and not there yet; as for `create`.

        Raises:
            FormatInvalid: As `create`, and if there is no such file.
            OutOfSpace: If tmpfs or memory do not hold the units. The file is as it was, but may
                have taken some of the memory.
        """
        units = _checked_units(job, snapshot, rank, image_bytes, unit_ranges)
        ranges = [_byte_range(one, image_bytes) for one in units]
        name = staged_name(snapshot, rank)
        with self._folder(job) as folder:
            where = folder.path / name
            try:
                descriptor = folder.open_file(name, os.O_RDWR)
            except OSError as error:
                raise FormatInvalid(str(where), f"it is gone: {error}") from error
            staged = StagedFile(where, image_bytes, tuple(units), descriptor)
            try:
                if os.fstat(descriptor).st_size != image_bytes:
                    raise FormatInvalid(str(where), f"it is not of {image_bytes} bytes")
                allocate_ranges(folder, descriptor, ranges, self._keep_free_bytes)
            except BaseException:
                staged.close()
                raise
            return staged

    def drop(self, job: str) -> None:
        """Remove everything staged for a job. Mappings stay valid until unmapped."""
        directory = self._jobs.open(job)
        if directory is None:
            return
        with directory:
            try:
                directory.remove_tree(STAGED)
            except OSError as error:
                raise storage_error(str(directory.path / STAGED), 0, error) from error

    def sweep(self, job: str) -> list[str]:
        """Remove what an earlier agent staged, and say so. Only at a start."""
        directory = self._jobs.open(job)
        if directory is None:
            return []
        with directory:
            present = directory.exists(STAGED)
            where = directory.path / STAGED
        self.drop(job)
        return [f"removed {where}, fetched for a restore that ended"] if present else []

    @contextmanager
    def _folder(self, job: str) -> Iterator[Directory]:
        with self._jobs.create(job) as directory:
            try:
                folder = directory.child(STAGED, create=True)
            except OSError as error:
                raise storage_error(str(directory.path / STAGED), 4096, error) from error
            with folder:
                yield folder


def _checked_units(
    job: str, snapshot: SnapshotId, rank: int, image_bytes: int, unit_ranges: Iterable[range]
) -> list[range]:
    where = f"{ShardId(snapshot, rank)} of job {checked_name('job', job)}, to be staged"
    if not (0 <= rank < MAX_RANKS and 0 <= image_bytes <= MAX_IMAGE_BYTES):
        raise FormatInvalid(where, f"rank {rank} with {image_bytes} bytes is not possible")
    units = _merged(unit_ranges)
    if units and not (0 <= units[0].start and units[-1].stop <= unit_count(image_bytes)):
        raise FormatInvalid(where, f"units {units} are not all in its {image_bytes} bytes")
    return units


def staged_name(snapshot: SnapshotId, rank: int) -> str:
    """The file name of a staged shard."""
    return f"inc-{snapshot.incarnation:06d}-step-{snapshot.step:012d}-{rank_stem(rank)}.image"


def _byte_range(units: range, image_bytes: int) -> tuple[int, int]:
    """Offset and length of some units; the image's last one may be short."""
    offset = units.start * UNIT_BYTES
    return offset, min(units.stop * UNIT_BYTES, image_bytes) - offset


def _merged(ranges: Iterable[range]) -> list[range]:
    """The same units, in order, none twice."""
    found: list[range] = []
    for one in sorted((one for one in ranges if one), key=lambda one: (one.start, one.stop)):
        assert one.step == 1, one
        start = max(one.start, found[-1].stop) if found else one.start
        if start < one.stop:
            found.append(range(start, one.stop))
    return found
