"""Units of shards that lie on other nodes, brought here for restores: each once, whoever asks.

Owns what of which shard is staged, or on its way. Promises that a unit is fetched once for all
ranks of this node, that of one shard one lot is fetched at a time, that what failed is fetched anew
when it is asked for again, and that all of it is dropped once no rank of the job may be reading it.
What is here was verified on arrival; whoever reads it verifies again. Does not choose sources: the
plan does.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from everstep.agent.describing import Described
from everstep.agent.job import Job
from everstep.agent.mending import Mending
from everstep.agent.needs import Spans, merged, without
from everstep.agent.pipeline import Pipeline
from everstep.agent.sources import SnapshotPlan
from everstep.proto.errors import ShardCorrupt
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import SnapshotId
from everstep.snapshot.record import record_digest

log = logging.getLogger("everstep.agent")
_ATTEMPTS = 3


@dataclass(slots=True)
class _Lot:
    """Units that are fetched together; here, once its task has ended well."""

    spans: Spans
    task: asyncio.Task[None]

    @property
    def failed(self) -> bool:
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


@dataclass(slots=True)
class _Staged:
    """What is here of one shard."""

    record_digest: bytes
    lots: list[_Lot] = field(default_factory=list)
    path: Path | None = None
    fetching: asyncio.Lock = field(default_factory=asyncio.Lock)


class Bringing:
    """All that is staged on this node. Lives on the agent's loop."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._staged: dict[str, dict[tuple[SnapshotId, int], _Staged]] = {}
        self._dropping = asyncio.Lock()

    async def bring(
        self,
        job: str,
        plan: SnapshotPlan,
        rank: int,
        units: Sequence[range],
        described: Described,
        mending: Mending,
    ) -> Path:
        """Have units of a shard here; returns the file, which has holes elsewhere.

        Args:
            job: The job.
            plan: Where the shard is.
            rank: Whose, in the plan's world.
            units: Of its image.
            described: The shard's record and layout.
            mending: Fetches them.

        Raises:
            OutOfSpace: If memory does not hold them.
            EverstepError: What `Mending.stage` raises.
        """
        async with self._dropping:
            staged = self._of(job, plan.snapshot, rank, described)
        wanted, waiting = merged(units), []
        for lot in staged.lots:
            left = without(wanted, lot.spans)
            if left != wanted:
                waiting.append(lot.task)
                wanted = left
        if wanted or not staged.lots:
            fetched = self._fetched(staged, job, plan, rank, wanted, described, mending)
            task = asyncio.get_running_loop().create_task(fetched)
            # Who asked may be gone when it fails; whoever asks next is told.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            staged.lots.append(_Lot(wanted, task))
            waiting.append(task)
        for task in waiting:
            await asyncio.shield(task)
        path = staged.path
        assert path is not None, "there is no lot that did not make it"
        return path

    def _of(self, job: str, snapshot: SnapshotId, rank: int, described: Described) -> _Staged:
        shards = self._staged.setdefault(job, {})
        digest = record_digest(described.record_envelope)
        known = shards.get((snapshot, rank))
        gone = known is not None and known.path is not None and not known.path.exists()
        if known is None or gone or known.record_digest != digest:
            known = shards[snapshot, rank] = _Staged(digest)
        known.lots = [lot for lot in known.lots if not lot.failed]
        return known

    async def _fetched(
        self,
        staged: _Staged,
        job: str,
        plan: SnapshotPlan,
        rank: int,
        units: Spans,
        described: Described,
        mending: Mending,
    ) -> None:
        async with staged.fetching:
            count = sum(map(len, units))
            log.info("job %s: fetching %d units of %s, rank %d", job, count, plan.snapshot, rank)
            failpoint("agent.gather.before_fetch")
            for left in reversed(range(_ATTEMPTS)):
                more = staged.path is not None
                try:
                    path = await mending.stage(job, plan, rank, units, described.record, more=more)
                    break
                except ShardCorrupt as error:
                    # Checked where it lies, not long ago: it is the way here that is bad.
                    if not left:
                        raise
                    log.warning("job %s: %s, rank %d: %s", job, plan.snapshot, rank, error)
            failpoint("agent.gather.after_fetch")
            staged.path = path

    def offered(self, job: Job) -> None:
        """A rank has gone on to a step: what was staged goes, once no rank may be reading it."""
        if job.name in self._staged and not job.restoring and not job.joining:
            self._pipeline.spawn(self._drop(job))

    async def _drop(self, job: Job) -> None:
        staging = self._pipeline.staging
        async with self._dropping:
            if staging is not None and not job.restoring and not job.joining:
                self._staged.pop(job.name, None)
                await asyncio.to_thread(staging.drop, job.name)
