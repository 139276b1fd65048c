"""Are the bytes that are held the bytes that were captured?

Owns `everstep verify`: through an agent and all its peers, or on directories alone. Promises to
look at every committed shard that was asked for, and to say for each job with damage what can
still be restored; to change nothing, unless the agents are asked to repair. A shard that its
snapshot needs and that is not there counts as damaged.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from everstep.agent.asking import Agent, unknown_job
from everstep.agent.bare import Held, Place, held, problems, problems_of_agent
from everstep.agent.display import Meter
from everstep.agent.shards import Store, locate, problem_of
from everstep.proto.agent_pb2 import StatusReply, VerifiedShard
from everstep.proto.errors import EverstepError, NothingRecoverable
from everstep.proto.ids import SnapshotId
from everstep.proto.peer_pb2 import Examined, ExamineRequest, JobOverview
from everstep.storage.level import Problem
from everstep.storage.parity import parity_bytes

if TYPE_CHECKING:
    from everstep.agent.bare_nodes import BareNode, BareNodes
    from everstep.agent.planning import Erasure


@dataclass(frozen=True, slots=True)
class Checked:
    """A copy of a shard, looked at."""

    job: str
    level: str
    snapshot: SnapshotId
    rank: int
    bytes: int
    problem: str
    """Empty if it is intact."""
    node_id: str = ""
    """Where there are several."""
    parity: bool = False
    """Whether it is a node's parity, of no rank."""
    repaired: bool = False
    """Whether the problem is mended."""
    repair_problem: str = ""


