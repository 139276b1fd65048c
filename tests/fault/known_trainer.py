"""The trainer of the tests with several nodes: its state follows from rank, step and launch alone.

Whatever is restored can so be compared, byte for byte, with what it must be, without a second run.
A shard has bytes of its rank's own, as many as the rank is asked for, and a weight that all ranks
hold alike. Does one command at a time, as trainer.py does.
"""

import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from everstep import connect
from everstep.client.handle import LEVELS
from everstep.client.limits import Limits
from everstep.proto.errors import EverstepError

LIMITS = {"pause_s": 0.1, "agent_start_s": 20.0, "setup_s": 15.0, "seal_s": 10.0, "close_s": 15.0}
COMMON = 1_000_003
"""Stands for the rank in what all ranks hold alike."""


def content(rank: int, step: int, launch: int, size_bytes: int) -> torch.Tensor:
    """What a tensor of one rank holds after a step."""
    source = np.random.Philox(key=(rank << 64) + (launch << 40) + step)
    words = source.random_raw(-(-size_bytes // 8))
    return torch.from_numpy(words.view(np.uint8)[:size_bytes].copy())


class Trainer:
    """One rank; each public method is a command."""

    def __init__(self, arm: Callable[[str], None]) -> None:
        self._arm = arm
        self._handles: dict[int, Any] = {}
        self._said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self._said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("everstep").addHandler(handler)

    def connect(
        self,
        address: str,
        rank: int,
        world: int,
        launch: int,
        size_bytes: int,
        common_bytes: int,
        job: str = "job",
        limits: dict[str, float] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Begin anew, as a restarted script would."""
        self._rank, self._launch, self._step = rank, launch, 0
        self._own_of = rank
        self._own = {"data": torch.zeros(size_bytes, dtype=torch.uint8), "step": 0, "launch": 0}
        self._model = torch.nn.Linear(common_bytes // 4, 1, bias=False)
        chosen = Limits(**{**LIMITS, **(limits or {})})
        self._client = connect(
            job,
            agent=address,
            rank=rank,
            world=world,
            launch_id=f"launch-{launch}",
            limits=chosen,
            **options,
        )
        # What DistributedDataParallel would have done, without its process group.
        self._client._ddp.add("model")
        self._client.attach(model=self._model, per_rank={"own": self._own})
        return {"incarnation": self._client.incarnation}

    def run(
        self,
        steps: int = 1,
        level: str = "memory",
        timeout: float = 10.0,
        pause_s: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Train; after each step take a snapshot, and wait for it if a level is given."""
        return [self._one(level, timeout, pause_s) for _ in range(steps)]

    def _one(self, level: str, timeout: float, pause_s: float) -> dict[str, Any]:
        self._fill(self._step + 1)
        stats = self._client.stats
        stalled_s, arranged_s = stats.stall_s, stats.setup_s
        handle = self._handles[self._step] = self._client.snapshot(self._step)
        line: dict[str, Any] = {
            "step": self._step,
            "incarnation": self._client.incarnation,
            "stall_s": stats.stall_s - stalled_s - (stats.setup_s - arranged_s),
            "error": "",
        }
        if level and not handle.skipped:
            try:
                handle.wait(level, timeout=timeout)
            except EverstepError as error:
                line["error"] = str(error)
        time.sleep(pause_s)
        said = {"skipped": handle.skipped, "dropped": handle.dropped, "state": handle.state}
        return line | said | {"levels": self._levels(handle)}

    def _levels(self, handle: Any) -> list[str]:
        return [level for level in LEVELS if handle.done(level)]

    def _fill(self, step: int) -> None:
        self._step, self._own_of = step, self._rank
        data = self._own["data"]
        data.copy_(content(self._rank, step, self._launch, data.numel()))
        self._own |= {"step": step, "launch": self._launch}
        with torch.no_grad():
            weight = self._model.weight
            common = content(COMMON, step, self._launch, weight.numel())
            weight.copy_(common.to(torch.float32).reshape(weight.shape))

    def wrong(self) -> str:
        """Why the state is not bit for bit that of the step which it claims to be; else empty."""
        step, launch, data = self._own["step"], self._own["launch"], self._own["data"]
        weight = self._model.weight.detach()
        problems = []
        if not torch.equal(data, content(self._own_of, step, launch, data.numel())):
            problems.append("own bytes")
        common = content(COMMON, step, launch, weight.numel()).to(torch.float32)
        if weight.numpy().tobytes() != common.numpy().tobytes():
            problems.append("common weight")
        return ", ".join(problems)

    def touched(self) -> bool:
        """Whether anything was ever loaded into what is attached, or trained."""
        return bool(self._own["step"] or self._own["data"].any())

    def restore(self, saved_world: int = 0, **options: Any) -> dict[str, Any]:
        """Restore, and check every byte; what other ranks saved is kept by each, new ones take it
        from the others in turn."""
        if saved_world:
            self._own_of = self._rank % saved_world
            options["on_resize"] = {"own": "keep"}
        begun = time.monotonic()
        step = self._client.restore(**options)
        taken_s = time.monotonic() - begun
        self._step = step or 0
        found = {"step": step, "launch": 0, "wrong": "", "seconds": taken_s}
        if step is not None:
            found |= {"launch": self._own["launch"], "wrong": self.wrong()}
            if self._own["step"] != step:
                found["wrong"] += f" the state is of step {self._own['step']}"
        levels = list(self._client.restored_from)
        return found | {"levels": levels, "rejected": list(self._client.rejected)}

    def heard(self) -> dict[str, list[str]]:
        """At which levels each snapshot of this process is committed, as it was told; by step."""
        return {str(step): self._levels(handle) for step, handle in self._handles.items()}

    def stats(self) -> dict[str, Any]:
        stats = self._client.stats
        return {"taken": stats.taken, "committed": stats.committed, "skipped": stats.skipped}

    def warned(self) -> list[str]:
        said, self._said[:] = list(self._said), []
        return said

    def close(self, timeout: float | None = None) -> None:
        self._client.close(timeout)


def serve(control: socket.socket, arm: Callable[[str], None]) -> None:
    """Do commands until the other side hangs up."""
    trainer = Trainer(arm)
    with control.makefile("rw", encoding="utf-8") as lines, contextlib.suppress(BrokenPipeError):
        for line in lines:
            command, options = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = {"result": getattr(trainer, command)(**options)}
            except Exception as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
