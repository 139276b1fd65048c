"""Which snapshots a level may let go: a pure function from inventory to deletions.

Promises never to name the newest snapshot, nor a pinned one. Does not delete, and does not know
what is damaged: whoever finds that the newest cannot be read pins the one before it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from everstep.proto.errors import InvalidConfiguration
from everstep.proto.ids import SnapshotId


@dataclass(frozen=True, slots=True)
class Rule:
    """What one level keeps."""

    keep_newest: int
    """The newest so many steps; at least one."""
    keep_every_steps: int | None
    """Also every step that is a multiple of this; None for none."""

    def __post_init__(self) -> None:
        if self.keep_newest < 1:
            raise InvalidConfiguration("keep_newest", f"{self.keep_newest} would keep nothing")
        if self.keep_every_steps is not None and self.keep_every_steps < 1:
            raise InvalidConfiguration(
                "keep_every_steps", f"{self.keep_every_steps} is no number of steps"
            )


def expired(
    snapshots: Iterable[SnapshotId], rule: Rule, pinned: set[SnapshotId]
) -> list[tuple[SnapshotId, str]]:
    """The snapshots that a level need not keep, oldest first, each with the reason.

    Args:
        snapshots: The committed ones, in any order.
        rule: What to keep.
        pinned: Those in use, e.g. being restored.
    """
    successors: dict[int, SnapshotId] = {}
    found = []
    for snapshot in sorted(set(snapshots), reverse=True):
        successor = successors.get(snapshot.step)
        if successor is not None:
            reason = f"superseded by {successor}"
        elif len(successors) < rule.keep_newest:
            reason = ""
        elif rule.keep_every_steps and snapshot.step % rule.keep_every_steps == 0:
            reason = ""
        else:
            reason = _reason(rule)
        successors.setdefault(snapshot.step, snapshot)
        if reason and snapshot not in pinned:
            found.append((snapshot, reason))
    return found[::-1]


def _reason(rule: Rule) -> str:
    older = f"older than the newest {rule.keep_newest}"
    if rule.keep_every_steps is None:
        return older
    return f"{older} and no multiple of {rule.keep_every_steps} steps"
