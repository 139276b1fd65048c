"""Are the bytes that are held the bytes that were captured?

Owns `everstep verify`: through an agent, or on directories alone. Promises to change nothing, to
look at every committed shard that was asked for, and to say for each job with damage what can
still be restored. A shard that its snapshot needs and that is not there counts as damaged.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from everstep.agent.asking import Agent
from everstep.agent.bare import Held, Place, held, problems, problems_of_agent
from everstep.agent.display import Meter
from everstep.agent.shards import Store, locate, problem_of
from everstep.proto.agent_pb2 import StatusReply, VerifiedShard
from everstep.proto.errors import EverstepError, NothingRecoverable
from everstep.proto.ids import SnapshotId
from everstep.storage.level import Problem


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


@dataclass(frozen=True, slots=True)
class Usable:
    """A snapshot of which every rank has an intact copy."""

    job: str
    snapshot: SnapshotId
    levels: tuple[str, ...]
    """Where from; several if it takes copies of several levels."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verification found."""

    checked: list[Checked]
    problems: list[Problem]
    """Files that cannot be used, beyond the shards in `checked`."""

    @property
    def damaged(self) -> list[Checked]:
        """The copies that are not intact."""
        return [one for one in self.checked if one.problem]

    @property
    def intact(self) -> bool:
        """Whether nothing at all is wrong."""
        return not self.damaged and not self.problems

    def usable(self) -> list[Usable]:
        """The snapshots that can be restored whole from what was looked at, newest first."""
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


_UNKNOWN_BYTES = 64 << 30
"""What a step is taken to hold, for a deadline, when the agent does not say."""


def _told(found: VerifiedShard) -> Checked:
    problem = "" if found.intact else found.problem or "damaged"
    snapshot = SnapshotId(found.incarnation, found.step)
    return Checked(found.job, found.level, snapshot, found.rank, found.bytes, problem)


def by_directory(place: Place, step: int | None, meter: Meter) -> Verdict:
    """Check every committed shard of a place.

    Raises:
        NothingRecoverable: If a step was named that is not there.
    """
    there = [one for one in held(place) if one.committed and step in (None, one.snapshot.step)]
    _require(there, step, ", ".join(place.jobs()), place.name)
    checked = [
        _check(store, one, rank, meter)
        for one in there
        for store in place.stores
        if store.name == one.level
        for rank in range(one.world)
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
