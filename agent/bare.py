"""Directories of snapshots, looked at without an agent.

Owns recognising a directory (a level's root, a job, a step) and listing what it holds. Promises to
read only, and that one unreadable file hides no other. What it finds while an agent writes there
may be out of date a moment later.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from everstep.agent.asking import unknown_job
from everstep.agent.shards import Store
from everstep.proto.agent_pb2 import StatusReply
from everstep.proto.errors import EverstepError, InvalidName, Refused
from everstep.proto.ids import SnapshotId, checked_name, parse_step_directory
from everstep.proto.state_pb2 import Record
from everstep.snapshot.record import open_record
from everstep.storage.arena import MemoryLevel
from everstep.storage.level import Problem
from everstep.storage.nvme import NvmeLevel

_ASIDE = ".superseded-"
_IN_MEMORY_JOB = re.compile(
    r"membership|parity|staged|rank-\d+-g\d+-(s\d+\.arena|slot-\d+\.record)"
)
_RECORD = re.compile(r"rank-(\d{5,7})\.record")


@dataclass(frozen=True, slots=True)
class Held:
    """A snapshot as it is held at one level."""

    job: str
    level: str
    snapshot: SnapshotId
    world: int
    ranks: tuple[int, ...]
    """Those whose shard is here."""
    expected: tuple[int, ...]
    """Those whose shard should be here: with peers, the commit of a node names its own only."""
    bytes: int | None
    unix_s: float | None
    """When it was captured, or, on NVMe, committed."""
    committed: bool


@dataclass(slots=True)
class Place:
    """Levels to look at, and what of them is meant. Use as a context manager."""

    stores: tuple[Store, ...]
    name: str
    """For messages."""
    job: str = ""
    """The one job that was named; empty for all."""
    snapshot: SnapshotId | None = None
    """The one snapshot that was named."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as stack:
            for store in self.stores:
                if isinstance(store, NvmeLevel):
                    stack.callback(store.close)

    def jobs(self) -> list[str]:
        """The jobs that are meant, sorted."""
        found = {job for store in self.stores for job in store.jobs()}
        return sorted(job for job in found if self.job in ("", job))

    def one_job(self) -> str:
        """The only job that is meant.

        Raises:
            Refused: If there are several or none.
        """
        jobs = self.jobs()
        if len(jobs) != 1:
            names = ", ".join(jobs) or "none"
            raise Refused(f"{self.name} has these jobs: {names}. Name one with --job.")
        return jobs[0]

    def at(self, level: str) -> "Place":
        """The same place, with only one of its levels; all if `level` is empty.

        Raises:
            Refused: If it has no such level.
        """
        kept = tuple(store for store in self.stores if level in ("", store.name))
        if not kept:
            names = ", ".join(store.name for store in self.stores)
            raise Refused(f"{self.name} has no level {level!r}, only: {names}.")
        return Place(kept, self.name, self.job, self.snapshot)


def place_of(path: Path, job: str = "") -> Place:
    """What a directory is: a level's root, a job in it, or a step of a job.

    Args:
        path: The directory; also a directory with a level's root in it, as EVERSTEP_HOME is.
        job: Only this job of it.

    Raises:
        Refused: If it is nothing of Everstep's, or lacks the job.
    """
    if job:
        checked_name("job", job)
    try:
        place = _recognised(path.resolve())
    except PermissionError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): ask as its owner.") from error
    if place.job and job not in ("", place.job):
        raise Refused(f"{path} belongs to job {place.job!r}, not to {job!r}.")
    known = place.jobs()
    if job and job not in known:
        raise unknown_job(job, known, str(path))
    place.job = place.job or job
    return place


def _recognised(path: Path) -> Place:
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise Refused(f"{path} {what}. Name an nvme or memory directory, or a job in one.")
    step = parse_step_directory(path.name.removeprefix(_ASIDE))
    if step is not None and _is_job(path.parent):
        return _step_place(path, step)
    kind = _kind_of_job(path)
    if kind and _is_name(path.name):
        return Place((_store(kind, path.parent),), str(path), job=path.name)
    for root in (path, path / "nvme"):
        kinds = [_kind_of_job(job) for job in _job_directories(root)]
        kind = next((kind for kind in kinds if kind), "")
        if kind:
            return Place((_store(kind, root),), str(root))
    raise Refused(
        f"{path} holds nothing of Everstep's: it is neither an nvme or memory directory, nor a "
        "job in one. `everstep status` shows the directories of a running agent."
    )


def _step_place(path: Path, step: int) -> Place:
    store = NvmeLevel(path.parent.parent)
    job = path.parent.name
    named = [snapshot for snapshot in store.snapshots(job) if snapshot.step == step]
    if not named:
        raise Refused(f"{path} was never committed, or its commit is damaged: see `everstep list`.")
    snapshot = named[0] if path.name.startswith(_ASIDE) else named[-1]
    return Place((store,), str(path), job, snapshot)


def _store(kind: str, root: Path) -> Store:
    return MemoryLevel(root, keep_free_bytes=0) if kind == "memory" else NvmeLevel(root)


def _is_job(path: Path) -> bool:
    return bool(_kind_of_job(path)) and _is_name(path.name)


def _is_name(name: str) -> bool:
    try:
        checked_name("job", name)
    except InvalidName:
        return False
    return True


def _job_directories(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _is_name(path.name) and path.is_dir())


def _kind_of_job(path: Path) -> str:
    """The level that a job's directory is of; empty if it is no job's directory."""
    names = [entry.name for entry in path.iterdir()]
    if any(_IN_MEMORY_JOB.fullmatch(name) for name in names):
        return "memory"
    steps = any(parse_step_directory(name.removeprefix(_ASIDE)) is not None for name in names)
    return "nvme" if steps or "layouts" in names else ""


