"""A CheckpointEngine for DeepSpeed.

Owns where the state dicts go that `DeepSpeedEngine.save_checkpoint` makes, and where those come
from that `load_checkpoint` asks for: a snapshot each, instead of files. In the files' places lie
stubs of a few bytes that name the snapshot, since DeepSpeed looks for files; `resume` writes them
anew on a machine that has none. Promises the engine's state and the random generators of one step,
or an error; a tag that never was committed is never loaded. Files that are no stubs are left to
DeepSpeed's own engine. Does not promise anything of offloaded parameters that DeepSpeed copies by
itself, and keeps what DeepSpeed calls client state only as far as it is plain values and tensors.
Every rank keeps its own part, so it is the same number of ranks that loads it again; with several,
each keeps a copy of what is equal on all of them.
"""

import dataclasses
import enum
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.proto.errors import NothingRecoverable, Refused

log = logging.getLogger("everstep")
_STUB = b'{"everstep"'
_STUB_BYTES = 4096
_CLASS = "~deepspeed"
_CLASSES: dict[str, Any] = {
    kind.__name__: kind for kind in (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
}
"""What DeepSpeed keeps in its state dicts beside plain values: made again by name, and no other."""


class DeepSpeedCheckpointEngine(CheckpointEngine):
    """Snapshots where DeepSpeed writes files.

        engine, *_ = deepspeed.initialize(model=model, config=config)
        checkpoints = everstep.DeepSpeedCheckpointEngine("pretrain")
        checkpoints.install(engine)
        if checkpoints.resume(directory):
            engine.load_checkpoint(directory)

    Attributes:
        client: Everstep's own; None before the first use and after `cleanup`.
    """

    def __init__(self, job: str, config_params: Any = None, **options: Any) -> None:
        """Say which run this is; nothing is connected yet.

        Args:
            job: The run's name; restarts of the same run use the same name.
            config_params: DeepSpeed's, for files that are no stubs.
            **options: As for `everstep.connect`. Since every save was asked for, the default is to
                wait for the one before it: ``on_busy="wait"``.
        """
        super().__init__(config_params)
        self.name = "EverstepCheckpointEngine"
        self.client: Client | None = None
        self._job = job
        self._options = {"on_busy": "wait"} | options
        self._files = TorchCheckpointEngine(config_params)
        self._paths: dict[str, Path] = {}
        self._saved: dict[str, Any] = {}
        self._checkpoint: dict[str, Any] = {}
        self._loaded: str | None = None
        self._resumes = False

    def install(self, engine: Any) -> None:
        """Make a DeepSpeedEngine use this one."""
        engine.checkpoint_engine = self
        # Computed when the engine was made, for an engine whose files all ranks can read.
        engine.save_non_zero_checkpoint = True

    def resume(self, load_dir: str) -> str | None:
        """Make `load_checkpoint` of this directory load the newest snapshot.

        Returns:
            Its tag; None if there is no snapshot of this job.
        """
        found = self._connected().peek("checkpoint")
        if found is None:
            return None
        step, checkpoint = found
        if not isinstance(checkpoint, dict):
            raise Refused(f"the snapshots of job {self._job!r} were not made by DeepSpeed.")
        tag = str(checkpoint["tag"])
        for name in checkpoint["names"]:
            self._write_stub(Path(load_dir, tag, name), tag, step)
        if self._connected().launch.rank == 0:
            Path(load_dir, "latest").write_text(tag)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self._resumes = True
        return tag

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a checkpoint."""
        self._paths = {}
        self._saved.clear()
        self._checkpoint.clear()
        self._checkpoint["tag"] = str(info.tag)

    def save(self, state_dict: Any, path: str) -> None:
        """Take a state dict in; it is captured at `commit`."""
        # The tag is in the directory's name, and leaves must have the same names at each step.
        name = Path(path).name
        self._paths[name] = Path(path)
        self._saved[name] = _plain(state_dict)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Capture everything that was saved; returns whether that was begun."""
        client = self._connected()
        self._checkpoint["names"] = sorted(self._paths)
        step = self._step(str(info.tag))
        handle = client.snapshot(step, force=True)
        if handle.skipped:
            log.warning("checkpoint %s was not captured: %s", info.tag, handle.skipped)
            return False
        for path in self._paths.values():
            self._write_stub(path, str(info.tag), step)
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        """The state dict that was saved as this file."""
        with Path(path).open("rb") as file:
            head = file.read(_STUB_BYTES)
        if not head.startswith(_STUB):
            return self._files.load(path, map_location)
        stub = json.loads(head)["everstep"]
        if stub["job"] != self._job:
            raise Refused(f"{path} belongs to job {stub['job']!r}, not {self._job!r}.")
        if self._loaded != stub["tag"]:
            self._restore(int(stub["step"]), stub["tag"])
        name = Path(path).name
        if name not in self._saved:
            raise Refused(f"rank {self._connected().launch.rank} has not saved {name}. {_RANKS}")
        return _live(self._saved[name])

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Every rank: none can read what another one keeps."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """No: DeepSpeed need not copy tensors that are part of larger ones."""
        return False

    def cleanup(self) -> None:
        """Bring the last snapshot to the strongest level, and end the session."""
        client, self.client = self.client, None
        if client is not None:
            client.close()

    def _connected(self) -> Client:
        if self.client is None:
            self.client = connect(self._job, **self._options)
            own = {"files": self._saved, "checkpoint": self._checkpoint}
            self.client.attach(per_rank=own)
        return self.client

    def _restore(self, step: int, tag: str) -> None:
        client = self._connected()
        if client.stats.taken:
            client.rewind(step)
        else:
            client.restore(None if self._resumes else step)
        self._loaded = self._checkpoint.get("tag")
        if self._loaded != tag:
            raise NothingRecoverable(self._job, (f"step {step}: tag {tag} is not {self._loaded}",))

    def _step(self, tag: str) -> int:
        steps = [state["global_steps"] for state in self._saved.values() if "global_steps" in state]
        numbers = re.findall(r"\d+", tag)
        if not steps and not numbers:
            raise Refused(f"checkpoint {tag!r} does not say its step: let its tag end in a number.")
        return int(steps[0] if steps else numbers[-1])

    def _write_stub(self, path: Path, tag: str, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"everstep": {"job": self._job, "tag": tag, "step": step}}))


_RANKS = "It takes the same number of ranks to load a checkpoint as to save it."


def _plain(state: Any) -> Any:
    """DeepSpeed's own objects as plain values; everything else as it is."""
    kind = type(state).__name__
    if _CLASSES.get(kind) is type(state):
        inner = state.value if isinstance(state, enum.Enum) else dict(vars(state))
        return {_CLASS: kind, "state": inner}
    if isinstance(state, dict):
        return type(state)((key, _plain(value)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(_plain(value) for value in state)
    return state


def _live(state: Any) -> Any:
    """The inverse of `_plain`; containers are new, tensors are not."""
    if isinstance(state, dict) and _CLASS in state:
        kind = _CLASSES[state[_CLASS]]
        if issubclass(kind, enum.Enum) or dataclasses.is_dataclass(kind):
            inner = state["state"]
            return kind(**inner) if isinstance(inner, dict) else kind(inner)
        made = kind.__new__(kind)
        vars(made).update(state["state"])
        return made
    if isinstance(state, dict):
        return type(state)((key, _live(value)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(_live(value) for value in state)
    return state
