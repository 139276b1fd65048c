"""What this node holds of a job: in its memory as the agent knows it, on its disk as found there.

Owns making the inventory that recovery is planned with, and finding the records and layouts of
shards that are held here or named by a parity manifest. Promises that one unreadable file costs no
other and is named among the problems, and that nothing is listed that was dropped. Reads
directories, so it blocks: call it in a thread, with what was taken from the agent's state before.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from everstep.agent import plans
from everstep.agent.inventory import (
    MEMORY,
    NVME,
    HeldParity,
    HeldShard,
    HeldSnapshot,
    NodeInventory,
)
from everstep.agent.job import Job, RoundStage
from everstep.proto.errors import EverstepError, FormatInvalid
from everstep.proto.ids import SnapshotId
from everstep.proto.peer_pb2 import DescribedShard
from everstep.proto.state_pb2 import ParityManifest
from everstep.snapshot.record import open_record, record_digest
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity import ParityStore, protected_snapshot
from everstep.storage.parity_memory import ParityMemory

_REPORTED_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Known:
    """What the agent knows of a job's memory; taken on its loop, used in a thread."""

    worlds: Mapping[SnapshotId, int] = field(default_factory=dict)
    envelopes: Mapping[SnapshotId, Mapping[int, bytes]] = field(default_factory=dict)
    """Records of the shards that are held, by snapshot and rank."""
    commit_ids: Mapping[SnapshotId, bytes] = field(default_factory=dict)
    """What they were committed as; empty where nobody has said."""
    plans: frozenset[str] | None = None
    """Rounds whose parity is whole; None for all there are, of a job that is not known."""
    problems: tuple[str, ...] = ()


def known_of(job: Job | None) -> Known:
    """What is in memory of a job, as facts."""
    if job is None:
        return Known()
    held = [snapshot for snapshot in job.snapshots.values() if job.holds(snapshot)]
    whole = (RoundStage.PREPARED, RoundStage.COMMITTED)
    return Known(
        worlds={snapshot.id: snapshot.world for snapshot in held},
        envelopes={
            snapshot.id: {rank: shard.envelope for rank, shard in snapshot.sealed.items()}
            for snapshot in held
        },
        commit_ids={snapshot.id: snapshot.commit_id for snapshot in held},
        plans=frozenset(p for p, known in job.rounds.items() if known.stage in whole),
        problems=tuple(f"{lost}, memory: {reason}" for lost, reason in job.damaged.items()),
    )


@dataclass(slots=True)
class _Found:
    """One snapshot, while it is put together."""

    world: int
    shards: list[HeldShard] = field(default_factory=list)
    parities: list[HeldParity] = field(default_factory=list)


