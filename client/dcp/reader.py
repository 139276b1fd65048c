"""A StorageReader of `torch.distributed.checkpoint` over snapshots.

Owns the way from DCP's read items to boxes of saved tensors. Promises that every tensor is filled
with verified bytes of one snapshot, or none is and an error is raised; that all ranks read the same
one; and that any number of ranks, on any mesh, may read what any other has saved. It also reads
what `Client.snapshot` has made, as far as the names are those of the state dict.
"""

import io
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from everstep.client.dcp.catalogue import Catalogue, StoredBytes, StoredValue, catalogue_of
from everstep.client.dcp.checkpoint_id import CheckpointId, names_step, step_of
from everstep.client.dcp.connection import Address, Connection, Opened, close, connection
from everstep.client.dcp.ranks import address_of, check_rank, check_world
from everstep.proto.errors import Refused, StateMismatch
from everstep.snapshot.reshard import Box
from everstep.snapshot.restore import Wanted


class EverstepReader(StorageReader):
    """Loads over Everstep: ``dcp.load(state, storage_reader=EverstepReader("gpt"))``.

    Nothing is connected before the first load. Every rank must load, as DCP demands anyway.
    """

    def __init__(
        self,
        job: str,
        *,
        checkpoint_id: CheckpointId | None = None,
        agent: str | None = None,
        rank: int | None = None,
        world: int | None = None,
        **options: Any,
    ) -> None:
        """Say which run this is.

        Args:
            job: The run's name.
            checkpoint_id: The step, until `reset` says another: see `reset`.
            agent: As for `everstep.connect`.
            rank: By default that of torch.distributed, else 0.
            world: By default that of torch.distributed, else 1.
            **options: As for `everstep.connect`.

        Raises:
            Refused: If `checkpoint_id` names no step.
        """
        self._job = job
        self._agent = agent
        self._rank = rank
        self._world = world
        self._options: Mapping[str, Any] = options
        self._step = None if checkpoint_id is None else step_of(checkpoint_id)
        self._opened: Opened | None = None
        self._catalogue = Catalogue()

    @property
    def checkpoint_id(self) -> str | None:
        """The step that is asked for, or was opened, as text; None if there is none yet."""
        opened = None if self._opened is None else self._opened.identity[1]
        step = opened if self._step is None else self._step
        return None if step is None else f"step-{step}"

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Another checkpoint is to be read.

        Args:
            checkpoint_id: Its step: see `everstep.client.dcp.checkpoint_id.step_of`. None: the
                newest.

        Raises:
            Refused: If it names no step.
        """
        self._step = None if checkpoint_id is None else step_of(checkpoint_id)
        self._opened = None

    # Not named kwargs: DCP would take that for an offer of metadata by rank, and ask again.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Have the agent say what all ranks load, and describe it.

        Raises:
            NothingRecoverable: If there is no such snapshot, or none that is whole.
        """
        self._opened = self._connection().open(self._step)
        self._catalogue = catalogue_of(self._opened.saved)
        metadata = self._catalogue.metadata(self._opened.saved)
        metadata.storage_meta = StorageMeta(
            checkpoint_id=self.checkpoint_id, load_id=uuid.uuid4().hex
        )
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Check that DCP's ranks are those of the job.

        Raises:
            Refused: If they are not.
        """
        check_rank(self._address(), kwargs.get("rank"))

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Note which snapshot it is of."""
        return replace(plan, storage_data=self._present().identity)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See that all ranks read the same snapshot.

        Raises:
            Refused: If they do not, or if DCP's ranks are not those of the job.
        """
        check_world(self._address(), len(plans))
        found = sorted({plan.storage_data for plan in plans if plan.storage_data is not None})
        if len(found) > 1:
            named = ", ".join(f"step {step} of launch {launch}" for launch, step in found)
            raise Refused(
                f"the ranks would load different snapshots: {named}. Nothing was loaded. Give the "
                "same checkpoint_id on every rank."
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors, and hand it the objects' bytes.

        Raises:
            Damaged: If bytes are damaged, and no other copy is whole. Nothing was loaded.
            StateMismatch: If a tensor's state differs from rank to rank. Nothing was loaded.
        """
        opened = self._present()
        tensors: list[tuple[ReadItem, torch.Tensor]] = []
        streams: list[tuple[ReadItem, torch.Tensor | StoredValue]] = []
        wanted: list[Wanted] = []
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                found = self._object(item, wanted)
                streams.append((item, found))
            else:
                target = planner.resolve_tensor(item)
                tensors.append((item, target))
                wanted.append(self._wanted(item, target.detach()))
        self._check(opened, wanted)
        self._connection().read(opened, wanted)
        for item, stored in streams:
            in_memory = isinstance(stored, StoredValue)
            stream = stored.stream() if in_memory else io.BytesIO(stored.numpy().tobytes())  # type: ignore[union-attr]
            planner.load_bytes(item, stream)
        for item, target in tensors:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _object(self, item: ReadItem, wanted: list[Wanted]) -> torch.Tensor | StoredValue:
        stored = self._catalogue.objects[item.storage_index.fqn]
        if isinstance(stored, StoredBytes):
            buffer = torch.empty(stored.end - stored.begin, dtype=torch.uint8)
            wanted.append(Wanted(stored.tensor, buffer, Box((stored.begin,), (len(buffer),))))
            return buffer
        return stored

    def _wanted(self, item: ReadItem, target: torch.Tensor) -> Wanted:
        index = item.storage_index
        begins = index.offset or (0,) * len(item.lengths)
        offset = tuple(b + at for b, at in zip(begins, item.storage_offsets, strict=True))
        name = self._catalogue.tensors[index.fqn]
        # DCP's own readers copy into whatever dtype there is.
        return Wanted(name, target, Box(offset, tuple(item.lengths)), cast=True)

    def _check(self, opened: Opened, wanted: list[Wanted]) -> None:
        rank, saved = self._address().rank, opened.saved
        names = dict.fromkeys(item.name for item in wanted)
        divergent = [
            name
            for name in names
            if (tensor := saved.tensor(name)).is_divergent
            and (saved.resized or rank not in tensor.leaves)
        ]
        contradictory = saved.holdings.check(names)
        if divergent or contradictory:
            raise StateMismatch(
                f"step {opened.identity[1]} cannot be loaded so. Nothing was loaded.",
                divergent=tuple(divergent),
                contradictory=tuple(contradictory),
            )

    def _present(self) -> Opened:
        if self._opened is None:
            raise Refused("read_metadata() comes first: nothing says yet what is to be loaded.")
        return self._opened

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether it names a step."""
        return names_step(checkpoint_id)

    def close(self) -> None:
        """End this process's session of the job, the writer's too: see `everstep.dcp.close`."""
        close(self._job)

    def _address(self) -> Address:
        return address_of(self._job, self._agent, self._rank, self._world)

    def _connection(self) -> Connection:
        return connection(self._address(), self._options)
