"""Which processes make up a job's present incarnation, as the coordinator decides it.

Owns the rule by which a trainer that attaches on any node is given its incarnation: the one rule of
`agent.state`, over all nodes' reports instead of one node's memory. Promises that every rank of a
launch gets the same number, that a number is never used again as far as any live node remembers,
and that a process which lost its rank is told so. What was decided and not reported yet is
remembered here. Pure: does no I/O and reads no clock.
"""

from dataclasses import dataclass, field

from everstep.agent.coordination import Coordination
from everstep.agent.events import Caller
from everstep.agent.job import Declaration
from everstep.agent.tables import JobTable
from everstep.proto.errors import Refused, StaleIncarnation


class RankHeld(Refused):
    """The rank's process is attached on a live node: maybe it is only just dying."""

    def __init__(self, job: str, rank: int, node_id: str) -> None:
        self.job = job
        self.rank = rank
        self.node_id = node_id
        super().__init__(
            f"rank {rank} of job {job!r} is held by a process on {node_id} that is attached. "
            "Nothing was changed. End that process, or give this one another rank."
        )


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a rank."""

    node_id: str
    process_id: str
    attached: bool


@dataclass(slots=True)
class _Launch:
    """One incarnation as decided here."""

    incarnation: int
    world: int
    launch_id: str
    members: dict[int, Holder] = field(default_factory=dict)
    declarations: dict[int, Declaration] = field(default_factory=dict)


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
    ) -> int:
        """The incarnation that a process belongs to.

        Args:
            node_id: Where it runs.
            caller: The process; its incarnation is 0 if it belongs to none yet.
            launch_id: Of the launch, where the launcher names it.
            live: The nodes that are not suspected.
            joins_live: Whether it takes its rank over without ending the incarnation.

        Raises:
            StaleIncarnation: If it belonged to one that has ended.
            RankHeld: If another process holds the rank.
        """
        launch = self._present(caller, launch_id)
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
            launched_anew = bool(launch_id) and launch_id != launch.launch_id
            other = not launch.members or launch.world != caller.world or launched_anew
            if other or (holder is not None and not joins_live):
                launch = self._begin(caller, launch_id)
        launch.members[caller.rank] = Holder(node_id, caller.process_id, attached=True)
        self._launches[caller.job] = launch
        self._coordination.begun(caller.job, launch.incarnation, launch.world, launch.launch_id)
        return launch.incarnation

    def launch_id(self, job: str) -> str:
        """Of the present incarnation."""
        return self._launches[job].launch_id

    def declare(
        self,
        caller: Caller,
        number: int,
        candidates: tuple[str, ...],
        digests: tuple[bytes, ...],
    ) -> tuple[int, ...] | None:
        """A rank names its replicated leaves; return the agreed ones once all ranks have.

        Raises:
            StaleIncarnation: If its incarnation is over.
        """
        launch = self._present(caller, "")
        if caller.incarnation != launch.incarnation:
            raise StaleIncarnation(caller.job, caller.incarnation, launch.incarnation)
        self._launches[caller.job] = launch
        if any(known > number for known in launch.declarations):
            return None
        for old in [known for known in launch.declarations if known < number]:
            del launch.declarations[old]
        declaration = launch.declarations.setdefault(number, Declaration())
        declaration.candidates[caller.rank] = candidates
        declaration.digests[caller.rank] = digests
        return declaration.agreed() if len(declaration.candidates) == launch.world else None

    def undeclared(self, job: str, number: int) -> tuple[int, ...]:
        """The ranks that have not declared yet, of those that must."""
        launch = self._launches.get(job)
        if launch is None:
            return ()
        known = launch.declarations.get(number, Declaration())
        return tuple(rank for rank in range(launch.world) if rank not in known.candidates)

    def _present(self, caller: Caller, launch_id: str) -> _Launch:
        """The job's incarnation as decided here or, if that is newer, as the nodes report it."""
        if self._term != self._coordination.term:
            self._term = self._coordination.term
            self._launches.clear()
        known = self._launches.get(caller.job)
        table = self._coordination.jobs.get(caller.job)
        if table is None:
            return known or _Launch(0, caller.world, launch_id)
        if known is None or table.incarnation > known.incarnation:
            known = _Launch(table.incarnation, table.world, table.launch_id)
        _take_over(known, table)
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


def _take_over(launch: _Launch, table: JobTable) -> None:
    """What the nodes report of the incarnation's processes is newer than what was decided."""
    for node_id, fact in table.facts.items():
        if fact.incarnation != launch.incarnation:
            continue
        for member in fact.members:
            known = launch.members.get(member.rank)
            # A report from before the rank was given to another process says nothing.
            if known is None or known.process_id == member.process_id:
                launch.members[member.rank] = Holder(node_id, member.process_id, member.attached)
