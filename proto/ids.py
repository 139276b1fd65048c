"""Names and numbers that cross processes and become paths.

Owns the one spelling of each id, as text and as a path component, and the check that a name
received from outside is harmless. Promises that nothing accepted here can leave the directory it
is joined to. Does not know what the ids refer to.
"""

import re
from dataclasses import dataclass

from everstep.proto.errors import InvalidName

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_STEP_DIRECTORY = re.compile(r"step-(\d{12,20})")
MAX_RANKS = 1 << 20
UNIT_BYTES = 1 << 20
"""The piece of a shard that is digested, sent, verified and repaired."""


def checked_name(kind: str, name: str) -> str:
    """Return `name` if it is a valid job or node name.

    Args:
        kind: What is being named, for the message ("job", "node").
        name: The name as the user or a peer gave it.

    Raises:
        InvalidName: If it does not match ``[A-Za-z0-9._-]{1,128}`` or starts with a dot.
    """
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise InvalidName(kind, name)
    return name


@dataclass(frozen=True, slots=True, order=True)
class SnapshotId:
    """One step of one incarnation. Orders by incarnation first: a later incarnation may repeat
    the steps of an earlier one, and then supersedes them."""

    incarnation: int
    step: int

    def __str__(self) -> str:
        return f"step {self.step} (incarnation {self.incarnation})"


@dataclass(frozen=True, slots=True, order=True)
class ShardId:
    """One rank's part of a snapshot."""

    snapshot: SnapshotId
    rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.snapshot}"


def step_directory(step: int) -> str:
    """The directory name of a step on a durable level, e.g. ``step-000000001234``."""
    return f"step-{step:012d}"


def parse_step_directory(name: str) -> int | None:
    """The step that a directory name spells, or None for any other name."""
    match = _STEP_DIRECTORY.fullmatch(name)
    return int(match[1]) if match else None


def rank_stem(rank: int) -> str:
    """The stem of a rank's file names, e.g. ``rank-00003``."""
    return f"rank-{rank:05d}"
