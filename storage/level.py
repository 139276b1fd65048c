"""The contract of a level: one place where copies of shards live.

Owns the common face of every level, in words, and the few values that pass through it. The suite
in tests/contract/test_level.py holds every level to it. Levels differ in what a committed
snapshot survives: see each level's own module.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from everstep.proto.ids import SnapshotId
from everstep.storage.mapping import unmap


@dataclass(frozen=True, slots=True)
class Problem:
    """Something stored that cannot be used; found while listing."""

    where: str
    """The file."""
    reason: str
    """What is wrong with it, for the user."""


@dataclass(slots=True)
class ShardImage:
    """A shard's bytes, mapped on demand. Use as a context manager: leaving it unmaps.

    The bytes have not been verified against their digests; `Level.verify` does that.
    """

    image: memoryview
    """The safetensors image, read-only."""
    record: bytes
    """The record's plain envelope; empty for a slot without one."""
    path: Path
    """The file that holds the image, for processes that map it themselves."""
    offset: int
    """Where in that file the image starts."""
    mapping: mmap.mmap | None = field(default=None, repr=False)
    """What `image` looks at; None for an empty image."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.image.release()
            if self.mapping is not None:
                unmap(self.mapping)
        except BufferError:
            # A view of it is still held somewhere, at worst by a traceback. The mapping goes
            # when the last view does; failing here would hide what happened in the block.
            pass


class Level(Protocol):
    """A place where copies of shards live.

    All methods may be called from any thread. Two threads must not write the same shard, nor
    write and delete the same snapshot. Every method that takes a job raises `InvalidName` for a
    name that is not harmless as a path component.
    """

    @property
    def name(self) -> str:
        """``memory`` or ``nvme``, as in configuration and messages."""

    def jobs(self) -> list[str]:
        """The jobs that have anything here, sorted."""

    def put_layout(self, job: str, layout_id: str, envelope: bytes) -> None:
        """Store a layout under the digest of its body. Doing so again is a no-op, and replaces
        a damaged one.

        Raises:
            FormatInvalid: If `layout_id` is not the BLAKE2b-128 of the body, in hex.
            OutOfSpace: If it does not fit.
            WriteFailed: If the device fails.
        """

    def layout(self, job: str, layout_id: str) -> bytes:
        """The plain envelope of a layout, verified against its id.

        Raises:
            FormatInvalid: If it is missing or damaged.
        """

    def snapshots(self, job: str) -> list[SnapshotId]:
        """The complete snapshots, oldest first: by incarnation, then by step.

        Unreadable things are left out, and are in `problems`. An unknown job has none.
        """

    def ranks(self, job: str, snapshot: SnapshotId) -> list[int]:
        """The ranks whose shard of this snapshot is here, complete or not, sorted."""

    def begin(self, job: str, snapshot: SnapshotId) -> None:
        """Make room for a snapshot, before the first `store` of it.

        Leftovers of an earlier attempt at this step are cleared; committed snapshots stay
        readable until this one is committed.

        Raises:
            OutOfSpace: If there is no room even for a directory.
            WriteFailed: If the device fails.
        """

    def store(
        self, job: str, snapshot: SnapshotId, rank: int, image: memoryview, record: bytes
    ) -> None:
        """Store one shard, verified against its digests on the way; safe once this returns.

        Storing the same shard again is allowed and leaves the same bytes.

        Args:
            job: The job.
            snapshot: The snapshot; `begin` was called for it.
            rank: The rank.
            image: The image. Must not change while this runs.
            record: The record's plain envelope.

        Raises:
            ShardCorrupt: If units of `image` do not match the record. Nothing was stored.
            FormatInvalid: If the record is unreadable or of another shard. Nothing was stored.
            OutOfSpace: If it does not fit. Nothing was stored.
            WriteFailed: If the device fails. Nothing was stored.
        """

    def commit(self, job: str, snapshot: SnapshotId, commit: bytes) -> None:
        """Make a snapshot appear in `snapshots`. All shards to be held here were stored before.

        Args:
            job: The job.
            snapshot: The snapshot.
            commit: The commit's envelope.

        Raises:
            FormatInvalid: If what is stored here is not what the commit says, or a layout it
                needs is missing. Nothing was committed.
            OutOfSpace: If it does not fit.
            WriteFailed: If the device fails.
        """

    def open_shard(self, job: str, snapshot: SnapshotId, rank: int) -> ShardImage:
        """Map one shard of a complete snapshot.

        Raises:
            FormatInvalid: If it is missing, damaged, of the wrong length or of another shard.
        """

    def verify(self, job: str, snapshot: SnapshotId, rank: int) -> Sequence[int]:
        """The units of a shard that do not match their digest or cannot be read; empty if whole.

        Raises:
            FormatInvalid: As `open_shard`, and for a shard without digests.
        """

    def delete(self, job: str, snapshot: SnapshotId) -> None:
        """Remove a snapshot; it stops being complete first. Removing none is a no-op.

        Raises:
            WriteFailed: If the device fails; what is left of it goes with the next `sweep`.
        """

    def remove_job(self, job: str) -> None:
        """Remove everything of a job. Removing none is a no-op."""

    def sweep(self, job: str) -> list[str]:
        """Clear what interrupted writes left behind, and say what was done.

        Only at a start, before anything writes to this job: a write under way looks like a
        leftover.
        """

    def problems(self, job: str) -> list[Problem]:
        """What is stored of this job and cannot be used. Never raises for a bad file."""
