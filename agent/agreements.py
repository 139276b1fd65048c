"""What groups of ranks have agreed on as their replicas, and who has not declared yet.

Owns the rounds of comparing: in each, the ranks of one group name their candidates with digests,
and what is byte for byte equal on all of them is agreed. Promises that groups do not wait for each
other, that a late declaration does not end a newer round of its group, and that no rank makes this
remember more than `GROUPS_A_RANK` groups. Pure: does no I/O and reads no clock.
"""

from dataclasses import dataclass, field

from everstep.agent.events import Declare

GROUPS_A_RANK = 16
"""Groups with a rank in them that are remembered; with another one the oldest is forgotten."""

Participants = tuple[int, ...]
"""The ranks of a group, ascending; none for all ranks of the world."""


@dataclass(slots=True)
class _Round:
    """What the ranks of one group have said in its newest round."""

    number: int
    candidates: dict[int, tuple[str, ...]] = field(default_factory=dict)
    digests: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    """The leaves that were agreed on last, in this round or in one before."""

    def equal(self) -> tuple[int, ...]:
        """Indices of the candidates that are byte for byte equal on all ranks."""
        if len(set(self.candidates.values())) != 1:
            return ()
        columns = zip(*self.digests.values(), strict=True)
        return tuple(index for index, column in enumerate(columns) if len(set(column)) == 1)


class Agreements:
    """All groups of one incarnation of a job."""

    def __init__(self) -> None:
        self._rounds: dict[Participants, _Round] = {}

    def __len__(self) -> int:
        """How many groups are remembered."""
        return len(self._rounds)

    def clear(self) -> None:
        """Another incarnation begins."""
        self._rounds.clear()

    def declare(self, event: Declare, world: int) -> tuple[int, ...] | None:
        """Take note of a rank's replicas.

        Args:
            event: What it says; its rank is one of the participants.
            world: How many ranks there are.

        Returns:
            Indices of the agreed candidates once all participants have spoken; None before, and if
            it comes late: the group is past this round.
        """
        rank, group = event.caller.rank, event.participants
        known = self._rounds.get(group)
        if known is not None and known.number > event.round:
            return None
        if known is None or known.number < event.round:
            self._make_room(rank, group)
            known = _Round(event.round, names=known.names if known is not None else None)
            self._rounds[group] = known
        # Most say the same: thousands of names are kept once.
        same = next(iter(known.candidates.values()), event.candidates)
        known.candidates[rank] = same if same == event.candidates else event.candidates
        known.digests[rank] = event.digests
        if len(known.candidates) < (len(group) or world):
            return None
        agreed = known.equal()
        known.names = tuple(event.candidates[index] for index in agreed)
        return agreed

    def names(self, group: Participants) -> tuple[str, ...] | None:
        """The replicated leaves that a group agreed on last; None if that is not known."""
        known = self._rounds.get(group)
        return known.names if known is not None else None

    def undeclared(self, group: Participants, number: int, world: int) -> tuple[int, ...]:
        """The ranks of a group that have not declared yet in a round."""
        known = self._rounds.get(group)
        said = known.candidates if known is not None and known.number == number else {}
        return tuple(rank for rank in group or range(world) if rank not in said)

    def _make_room(self, rank: int, group: Participants) -> None:
        """Forget what the group had, and the oldest of too many groups with this rank."""
        self._rounds.pop(group, None)
        mine = [other for other in self._rounds if not other or rank in other]
        for oldest in mine[: max(0, len(mine) - GROUPS_A_RANK + 1)]:
            del self._rounds[oldest]
