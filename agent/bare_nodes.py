"""The directories of several nodes, looked at together, without any agent.

Owns turning memory and NVMe directories into the inventories that recovery is planned with: whose
each is, which belong together. Promises to read only. A directory with parity in it says itself
whose it was; of the others those given at the same place of both lists are one node's, if both
lists are equally long.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from everstep.agent.bare import Place, held, place_of
from everstep.agent.inventory import NodeInventory
from everstep.agent.keeping import Keeping, known_of
from everstep.agent.outlook import job_overview
from everstep.agent.planning import Erasure, SnapshotPlan, plan_snapshots
from everstep.proto.errors import Refused
from everstep.proto.ids import SnapshotId
from everstep.proto.peer_pb2 import JobOverview
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity import ParityStore
from everstep.storage.parity_memory import ParityMemory


@dataclass(slots=True)
class BareNode:
    """What is there of one node."""

    node_id: str
    """Its name if its parity tells, else its first directory."""
    places: list[Place] = field(default_factory=list)

    @property
    def memory(self) -> MemoryLevel | None:
        """Its memory, if that was named."""
        return next((s for s in self._stores() if isinstance(s, MemoryLevel)), None)

    @property
    def nvme(self) -> NvmeLevel | None:
        """Its disk, if that was named."""
        return next((s for s in self._stores() if isinstance(s, NvmeLevel)), None)

    def _stores(self) -> Iterator[MemoryLevel | NvmeLevel]:
        for place in self.places:
            yield from place.stores

    def parities(self) -> Iterator[tuple[str, ParityStore]]:
        """Where its parity lies, by level."""
        if self.memory is not None:
            yield "memory", ParityMemory(self.memory.root, keep_free_bytes=0)
        if self.nvme is not None:
            yield "nvme", self.nvme.parity

    def inventory(self, job: str) -> NodeInventory:
        """What it holds of a job."""
        memory = self.memory
        parity = ParityMemory(memory.root, keep_free_bytes=0) if memory is not None else None
        return Keeping(self.node_id, memory, self.nvme, parity).inventory(job, known_of(None))


class BareNodes:
    """Directories of several nodes. Use as a context manager.

    Args:
        memory_dirs: Memory directories, or jobs in them.
        nvme_dirs: Likewise of NVMe.
        job: Only this job; empty for all.

    Raises:
        Refused: If a directory is nothing of Everstep's, of the other kind, or given twice.
    """

    def __init__(
        self, memory_dirs: Sequence[Path], nvme_dirs: Sequence[Path], job: str = ""
    ) -> None:
        self.job = job
        self._stack = ExitStack()
        self._roots: set[Path] = set()
        try:
            memory = [self._opened(path, "memory") for path in memory_dirs]
            nvme = [self._opened(path, "nvme") for path in nvme_dirs]
        except BaseException:
            self._stack.close()
            raise
        self.nodes = _nodes(memory, nvme)

    def _opened(self, path: Path, kind: str) -> Place:
        place = self._stack.enter_context(place_of(path))
        if any(store.name != kind for store in place.stores):
            raise Refused(f"{path} is no {kind} directory: give it with the other flag.")
        roots = {store.root for store in place.stores}
        if roots & self._roots:
            raise Refused(f"{path} is given twice: it would count as two nodes.")
        self._roots |= roots
        return place

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def name(self) -> str:
        """For messages."""
        return ", ".join(place.name for node in self.nodes for place in node.places)

    def jobs(self) -> list[str]:
        """The jobs that are meant, sorted.

        Raises:
            Refused: If the one that was named is nowhere.
        """
        found = {job for node in self.nodes for place in node.places for job in place.jobs()}
        if self.job and self.job not in found:
            raise Refused(f"{self.name} hold no job {self.job!r}, only {', '.join(sorted(found))}.")
        return sorted(job for job in found if self.job in ("", job))

    def one_job(self) -> str:
        """The only job that is meant.

        Raises:
            Refused: If there are several or none.
        """
        jobs = self.jobs()
        if len(jobs) != 1:
            names = ", ".join(jobs) or "none"
            raise Refused(f"{self.name} have these jobs: {names}. Name one with --job.")
        return jobs[0]

    def inventories(self, job: str) -> list[NodeInventory]:
        """What all of them hold of a job."""
        return [node.inventory(job) for node in self.nodes]

    def plans(
        self,
        job: str,
        *,
        step: int | None = None,
        levels: frozenset[str] = frozenset(),
        erasures: Sequence[Erasure] = (),
    ) -> list[SnapshotPlan]:
        """What can be recovered from them, newest first."""
        found = self.inventories(job)
        return plan_snapshots(found, to_step=step, levels=levels, erasures=erasures)

    def overview(self, job: str, erasures: Sequence[Erasure] = ()) -> JobOverview:
        """What they hold of a job, and what can be recovered."""
        found = self.inventories(job)
        plans = plan_snapshots(found, erasures=erasures)
        return job_overview(job, found, plans, captured_unix_s=self._times(job))

    def _times(self, job: str) -> dict[SnapshotId, float]:
        return {
            one.snapshot: one.unix_s
            for node in self.nodes
            for place in node.places
            for one in held(place)
            if one.job == job and one.unix_s
        }


def _nodes(memory: Sequence[Place], nvme: Sequence[Place]) -> list[BareNode]:
    if len(memory) == len(nvme):
        pairs = [[*pair] for pair in zip(memory, nvme, strict=True)]
    else:
        pairs = [[place] for place in (*memory, *nvme)]
    found: dict[str, BareNode] = {}
    for places in pairs:
        names = [_owner(place) or "" for place in places]
        known = {name for name in names if name}
        if len(known) > 1:
            # They say themselves that they do not belong together.
            for place, name in zip(places, names, strict=True):
                found.setdefault(name or place.name, BareNode(name or place.name)).places.append(
                    place
                )
            continue
        name = next(iter(known), places[0].name)
        found.setdefault(name, BareNode(name)).places += places
    return list(found.values())


def _owner(place: Place) -> str:
    """Whose parity lies there; empty if there is none."""
    for _, store in BareNode("", [place]).parities():
        for job in place.jobs():
            for manifest in store.manifests(job):
                if manifest.member < len(manifest.plan.members):
                    return str(manifest.plan.members[manifest.member].node_id)
    return ""
