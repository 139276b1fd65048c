"""Which processes make up a job's present incarnation, as the coordinator decides it.

Owns the rule by which a trainer that attaches on any node is given its incarnation: the one rule of
`agent.state`, over all nodes' reports instead of one node's memory. Promises that every rank of a
launch gets the same number, that a number is never used again as far as any live node remembers,
and that a process which lost its rank is told so. A rank is taken over live, within the running
incarnation, only where its last process cannot come back: it is gone, or its node has lost its
place. What was decided and not reported yet is remembered here. Pure: does no I/O and reads no
clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from everstep.agent.agreements import Agreements, Participants
from everstep.agent.coordination import Coordination
from everstep.agent.events import Caller, Declare
from everstep.agent.joining import other_world
from everstep.agent.tables import JobTable
from everstep.proto.errors import Refused, StaleIncarnation

_UNDER_WAY = 4
"""After so many reports of its node a process that was given its rank is named, or gone."""


class RankHeld(Refused):
    """The rank's process is attached on a live node: maybe it is only just dying."""

    def __init__(self, job: str, rank: int, node_id: str, *, silent: bool = False) -> None:
        self.job = job
        self.rank = rank
        self.node_id = node_id
        what = f"is held by a process on {node_id} that is attached"
        advice = "End that process, or give this one another rank."
        if silent:
            what = f"may be held by a process on {node_id}, which does not answer"
            advice = f"Start the agent on {node_id} again, or one that replaces {node_id}."
        super().__init__(f"rank {rank} of job {job!r} {what}. Nothing was changed. {advice}")


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a rank."""

    node_id: str
    process_id: str
    attached: bool
    reported: bool = False
    """Whether its node has named it: if that node does no longer, the process is gone."""
    sequence: int | None = None
    """Of its node's last report when this was decided; None if the node has named it since."""


@dataclass(slots=True)
class _Launch:
    """One incarnation as decided here."""

    incarnation: int
    world: int
    launch_id: str
    members: dict[int, Holder] = field(default_factory=dict)
    agreements: Agreements = field(default_factory=Agreements)
    joined: dict[int, str] = field(default_factory=dict)
    """By rank, the process that has taken it over live."""