@dataclass(frozen=True, slots=True)
class Usable:
    """A snapshot of which every rank has an intact copy."""

    job: str
    snapshot: SnapshotId
    levels: tuple[str, ...]
    """Where from; several if it takes copies of several levels; empty if nobody said."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification found."""

    checked: list[Checked]
    problems: list[Problem]
    """Files that cannot be used, beyond the shards in `checked`."""
    left: tuple[Usable, ...] | None = None
    """What can be recovered, where parity and several nodes have a say in it."""
    unexamined: tuple[tuple[str, str], ...] = ()
    """Nodes that failed to answer, with the reason."""
    silent: tuple[str, ...] = ()
    """Nodes that count as lost: what they hold cannot be looked at."""

    @property
    def damaged(self) -> list[Checked]:
        """The copies that are not intact, and were not made so."""
        return [one for one in self.checked if one.problem and not one.repaired]

    @property
    def repaired(self) -> list[Checked]:
        """The copies that were damaged and are intact again."""
        return [one for one in self.checked if one.repaired]

    @property
    def intact(self) -> bool:
        """Whether nothing at all is wrong any more."""
        return not self.damaged and not self.problems and not self.unexamined

    def usable(self) -> list[Usable]:
        """The snapshots that can be restored whole from what was looked at, newest first."""
        if self.left is not None:
            return list(self.left)
        by_snapshot: dict[tuple[str, SnapshotId], dict[int, list[str]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for one in self.checked:
            intact = by_snapshot[one.job, one.snapshot][one.rank]
            if not one.problem:
                intact.append(one.level)
        return [
            Usable(job, snapshot, _fewest_levels(ranks.values()))
            for (job, snapshot), ranks in sorted(by_snapshot.items(), reverse=True)
            if all(ranks.values())
        ]


def _fewest_levels(ranks: Iterable[list[str]]) -> tuple[str, ...]:
    """One level that has all ranks if there is one, else all that are needed."""
    sets = [set(levels) for levels in ranks]
    common = set.intersection(*sets)
    return tuple(sorted(common)) if common else tuple(sorted(set.union(*sets)))


def by_agent(
    agent: Agent, status: StatusReply, step: int | None, level: str, meter: Meter
) -> Verdict:
    """Have the agent check what it holds, one step and level at a time.

    Raises:
        NothingRecoverable: If a step was named that no level has.
    """
    jobs = [
        (job.job, {(s.step, s.level): s.bytes for s in job.snapshots if s.committed})
        for job in status.jobs
    ]
    wanted = [
        (job, one_step, one_level, size)
        for job, found in jobs
        for (one_step, one_level), size in sorted(found.items())
        if step in (None, one_step) and level in ("", one_level)
    ]
    _require(wanted, step, ", ".join(job for job, _ in jobs), f"the agent at {agent.address}")
    checked = []
    for job, one_step, one_level, size in wanted:
        with meter(f"checking {job}, step {one_step}, {one_level}", size) as advance:
            for found in agent.verify(job, one_step, one_level, size or _UNKNOWN_BYTES):
                checked.append(_told(found))
                advance(found.bytes)
    found_problems = problems_of_agent(status, level)
    return Verdict(checked, list(_untold(found_problems, checked)))


def by_cluster(
    agent: Agent, job: str, step: int | None, level: str, meter: Meter, *, repair: bool
) -> Verdict:
    """Have all nodes check what they hold, and mend it if asked.

    Raises:
        NothingRecoverable: If a step was named that no node has.
        Refused: If no node knows the job.
    """
    request = ExamineRequest(job=job, step=step, levels=[level] if level else [], repair=repair)
    told = iter(agent.examine(request))
    checked: list[Checked] = []
    unexamined: list[tuple[str, str]] = []
    left: list[Usable] = []
    problems: list[Problem] = []
    silent: set[str] = set()
    total = next(told)
    with meter("checking all nodes", total.total.bytes) as advance:
        for one in told:
            match one.WhichOneof("kind"):
                case "examined":
                    checked.append(_examined(one.examined))
                    advance(one.examined.bytes)
                case "unexamined":
                    unexamined.append((one.unexamined.node_id, one.unexamined.problem))
                case "outlook":
                    left += _usable(one.outlook)
                    silent |= set(one.outlook.silent)
                    problems += [Problem(one.outlook.job, what) for what in one.outlook.problems]
    if job and not checked and not unexamined:
        known_jobs = [one.job for one in agent.overview().jobs]
        if job not in known_jobs:
            raise unknown_job(job, known_jobs, f"the cluster of the agent at {agent.address}")
    checked.sort(key=lambda c: (c.job, c.snapshot, c.level, c.node_id, c.parity, c.rank))
    return Verdict(
        checked, problems, tuple(left), tuple(sorted(set(unexamined))), tuple(sorted(silent))
    )


def _examined(found: Examined) -> Checked:
    return Checked(
        found.job,
        found.level,
        SnapshotId(found.incarnation, found.step),
        found.rank,
        found.bytes,
        found.problem,
        found.node_id,
        found.parity,
        found.repaired,
        found.repair_problem,
    )


def _usable(outlook: JobOverview) -> Iterator[Usable]:
    for plan in outlook.plans:
        if plan.recoverable:
            yield Usable(outlook.job, SnapshotId(plan.incarnation, plan.step), ())


def by_nodes(nodes: "BareNodes", step: int | None, level: str, meter: Meter) -> Verdict:
    """Check the directories of several nodes, with their parity.

    Raises:
        NothingRecoverable: If a step was named that is not there.
        Refused: If a job was named that is not there.
    """
    checked: list[Checked] = []
    found_problems: list[Problem] = []
    jobs = nodes.jobs()
    for node in nodes.nodes:
        for place in node.places:
            if level and all(store.name != level for store in place.stores):
                continue
            here = Place(place.stores, place.name, nodes.job or place.job, place.snapshot)
            one = by_directory(here, None, meter, whole=False)
            found_problems += one.problems
            checked += [replace(c, node_id=node.node_id) for c in one.checked]
        checked += _parities(node, jobs, level)
    if step is not None:
        checked = [one for one in checked if one.snapshot.step == step]
    _require(checked, step, ", ".join(jobs), nodes.name)
    left = [
        Usable(job, plan.snapshot, plan.levels)
        for job in jobs
        for plan in nodes.plans(job, step=step, erasures=_erasures(checked, job))
        if plan.recoverable
    ]
    return Verdict(checked, found_problems, tuple(left))


def _parities(node: "BareNode", jobs: Sequence[str], level: str) -> Iterator[Checked]:
    for name, store in node.parities():
        for job in jobs if level in ("", name) else ():
            for manifest in store.manifests(job):
                plan = manifest.plan
                try:
                    bad = store.verify(job, plan.plan_id)
                    problem = f"parity {plan.plan_id}: {len(bad)} unit(s) are damaged"
                except (EverstepError, OSError) as error:
                    bad, problem = (0,), str(error)
                snapshot = SnapshotId(plan.incarnation, plan.step)
                size, said = parity_bytes(manifest), problem if bad else ""
                yield Checked(job, name, snapshot, 0, size, said, node.node_id, parity=True)


def _erasures(checked: Iterable[Checked], job: str) -> "list[Erasure]":
    from everstep.agent.planning import Erasure

    return [
        Erasure(one.node_id, one.snapshot, None if one.parity else one.rank, one.level)
        for one in checked
        if one.problem and one.job == job
    ]


_UNKNOWN_BYTES = 64 << 30
"""What a step is taken to hold, for a deadline, when the agent does not say."""


def _told(found: VerifiedShard) -> Checked:
    problem = "" if found.intact else found.problem or "damaged"
    snapshot = SnapshotId(found.incarnation, found.step)
    return Checked(found.job, found.level, snapshot, found.rank, found.bytes, problem)


def by_directory(place: Place, step: int | None, meter: Meter, *, whole: bool = True) -> Verdict:
    """Check every committed shard of a place.

    Args:
        place: What to look at.
        step: Only this step.
        meter: Shows the progress.
        whole: Whether only what is committed here is looked at. Of one node among several nothing
            in memory is, by itself.

    Raises:
        NothingRecoverable: If a step was named that is not there.
    """
    found = [one for one in held(place) if step in (None, one.snapshot.step)]
    there = [one for one in found if one.committed or not whole]
    _require(there, step, ", ".join(place.jobs()), place.name)
    checked = [
        _check(store, one, rank, meter)
        for one in there
        for store in place.stores
        if store.name == one.level
        for rank in one.expected
    ]
    return Verdict(checked, list(_untold(problems(place), checked)))


def _require(found: Sequence[object], step: int | None, jobs: str, where: str) -> None:
    if not found and step is not None:
        raise NothingRecoverable(jobs, (f"step {step} is not committed at {where}",))


def _check(store: Store, one: Held, rank: int, meter: Meter) -> Checked:
    size, problem = 0, ""
    if rank not in one.ranks:
        problem = f"{store.root / one.job}: rank {rank} of {one.snapshot} is missing here"
    try:
        copy = locate(store, one.job, one.snapshot, rank)
    except (EverstepError, OSError) as error:
        problem = problem or str(error)
    else:
        size = copy.record.image_bytes
        with meter(f"checking {one.job}, {copy}", size) as advance:
            problem = problem_of(copy, advance)
    return Checked(one.job, store.name, one.snapshot, rank, size, problem)


def _untold(found: list[Problem], checked: list[Checked]) -> Iterator[Problem]:
    """The problems that no damaged shard has told of already."""
    told = [one.problem for one in checked if one.problem]
    for problem in found:
        if not any(text.startswith(f"{problem.where}: {problem.reason}") for text in told):
            yield problem