def place_of_agent(status: StatusReply, address: str, job: str = "") -> Place:
    """The directories of a running agent, which lie on this host.

    Raises:
        Refused: If this user may not read them.
    """
    stores: list[Store] = []
    for kind, directory in (("memory", status.memory_dir), ("nvme", status.nvme_dir)):
        if not directory or not Path(directory).is_dir():
            continue
        try:
            next(Path(directory).iterdir(), None)
        except PermissionError as error:
            raise Refused(
                f"{directory} cannot be read ({error.strerror}): run this as the user of agent "
                f"{status.node_id}, pid {status.pid}."
            ) from error
        stores.append(_store(kind, Path(directory)))
    return Place(tuple(stores), f"the agent at {address}", job)


def held(place: Place) -> Iterator[Held]:
    """Every snapshot of the meant jobs, by job, level, incarnation and step."""
    for job in place.jobs():
        for store in place.stores:
            found = (
                _in_memory(store, job) if isinstance(store, MemoryLevel) else _on_disk(store, job)
            )
            for one in sorted(found, key=lambda one: one.snapshot):
                if place.snapshot in (None, one.snapshot):
                    yield one


def held_by_agent(status: StatusReply, address: str) -> list[Held]:
    """What an agent says it holds; sizes and times on NVMe are read from its directories, and
    are missing where this user may not."""
    try:
        with place_of_agent(status, address) as place:
            found = {(one.job, one.level, one.snapshot): one for one in held(place)}
    except Refused:
        found = {}
    rows = []
    for job in status.jobs:
        for told in job.snapshots:
            snapshot = SnapshotId(told.incarnation, told.step)
            read = found.get((job.job, told.level, snapshot))
            rows.append(
                Held(
                    job.job,
                    told.level,
                    snapshot,
                    read.world if read else max(job.world, len(told.sealed_ranks)),
                    tuple(told.sealed_ranks),
                    tuple(told.sealed_ranks),
                    told.bytes or (read.bytes if read else None),
                    told.captured_unix_s or (read.unix_s if read else None),
                    told.committed,
                )
            )
    return rows


def problems(place: Place) -> list[Problem]:
    """What lies there and cannot be used, images not looked at."""
    return [
        problem for job in place.jobs() for store in place.stores for problem in store.problems(job)
    ]


def _in_memory(store: MemoryLevel, job: str) -> Iterator[Held]:
    shards: defaultdict[SnapshotId, dict[int, Record]] = defaultdict(dict)
    for one in store.records(job):
        shards[one.snapshot][one.rank] = one.record
    for snapshot, records in shards.items():
        world = max(record.world for record in records.values())
        yield Held(
            job,
            store.name,
            snapshot,
            world,
            tuple(sorted(records)),
            tuple(range(world)) if len(records) == world else tuple(sorted(records)),
            sum(record.image_bytes for record in records.values()),
            max(record.captured_unix_s for record in records.values()),
            len(records) == world,
        )


def _on_disk(store: NvmeLevel, job: str) -> Iterator[Held]:
    committed = set()
    for commit in store.commits(job):
        snapshot = SnapshotId(commit.incarnation, commit.step)
        committed.add(commit.step)
        ranks = store.ranks(job, snapshot)
        here = set(ranks)
        yield Held(
            job,
            store.name,
            snapshot,
            commit.world,
            tuple(ranks),
            tuple(sorted(shard.rank for shard in commit.shards)),
            sum(shard.image_bytes for shard in commit.shards if shard.rank in here),
            commit.committed_unix_s,
            True,
        )
    directory = store.root / job
    # A job that is in memory alone has none; and it may go at any time.
    with suppress(FileNotFoundError):
        yield from _begun(store, job, sorted(directory.iterdir()), committed)


def _begun(store: NvmeLevel, job: str, paths: list[Path], committed: set[int]) -> Iterator[Held]:
    for path in paths:
        step = parse_step_directory(path.name)
        if step is not None and step not in committed and not (path / "commit").exists():
            yield from _unfinished(store, job, path)


def _unfinished(store: NvmeLevel, job: str, path: Path) -> Iterator[Held]:
    """A step directory without a commit: a flush under way, or one that never ended."""
    records = []
    for file in sorted(path.iterdir()):
        if _RECORD.fullmatch(file.name):
            try:
                records.append(open_record(file.read_bytes(), str(file)))
            except (EverstepError, OSError):
                continue
    if records:
        yield Held(
            job,
            store.name,
            SnapshotId(records[0].incarnation, records[0].step),
            records[0].world,
            tuple(sorted(record.rank for record in records)),
            tuple(sorted(record.rank for record in records)),
            sum(record.image_bytes for record in records),
            max(record.captured_unix_s for record in records),
            False,
        )


def problems_of_agent(status: StatusReply, level: str = "") -> list[Problem]:
    """What lies in an agent's directories, of the jobs in `status`, and cannot be used.

    None if they cannot be read. Looks twice: the agent writes and deletes meanwhile, and what is
    only on its way is gone at the second look.
    """
    try:
        with place_of_agent(status, "") as place:
            there = place.at(level)
            first, second = _of(status, there), _of(status, there)
            return [problem for problem in first if problem in second]
    except (Refused, OSError):
        return []


def _of(status: StatusReply, place: Place) -> list[Problem]:
    return [
        problem
        for job in status.jobs
        for problem in problems(Place(place.stores, place.name, job.job))
    ]
