"""A callback for the Trainer of Hugging Face transformers.

Owns what happens at the Trainer's events: attach and restore when training begins, a snapshot when
an optimizer step has ended, close at the end. Promises a run that goes on exactly where the
snapshot was taken: model, optimizer, scheduler, gradient scaler, `TrainerState`, random generators
and the place in the data are those of one step, the latter by the Trainer's own way of skipping
batches. A snapshot includes what the Trainer logs, evaluates and saves at its step. Promises that a
run with snapshots is not begun anew by mistake. Does not promise the state of other callbacks, the
loss summed up since the last log, or what the data loader draws at random for the batches that are
fetched right after the restore: the Trainer's own checkpoints have none of it either. FSDP and
DeepSpeed are refused.
"""

import json
import logging
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from everstep.client import rng
from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.client.handle import Snapshot
from everstep.proto.errors import DeadlineExceeded, NothingRecoverable, Refused

log = logging.getLogger("everstep")
_PART = "trainer_state"
_LAST_S = 30.0


class _TrainerStatePart:
    """The live `TrainerState`, as something to attach."""

    def __init__(self, state: TrainerState) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self._state, item.name) for item in fields(self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the Trainer has read the same state, from the directory that it resumes from."""


class HuggingFaceCallback(TrainerCallback):
    """Snapshots of a Trainer's run.

        callback = everstep.HuggingFaceCallback("finetune", interval=10)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=callback.resume_from_checkpoint())

    Attributes:
        client: Everstep's own; None before the training and after it.
        resumed: The step that the training went on from; None if it began anew.
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
            interval: Snapshots are taken at every step that this divides, and at the last one.
            attach: More to attach, by name, as for `Client.attach`.
            **options: As for `everstep.connect`.
        """
        self.client: Client | None = None
        self.resumed: int | None = None
        self._job = job
        self._interval = interval
        self._attach = attach or {}
        self._options = options
        self._resumes: int | None = None
        self._to: int | None = None
        self._directory: Path | None = None
        self._generators: dict[str, Any] | None = None
        self._due: int | None = None
        self._newest: Snapshot | None = None

    def resume_from_checkpoint(self, to: int | None = None) -> str | None:
        """What `Trainer.train` wants under this name.

        Args:
            to: This step instead of the newest.

        Returns:
            A directory that tells the Trainer where to go on, the state itself being restored when
            training begins; None if there is no snapshot of this job.
        """
        found = self._connected().peek(_PART, to)
        self._to = to
        if found is None:
            return None
        self._resumes, state = found
        if not isinstance(state, dict):
            raise Refused(
                f"the snapshots of job {self._job!r} are not a Trainer's: they have no state of "
                "one. Nothing was loaded. Use another job name."
            )
        self._directory = Path(tempfile.mkdtemp(prefix="everstep-resume-"))
        (self._directory / "trainer_state.json").write_text(json.dumps(state))
        # The Trainer insists on a file of weights. An empty one leaves the model as it is.
        save_file({}, self._directory / "model.safetensors")
        logging.getLogger("transformers.trainer").addFilter(_missing_weights)
        return str(self._directory)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Refuse what would be captured wrongly."""
        if args.deepspeed or args.fsdp:
            raise Refused(
                "this callback does not know how DeepSpeed and FSDP keep the state in a Trainer. "
                "Use everstep.DeepSpeedCheckpointEngine, or attach the sharded model yourself."
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: torch.nn.Module | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Attach everything, and restore it if the Trainer resumes from here."""
        client = self._connected()
        parts = {"model": model, "lr_scheduler": lr_scheduler, _PART: _TrainerStatePart(state)}
        # Accelerate's wrapper takes no hooks; the fence belongs on the optimizer behind it.
        parts["optimizer"] = getattr(optimizer, "optimizer", optimizer)
        parts["scaler"] = getattr(optimizer, "scaler", None)
        client.attach(**{name: part for name, part in parts.items() if part is not None})
        client.attach(**self._attach)
        self._forget_directory()
        if self._resumes is not None:
            self._restore(client, state)
        elif not state.global_step and client.peek(_PART) is not None:
            raise Refused(
                f"job {self._job!r} has snapshots, and this run would begin at step 0. Nothing was "
                "loaded. Go on from them with trainer.train(resume_from_checkpoint=callback."
                "resume_from_checkpoint()), or use another job name."
            )

    def _restore(self, client: Client, state: TrainerState) -> None:
        step = client.restore(self._to)
        if step != self._resumes or step != state.global_step:
            where = f"the Trainer was to go on at step {self._resumes} and is at step {step}"
            raise NothingRecoverable(self._job, (*client.rejected, where))
        self.resumed, self._resumes = step, None
        self._generators = rng.capture()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Between epochs: before the loader's iterator is made, which draws a seed."""
        self._take_due()
        if self._generators is not None and float(state.epoch or 0).is_integer():
            rng.restore(self._generators)
            self._generators = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Within an epoch: after the iterator was made and the next batches were fetched."""
        self._take_due()
        if self._generators is not None:
            rng.restore(self._generators)
            self._generators = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take a snapshot, or put it off until the Trainer is done with this step."""
        self._due = state.global_step
        at_epochs_end = float(state.epoch or 0).is_integer()
        if control.should_training_stop:
            self._take_last()
        elif not (
            control.should_log or control.should_evaluate or control.should_save or at_epochs_end
        ):
            self._take_due()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Bring the last snapshot to the strongest level."""
        client, self.client = self.client, None
        if client is not None:
            client.close()
        self._forget_directory()

    def _connected(self) -> Client:
        if self.client is None:
            self.client = connect(self._job, self._interval, **self._options)
        return self.client

    def _take_due(self, *, force: bool = False) -> None:
        step, self._due = self._due, None
        if self.client is not None and step is not None:
            handle = self.client.snapshot(step, force=force)
            self._newest = self._newest if handle.skipped else handle

    def _take_last(self) -> None:
        """The one after which nothing comes, so it is worth a wait for the one before it."""
        if self._newest is not None:
            try:
                self._newest.wait(timeout=_LAST_S)
            except DeadlineExceeded as error:
                log.warning("the last step may have no snapshot: %s", error)
        self._take_due(force=True)

    def _forget_directory(self) -> None:
        logging.getLogger("transformers.trainer").removeFilter(_missing_weights)
        directory, self._directory = self._directory, None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


def _missing_weights(record: logging.LogRecord) -> bool:
    """Keep the Trainer from warning that its directory has no weights: they come by restore()."""
    return not record.getMessage().startswith("There were missing keys")
