"""A checkpoint manager for torchtitan.

Owns the calls that torchtitan's Trainer makes of its checkpointer: load before the first step, save
after each, close at the end. Promises a run that goes on where the snapshot was taken: model parts,
optimizers, schedulers, the data loader, the Trainer's own state and the random generators, which
torchtitan's checkpoints do not have, are those of one step. The optimizers themselves are attached,
not their container, so that copies overlap with the next step and the fence holds. Does not promise
files: seed checkpoints, initial loads and exports of the last step in Hugging Face's form are
refused; `everstep export` makes files of a snapshot. Does not look into the data loader's state:
torchtitan pickles it, and unpickles it itself.
"""

import logging
from dataclasses import dataclass
from typing import Any

from torchtitan.components.checkpointer.base import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    BaseCheckpointManager,
)

from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.client.handle import Snapshot
from everstep.proto.errors import DeadlineExceeded, Refused

log = logging.getLogger("everstep")
_LAST_S = 30.0


class TorchTitanCheckpointManager(BaseCheckpointManager):
    """Snapshots of torchtitan's Trainer, by its configuration.

        config.checkpoint = everstep.TorchTitanCheckpointManager.Config(
            enable=True, job="llama", interval=10
        )

    Attributes:
        client: Everstep's own, with everything attached.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):
        """torchtitan's own options, of which `interval`, `load_step` and `load_only` count here."""

        job: str = "torchtitan"
        """The run's name; restarts of the same run use the same name."""

        agent: str | None = None
        """``unix:/path`` of the agent's socket; by default this user's own."""

        nvme_interval: int | None = None
        """Flush to NVMe every so many steps, instead of the agent's own interval."""

        on_busy: str = "skip"
        """"skip" a snapshot when the one before it is being copied or flushed, or "wait"."""

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: list[Any],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any = None,
        base_folder: str = "",
    ) -> None:
        """As torchtitan's Trainer calls it, once everything is made and nothing is loaded."""
        self.enable = config.enable
        self.save_future = None
        if not self.enable:
            return
        _check(config)
        self._config = config
        self._newest: Snapshot | None = None
        self.client: Client = connect(
            config.job,
            config.interval,
            agent=config.agent,
            nvme_interval=config.nvme_interval,
            on_busy=config.on_busy,
        )
        groups = {
            MODEL: model_parts,
            OPTIMIZER: list(optimizers),
            LR_SCHEDULER: list(lr_schedulers),
        }
        for name, group in groups.items():
            self.client.attach(**{f"{name}_{index}": part for index, part in enumerate(group)})
        self.client.attach(**states)
        if dataloader is not None:
            self.client.attach(per_rank={DATALOADER: dataloader})

    def __del__(self) -> None:
        """Nothing: a run that ended in an error keeps what it has committed."""

    def _load(self, step: int = -1) -> bool:
        restored = self.client.restore(None if step < 0 else step)
        return restored is not None

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if self._config.load_only:
            return False
        first = curr_step == 1 and self._config.enable_first_step_checkpoint
        if last_step and self._newest is not None:
            try:
                # It is worth a wait for the one before it: nothing comes after it.
                self._newest.wait(timeout=_LAST_S)
            except DeadlineExceeded as error:
                log.warning("the last step may have no snapshot: %s", error)
        handle = self.client.snapshot(curr_step, force=first or last_step)
        if handle.skipped:
            return False
        self._newest = handle
        return True

    def _maybe_wait_for_staging(self) -> None:
        """Nothing: the optimizers' own hooks wait for a copy under way."""

    def _wait_for_saving(self) -> None:
        """Nothing: there is no future, since no save is awaited."""

    def _close(self) -> None:
        if hasattr(self, "client"):
            self.client.close()


def _check(config: Any) -> None:
    """Refuse what would silently not happen."""
    unfit = {
        "initial_load_path": config.initial_load_path,
        "create_seed_checkpoint": config.create_seed_checkpoint,
        "last_save_in_hf": config.last_save_in_hf,
        "exclude_from_loading": config.exclude_from_loading,
    }
    given = [name for name, value in unfit.items() if value]
    if given:
        raise Refused(
            f"checkpoint.{', '.join(given)}: Everstep's checkpoint manager writes and reads "
            "snapshots only. Use torchtitan's own for these, and `everstep export` to make files."
        )