class Assembly:
    """All jobs' present incarnations, for one term of a coordinator."""

    def __init__(self, coordination: Coordination) -> None:
        self._coordination = coordination
        self._term = coordination.term
        self._launches: dict[str, _Launch] = {}

    def join(
        self,
        node_id: str,
        caller: Caller,
        launch_id: str,
        live: frozenset[str],
        *,
        joins_live: bool = False,
        silent: frozenset[str] = frozenset(),
    ) -> int:
        """The incarnation that a process belongs to.

        Args:
            node_id: Where it runs.
            caller: The process; its incarnation is 0 if it belongs to none yet.
            launch_id: Of the launch, where the launcher names it.
            live: The nodes that are not suspected.
            joins_live: Whether it takes its rank over without ending the incarnation, if any other
                rank of it runs.
            silent: The nodes that are suspected, and have not lost their places.

        Raises:
            StaleIncarnation: If it belonged to one that has ended.
            RankHeld: If another process holds the rank.
            Refused: If it would join a running incarnation with another world size.
        """
        launch = self._present(caller, launch_id)
        unknown = caller.rank not in launch.members
        holder = launch.members.get(caller.rank)
        if holder is not None and holder.process_id == caller.process_id:
            holder = None  # it attaches again
        if caller.incarnation:
            if caller.incarnation < launch.incarnation or (
                holder is not None and caller.incarnation == launch.incarnation
            ):
                raise StaleIncarnation(caller.job, caller.incarnation, launch.incarnation)
            launch.incarnation = caller.incarnation
        else:
            if holder is not None and holder.attached and holder.node_id in live:
                raise RankHeld(caller.job, caller.rank, holder.node_id)
            if joins_live and _runs(launch, caller.rank, live):
                self._join_live(launch, caller, holder, silent)
            else:
                launched_anew = bool(launch_id) and launch_id != launch.launch_id
                other = not launch.members or launch.world != caller.world or launched_anew
                # Every rank had a part in what is committed. Its node was lost with all memory of
                # the process that had: this is the first of the next launch. Let in here, it could
                # have restored before the others come and end this incarnation.
                over = unknown and self._has_committed(caller.job, launch)
                if other or over or holder is not None:
                    launch = self._begin(caller, launch_id)
        sequence = self._coordination.reported.get(node_id, 0)
        launch.members[caller.rank] = Holder(
            node_id, caller.process_id, attached=True, sequence=sequence
        )
        self._launches[caller.job] = launch
        self._coordination.begun(caller.job, launch.incarnation, launch.world, launch.launch_id)
        return launch.incarnation

    def _join_live(
        self, launch: _Launch, caller: Caller, holder: Holder | None, silent: frozenset[str]
    ) -> None:
        if launch.world != caller.world:
            raise other_world(caller.job, caller.rank, caller.world, launch.world)
        # On a node that comes back its last process would go on, as the same rank.
        if holder is not None and holder.attached and holder.node_id in silent:
            raise RankHeld(caller.job, caller.rank, holder.node_id, silent=True)
        if holder is None and silent and caller.rank not in launch.members:
            raise RankHeld(caller.job, caller.rank, min(silent), silent=True)
        # What is committed was so before this process came: it asks for the first time.
        if holder is not None or self._has_committed(caller.job, launch):
            launch.joined[caller.rank] = caller.process_id

    def _has_committed(self, job: str, launch: _Launch) -> bool:
        """Whether every rank has had a part in this incarnation."""
        table = self._coordination.jobs.get(job)
        return table is not None and any(
            snapshot.incarnation == launch.incarnation
            and self._coordination.is_committed(job, snapshot)
            for snapshot in table.snapshots
        )

    def launch_id(self, job: str) -> str:
        """Of the present incarnation."""
        return self._launches[job].launch_id

    def has_joined(self, caller: Caller) -> bool:
        """Whether a process has taken its rank over live."""
        launch = self._launches[caller.job]
        return launch.joined.get(caller.rank) == caller.process_id

    def agreed(self, caller: Caller, group: Participants = ()) -> tuple[str, ...] | None:
        """The replicated leaves that a group's ranks agreed on last, if this term knows.

        Raises:
            StaleIncarnation: If the caller's incarnation is over.
        """
        return self._launch_of(caller).agreements.names(group)

    def declare(self, event: Declare) -> tuple[int, ...] | None:
        """A rank names its replicated leaves; see `everstep.agent.agreements`.

        Raises:
            StaleIncarnation: If its incarnation is over.
        """
        launch = self._launch_of(event.caller)
        self._launches[event.caller.job] = launch
        return launch.agreements.declare(event, launch.world)

    def undeclared(self, event: Declare) -> tuple[int, ...]:
        """The ranks that have not declared yet in a round, of those that must."""
        launch = self._launches.get(event.caller.job)
        if launch is None:
            return ()
        return launch.agreements.undeclared(event.participants, event.round, launch.world)

    def _launch_of(self, caller: Caller) -> _Launch:
        launch = self._present(caller, "")
        if caller.incarnation != launch.incarnation:
            raise StaleIncarnation(caller.job, caller.incarnation, launch.incarnation)
        return launch

    def _present(self, caller: Caller, launch_id: str) -> _Launch:
        """The job's incarnation as decided here or, if that is newer, as the nodes report it."""
        if self._term != self._coordination.term:
            self._term = self._coordination.term
            self._launches.clear()
        known = self._launches.get(caller.job)
        table = self._coordination.jobs.get(caller.job)
        if table is None:
            table = JobTable(world=caller.world, launch_id=launch_id)
        if known is None or table.incarnation > known.incarnation:
            known = _Launch(table.incarnation, table.world, table.launch_id)
        _take_over(known, table, self._coordination.reported)
        return known

    def _begin(self, caller: Caller, launch_id: str) -> _Launch:
        table = self._coordination.jobs.get(caller.job)
        known = self._launches.get(caller.job)
        numbers = [
            known.incarnation if known is not None else 0,
            table.newest_incarnation if table is not None else 0,
            table.incarnation if table is not None else 0,
        ]
        return _Launch(max(numbers) + 1, caller.world, launch_id)


def _runs(launch: _Launch, rank: int, live: frozenset[str]) -> bool:
    """Whether any other rank is there to be joined."""
    return any(
        holder.attached and holder.node_id in live
        for other, holder in launch.members.items()
        if other != rank
    )


def _take_over(launch: _Launch, table: JobTable, reported: Mapping[str, int]) -> None:
    """What the nodes report of the incarnation's processes is newer than what was decided."""
    for rank, holder in launch.members.items():
        fact = table.facts.get(holder.node_id)
        named = fact.members if fact is not None else ()
        known = any(member.process_id == holder.process_id for member in named)
        if holder.attached and not known and _is_outlived(holder, reported):
            # Its node was started anew, and remembers nothing of it.
            launch.members[rank] = replace(holder, attached=False)
    for node_id, fact in table.facts.items():
        if fact.incarnation != launch.incarnation:
            continue
        for member in fact.members:
            holder_now = launch.members.get(member.rank)
            # A report from before the rank was given to a process says nothing of it.
            if holder_now is None or (
                holder_now.process_id == member.process_id
                and reported.get(node_id) != holder_now.sequence
            ):
                launch.members[member.rank] = Holder(
                    node_id, member.process_id, member.attached, reported=True
                )


def _is_outlived(holder: Holder, reported: Mapping[str, int]) -> bool:
    """Whether a node that does not name a process must have, if it were still there."""
    sequence = reported.get(holder.node_id)
    if sequence is None:
        return False
    if holder.sequence is None:
        return holder.reported
    # Some reports may have been under way when it was decided; another agent counts anew.
    return not holder.sequence <= sequence < holder.sequence + _UNDER_WAY
