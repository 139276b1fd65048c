"""A callback for the Trainer of Lightning.

Owns what happens at the Trainer's events: attach and restore when the fit begins, a snapshot when a
batch has ended in an optimizer's step, close at the end. Promises a fit that goes on where the
snapshot was taken, by the same means as `fit(ckpt_path=...)`: the module, optimizers, schedulers,
the precision plugin's scaler, the loops' progress, other callbacks' and the data module's state are
those of one step; random generators too, which Lightning's checkpoints do not have. Does not
promise the place within an epoch of a loader that has no `state_dict`: Lightning cannot skip
batches and warns of it (torchdata's `StatefulDataLoader` has one). Nor metrics summed up over an
epoch, nor gradients summed up within a step: no snapshot is taken there. FSDP, DeepSpeed and model
parallelism are refused. There is no CheckpointIO: it is asked to keep any object under any path,
which is not possible without pickle.
"""

import logging
from typing import Any

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl

from everstep.client import rng
from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.client.handle import Snapshot
from everstep.proto.errors import DeadlineExceeded, Refused

log = logging.getLogger("everstep")
_LAST_S = 30.0
_REFUSED = ("FSDP", "DeepSpeed", "ModelParallel")


class _Loops:
    """The progress of the fit, with the loaders' own states, as something to attach."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._trainer.fit_loop.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._trainer.fit_loop.load_state_dict(state)


class _Callbacks:
    """The states of all other callbacks, by their own keys."""

    def __init__(self, trainer: Any, own: "LightningCallback") -> None:
        self._others = [callback for callback in trainer.callbacks if callback is not own]

    def state_dict(self) -> dict[str, Any]:
        states = {callback.state_key: callback.state_dict() for callback in self._others}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        for callback in self._others:
            if callback.state_key in states:
                callback.load_state_dict(states[callback.state_key])


class LightningCallback(pl.Callback):
    """Snapshots of a Trainer's fit.

        callback = everstep.LightningCallback("pretrain", interval=10)
        trainer = lightning.Trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(module, loader)

    Attributes:
        client: Everstep's own; None before the fit and after it.
        resumed: The step that the fit went on from; None if it began anew.
    """

    def __init__(
        self,
        job: str,
        interval: int = 1,
        *,
        attach: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Say which run this is; nothing is connected yet.

        Args:
            job: The run's name; restarts of the same run use the same name.
            interval: Snapshots are taken at every `global_step` that this divides, and at the end.
            attach: More to attach, by name, as for `Client.attach`.
            **options: As for `everstep.connect`.
        """
        self.client: Client | None = None
        self.resumed: int | None = None
        self._job = job
        self._interval = interval
        self._attach = attach or {}
        self._options = options
        self._generators: dict[str, Any] | None = None
        self._step = 0
        self._newest: Snapshot | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach everything and restore it, unless `fit` was told to go on from elsewhere."""
        strategy = type(trainer.strategy).__name__
        if strategy.startswith(_REFUSED):
            raise Refused(
                f"this callback does not know how {strategy} keeps the state. Attach the sharded "
                "model yourself, with everstep.connect()."
            )
        self.client = connect(self._job, self._interval, **self._options)
        self.client.attach(**self._parts(trainer))
        self.client.attach(**self._attach)
        self.resumed = None
        if trainer.ckpt_path:
            log.info("fit() goes on from %s, not from a snapshot", trainer.ckpt_path)
        else:
            self.resumed = self.client.restore()
        self._generators = None if self.resumed is None else rng.capture()
        self._step = trainer.global_step

    def _parts(self, trainer: Any) -> dict[str, Any]:
        # The strategy's model is the one that DistributedDataParallel wraps, if it does.
        parts = {"module": trainer.strategy.model, "loops": _Loops(trainer)}
        parts |= {f"optimizer_{i}": o for i, o in enumerate(trainer.strategy.optimizers)}
        for index, config in enumerate(trainer.lr_scheduler_configs):
            parts[f"scheduler_{index}"] = config.scheduler
        parts["callbacks"] = _Callbacks(trainer, self)
        parts["precision"] = trainer.precision_plugin
        if trainer.datamodule is not None:
            parts["datamodule"] = trainer.datamodule
        return parts

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the generators again: the loader's iterator, which draws a seed, was just made."""
        generators, self._generators = self._generators, None
        if generators is None:
            return
        loop = trainer.fit_loop
        at_epochs_end = loop.resumed_on_epoch_end
        if at_epochs_end and loop._combined_loader_states_to_load:
            # Lightning brings these back within an epoch only; between two, a sampler that has a
            # generator of its own would shuffle as in the first one.
            loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
            loop._combined_loader_states_to_load = []
            iter(loop._data_fetcher)
        rng.restore(generators)
        if at_epochs_end:
            iter(loop._data_fetcher)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot if an optimizer has stepped and nothing follows in this epoch."""
        loop = trainer.fit_loop
        validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if not validates and not loop.epoch_loop.batch_progress.is_last_batch:
            self._take(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the one of the batch before this validation, which drew random numbers."""
        if not trainer.sanity_checking:
            self._take(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the one of the epoch's last batch: here, Lightning can go on with the next epoch."""
        self._take(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Bring the last snapshot to the strongest level."""
        if self._newest is not None and self._newest.step != trainer.global_step:
            try:
                # It is worth a wait for the one before it: nothing comes after it.
                self._newest.wait(timeout=_LAST_S)
            except DeadlineExceeded as error:
                log.warning("the last step may have no snapshot: %s", error)
            self._take(trainer, force=True)
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go; what is committed stays."""
        self._close(timeout=0.0)

    def _take(self, trainer: Any, *, force: bool = False) -> None:
        if self.client is None or (trainer.global_step == self._step and not force):
            return
        self._step = trainer.global_step
        handle = self.client.snapshot(self._step, force=force)
        self._newest = self._newest if handle.skipped else handle

    def _close(self, timeout: float | None = None) -> None:
        client, self.client = self.client, None
        if client is not None:
            client.close(timeout)
