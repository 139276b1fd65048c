"""A StorageWriter of `torch.distributed.checkpoint` whose checkpoints are snapshots.

Owns the way from DCP's calls to one snapshot. Promises that `dcp.save` returns only when the
checkpoint is committed by all ranks at the level that was asked for, and raises otherwise: a
snapshot that was skipped or dropped is an error here; and that the tensors may change as soon as
`dcp.save` returns. Does not overwrite: steps grow from save to save.
"""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from everstep.client.dcp.checkpoint_id import CheckpointId, names_step, step_of
from everstep.client.dcp.connection import Connection, close, connection
from everstep.client.dcp.packing import packed
from everstep.client.dcp.ranks import address_of, check_rank, check_world
from everstep.client.handle import LEVELS, Snapshot
from everstep.proto.errors import Refused, Retryable


class EverstepWriter(StorageWriter):
    """Saves over Everstep: ``dcp.save(state, storage_writer=EverstepWriter("gpt"))``.

    One object serves all saves of a process. Nothing is connected before the first.
    """

    def __init__(
        self,
        job: str,
        *,
        level: str = "memory",
        timeout_s: float = 300.0,
        agent: str | None = None,
        rank: int | None = None,
        world: int | None = None,
        **options: Any,
    ) -> None:
        """Say which run this is.

        Args:
            job: The run's name; restarts of the same run use the same name.
            level: What `dcp.save` waits for: "memory", "parity" or "nvme".
            timeout_s: How long, after which it raises.
            agent: As for `everstep.connect`.
            rank: By default that of torch.distributed, else 0.
            world: By default that of torch.distributed, else 1.
            **options: As for `everstep.connect`: ``nvme_interval``, ``limits`` and so on.

        Raises:
            Refused: If there is no such level.
        """
        if level not in LEVELS:
            raise Refused(f"there is no level {level!r}; levels are {', '.join(LEVELS)}.")
        self.level = level
        self.timeout_s = timeout_s
        self._job = job
        self._agent = agent
        self._rank = rank
        self._world = world
        self._options: Mapping[str, Any] = options
        self._step: int | None = None
        self._saved: int | None = None
        self._save_id = uuid.uuid4().hex
        self._handle: Snapshot | None = None

    def __getstate__(self) -> dict[str, object]:
        # For async_save in a process of its own, which connects by itself.
        return {**self.__dict__, "_handle": None}

    @property
    def checkpoint_id(self) -> str | None:
        """The step that is being saved, or was last, as text; None if there is none yet."""
        step = self._saved if self._step is None else self._step
        return None if step is None else f"step-{step}"

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Another checkpoint begins.

        Args:
            checkpoint_id: Its step: see `everstep.client.dcp.checkpoint_id.step_of`. None: one more
                than the last.

        Raises:
            Refused: If it names no step.
        """
        self._step = None if checkpoint_id is None else step_of(checkpoint_id)
        self._save_id = uuid.uuid4().hex

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Connect, if that has not happened.

        Raises:
            Refused: If DCP's ranks are not those of the job.
        """
        if not kwargs.get("use_collectives", True):
            raise Refused(
                "use_collectives=False saves what each rank has as a checkpoint of its own, and a "
                "snapshot is one of all ranks. Nothing was saved. Leave it out."
            )
        check_rank(self._connection().address, kwargs.get("rank"))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell all ranks which step it is.

        Raises:
            Refused: If DCP's ranks are not those of the job.
        """
        connected = self._connection()
        check_world(connected.address, len(plans))
        step = connected.following_step() if self._step is None else self._step
        return [replace(plan, storage_data=step) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy all items of the plan into this node's memory.

        Raises:
            Retryable: If the snapshot was skipped; says why.
        """
        connected = self._connection()
        step = self._chosen(plan, connected)
        share = packed(plan, planner, connected.address.rank, step)
        self._handle = connected.save(step, share)
        self._step, self._saved = None, step
        written: Future[list[WriteResult]] = Future()
        written.set_result(share.results)
        return written

    def _chosen(self, plan: SavePlan, connected: Connection) -> int:
        if self._step is not None:
            return self._step
        # With enable_plan_caching the plan may be that of an earlier save.
        last = connected.last_step
        planned = plan.storage_data if isinstance(plan.storage_data, int) else 0
        return planned if last is None else max(planned, last + 1)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Wait until all ranks' shares are one committed snapshot.

        Raises:
            Refused: If the ranks were not asked for the same step.
            Retryable: If it will never be committed; says why.
            DeadlineExceeded: If it is not in time.
        """
        handle, self._handle = self._handle, None
        assert handle is not None
        steps = sorted({result.storage_data for rank in results for result in rank})
        if len(steps) > 1:
            raise Refused(
                f"the ranks saved steps {', '.join(map(str, steps))}, and a checkpoint has one. "
                "It is not committed; older snapshots are untouched. Give the same checkpoint_id "
                "on every rank."
            )
        if not handle.wait(self.level, self.timeout_s):
            raise Retryable(
                f"step {handle.step} of job {self._job!r} was not saved: {handle.dropped}. Older "
                "snapshots are untouched. Save again under the next step."
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether it names a step."""
        return names_step(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        """For planners that ask."""
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._save_id)

    def close(self) -> None:
        """End this process's session of the job, the reader's too: see `everstep.dcp.close`."""
        close(self._job)

    def _connection(self) -> Connection:
        address = address_of(self._job, self._agent, self._rank, self._world)
        return connection(address, self._options)
