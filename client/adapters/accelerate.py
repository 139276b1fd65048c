"""Snapshots of what an Accelerator has prepared.

Owns the way from an Accelerator's lists of models, optimizers, schedulers and registered objects to
what is attached. Promises methods with the Accelerator's own names, and a loop that goes on bit for
bit where it was killed: everything prepared, the gradient scaler, the count of accumulated steps
and the random generators come back, and `skip_first_batches` leaves the generators as they were
within the epoch. Takes no snapshot while gradients are summed up. Does not promise to know where
the loop was: as with `Accelerator.load_state`, the program works it out from the step. What a
loader draws at random for the batches that it fetches right after the restore is not repeated
either. FSDP, DeepSpeed and Megatron-LM are refused.
"""

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from everstep.client import rng
from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.client.handle import Snapshot
from everstep.proto.errors import Refused

_REFUSED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class _Progress:
    """The Accelerator's own count of the batches since the last optimizer step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        return {"step": self._accelerator.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._accelerator.step = state["step"]


class AccelerateCheckpointer:
    """`save_state` and `load_state` of an Accelerator, over Everstep.

        checkpointer = everstep.AccelerateCheckpointer(accelerator, "finetune", interval=10)
        start = checkpointer.load_state() or 0
        ...
        checkpointer.save_state(step)

    Attributes:
        client: Everstep's own, with everything attached; None until `load_state` or `save_state`.
    """

    def __init__(
        self, accelerator: Accelerator, job: str, interval: int = 1, **options: Any
    ) -> None:
        """Say which run this is; nothing is connected yet.

        Args:
            accelerator: After its `prepare`, or before; it must be done at `load_state`.
            job: The run's name; restarts of the same run use the same name.
            interval: `save_state` acts at every step that this divides.
            **options: As for `everstep.connect`.

        Raises:
            Refused: If the Accelerator shards the state in a way that would be captured wrongly.
        """
        kind = accelerator.distributed_type.value
        if kind in _REFUSED:
            raise Refused(
                f"this adapter does not know how {kind} keeps the state. Use everstep."
                "DeepSpeedCheckpointEngine, or attach the sharded model with everstep.connect()."
            )
        self.client: Client | None = None
        self._accelerator = accelerator
        self._job = job
        self._interval = interval
        self._options = options
        self._registered: dict[str, Any] = {}
        self._generators: dict[str, Any] | None = None

    def register_for_checkpointing(self, **objects: Any) -> None:
        """Attach more, by name; what the Accelerator has registered itself is, too."""
        self._registered |= objects

    def load_state(self, to: int | None = None) -> int | None:
        """Restore everything that was prepared and registered, in place.

        Args:
            to: This step instead of the newest.

        Returns:
            The step, or None if this job has no snapshot at all.
        """
        step = self._attached().restore(to)
        self._generators = None if step is None else rng.capture()
        return step

    def save_state(self, step: int, *, force: bool = False) -> Snapshot:
        """Take a snapshot of the state after `step` optimizer steps; returns at once.

        Args:
            step: How many optimizer steps are done; what `load_state` will return.
            force: Act even if `interval` does not divide the step.
        """
        client = self._attached()
        self._generators = None
        if not self._accelerator.sync_gradients:
            return Snapshot(step, "gradients are being summed up")
        return client.snapshot(step, force=force)

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """The loader without its first batches, after `load_state`, within its first epoch.

        Unlike the Accelerator's method of this name it sets the random generators once more, since
        the loader has drawn a seed by the time that its first batch is there.
        """
        if not num_batches:
            return dataloader
        skipped = self._accelerator.skip_first_batches(dataloader, num_batches)
        return _Resumed(skipped, self._generators)

    def end_training(self) -> None:
        """Bring the last snapshot to the strongest level, and end the session."""
        client, self.client = self.client, None
        if client is not None:
            client.close()

    def _attached(self) -> Client:
        if self.client is None:
            self.client = connect(self._job, self._interval, **self._options)
            self.client.attach(**self._parts(), **self._registered)
        return self.client

    def _parts(self) -> dict[str, Any]:
        accelerator = self._accelerator
        # Accelerate's wrapper takes no hooks; the fence belongs on the optimizer behind it.
        optimizers = [wrapped.optimizer for wrapped in accelerator._optimizers]
        groups = {
            "model": accelerator._models,
            "optimizer": optimizers,
            "scheduler": accelerator._schedulers,
            "registered": accelerator._custom_objects,
        }
        parts = {
            f"{name}_{i}": part for name, group in groups.items() for i, part in enumerate(group)
        }
        parts["accelerator"] = _Progress(accelerator)
        if accelerator.scaler is not None:
            parts["scaler"] = accelerator.scaler
        return parts


class _Resumed:
    """A loader that has the generators set when its first batch was fetched."""

    def __init__(self, loader: Any, generators: dict[str, Any] | None) -> None:
        self._loader = loader
        self._generators = generators

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            generators, self._generators = self._generators, None
            if generators is not None:
                rng.restore(generators)
            yield batch