class Keeping:
    """The places of one node.

    Args:
        node_id: This node.
        memory: Its memory; None where only its disk is looked at.
        nvme: Its disk, if it uses one.
        parity: Its parity in memory, if it takes part in parity.
    """

    def __init__(
        self,
        node_id: str,
        memory: MemoryLevel | None,
        nvme: NvmeLevel | None,
        parity: ParityMemory | None,
    ) -> None:
        self._node_id = node_id
        self._memory = memory
        self._nvme = nvme
        self._parity = parity

    def store_of(self, level: str) -> ParityStore | None:
        """Where parity of a level is kept; None if there is no such place."""
        if level == NVME and self._nvme is not None:
            return self._nvme.parity
        return self._parity if level == MEMORY else None

    def inventory(self, job: str, known: Known) -> NodeInventory:
        """Everything that is held here of a job."""
        found: dict[SnapshotId, _Found] = {}
        problems = list(known.problems)
        for snapshot, envelopes in known.envelopes.items():
            kept = found[snapshot] = _Found(known.worlds[snapshot])
            commit_id = known.commit_ids.get(snapshot, b"")
            kept.shards += [
                _in_memory(rank, data, commit_id) for rank, data in sorted(envelopes.items())
            ]
        for level, list_level in ((NVME, self._list_disk), (MEMORY, self._list_memory)):
            try:
                list_level(job, known, found, problems)
            except (EverstepError, OSError) as error:
                # A disk that fails must not cost what is in memory, nor the reverse.
                problems.append(f"{level}: {error}")
        return NodeInventory(
            self._node_id,
            tuple(
                HeldSnapshot(snapshot, kept.world, tuple(kept.shards), tuple(kept.parities))
                for snapshot, kept in sorted(found.items())
            ),
            tuple(problems[:_REPORTED_PROBLEMS]),
        )

    def _list_memory(
        self, job: str, known: Known, found: dict[SnapshotId, _Found], problems: list[str]
    ) -> None:
        if self._memory is None:
            return
        if known.plans is None:
            # Of a job that the agent does not know, what was left behind counts by its records.
            for held in self._memory.records(job):
                kept = found.setdefault(held.snapshot, _Found(held.record.world))
                kept.shards.append(_in_memory(held.rank, held.envelope))
        problems += [f"{p.where}: {p.reason}" for p in self._memory.problems(job)]
        if self._parity is not None:
            self._list_parity(job, MEMORY, self._parity, known.plans, found, problems)

    def _list_disk(
        self, job: str, known: Known, found: dict[SnapshotId, _Found], problems: list[str]
    ) -> None:
        if self._nvme is None:
            return
        for commit in self._nvme.commits(job):
            snapshot = SnapshotId(commit.incarnation, commit.step)
            kept = found.setdefault(snapshot, _Found(commit.world))
            here = self._nvme.ranks(job, snapshot)
            if kept.world != commit.world:
                problems.append(f"nvme, {snapshot}: it is of a world of {commit.world}")
                continue
            kept.shards += [
                HeldShard(
                    s.rank, NVME, s.image_bytes, s.layout_id, s.record_digest, commit.commit_id
                )
                for s in sorted(commit.shards, key=lambda shard: shard.rank)
                if s.rank in here
            ]
        problems += [f"{p.where}: {p.reason}" for p in self._nvme.problems(job)]
        self._list_parity(job, NVME, self._nvme.parity, None, found, problems)

    def _list_parity(
        self,
        job: str,
        level: str,
        store: ParityStore,
        wanted: Collection[str] | None,
        found: dict[SnapshotId, _Found],
        problems: list[str],
    ) -> None:
        for manifest in store.manifests(job):
            where = f"{level}, parity {manifest.plan.plan_id}"
            if wanted is not None and manifest.plan.plan_id not in wanted:
                continue
            try:
                plan = plans.parsed(manifest.plan, where)
            except FormatInvalid as error:
                problems.append(str(error))
                continue
            kept = found.setdefault(plan.snapshot, _Found(plan.world))
            if plan.members[manifest.member].node_id != self._node_id or kept.world != plan.world:
                problems.append(f"{where}: it is not this node's, or of another world")
                continue
            kept.parities.append(HeldParity(plan, level))

    def describe(
        self, job: str, snapshot: SnapshotId, ranks: Collection[int], known: Known
    ) -> Iterator[DescribedShard]:
        """Records and layouts of shards, of those ranks that anything is known of here.

        Args:
            job: The job.
            snapshot: The snapshot.
            ranks: Whose; empty for all that are known.
            known: See `known_of`.
        """
        envelopes = dict(known.envelopes.get(snapshot, {}))
        if not ranks or not envelopes.keys() >= set(ranks):
            # What is in memory is the newest by that name.
            elsewhere = dict(self._named(job, snapshot)) | self._on_disk(job, snapshot)
            envelopes = elsewhere | envelopes
        for rank in sorted(ranks or envelopes):
            if rank not in envelopes:
                continue
            try:
                record = open_record(envelopes[rank], f"record of rank {rank}")
            except FormatInvalid:
                continue
            layout = self._layout(job, record.layout_id)
            yield DescribedShard(rank=rank, record=envelopes[rank], layout=layout)

    def manifests(self, job: str, snapshot: SnapshotId, level: str) -> list[ParityManifest]:
        """This node's parity of a snapshot at a level."""
        store = self.store_of(level)
        found = store.manifests(job) if store is not None else []
        return [manifest for manifest in found if protected_snapshot(manifest) == snapshot]

    def _named(self, job: str, snapshot: SnapshotId) -> Iterator[tuple[int, bytes]]:
        """Records that are in parity manifests, also of shards on other nodes."""
        for level in (NVME, MEMORY):
            for manifest in self.manifests(job, snapshot, level):
                for shard in manifest.records:
                    yield shard.rank, shard.record

    def _on_disk(self, job: str, snapshot: SnapshotId) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for rank in self._nvme.ranks(job, snapshot) if self._nvme is not None else ():
            assert self._nvme is not None
            try:
                with self._nvme.open_shard(job, snapshot, rank) as shard:
                    found[rank] = shard.record
            except FormatInvalid:
                continue
        return found

    def _layout(self, job: str, layout_id: str) -> bytes:
        """A layout's envelope; empty if it is not here, or damaged at every level."""
        for store in (self._memory, self._nvme):
            try:
                if store is not None:
                    return store.layout(job, layout_id)
            except FormatInvalid:
                continue
        return b""


def _in_memory(rank: int, envelope: bytes, commit_id: bytes = b"") -> HeldShard:
    record = open_record(envelope, f"record of rank {rank}")
    digest = record_digest(envelope)
    return HeldShard(rank, MEMORY, record.image_bytes, record.layout_id, digest, commit_id)
