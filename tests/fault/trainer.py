"""The trainer of the fault tests: a small model, AdamW, everything deterministic.

It does one command at a time, each a JSON line on a socket, and answers each with a JSON line:
what came of it, or the error that a user would have seen. A digest is the SHA-256 of every byte of
model and optimizer, taken by the trainer itself, from its live tensors.
"""

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.client.limits import Limits
from everstep.proto.errors import EverstepError

LIMITS = {"pause_s": 0.1, "agent_start_s": 15.0, "setup_s": 15.0, "seal_s": 15.0, "close_s": 15.0}


class Warnings(logging.Handler):
    """What the user was told."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class Forked(torch.utils.data.Dataset[int]):
    """Says in which process an item was made, and does there what users' workers do by accident."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        assert self.client.snapshot(index, force=True).skipped
        return os.getpid()


class Trainer:
    """One process of a job; each public method is a command."""

    def __init__(self, arm: Callable[[str], None]) -> None:
        self._arm = arm
        self._handles: dict[int, Any] = {}
        self._warnings = Warnings()
        logging.getLogger("everstep").addHandler(self._warnings)

    def connect(
        self,
        address: str | None,
        job: str = "job",
        size: int = 384,
        seed: int = 1,
        limits: dict[str, float] | None = None,
        grown: bool = False,
        attach: bool = True,
        **options: Any,
    ) -> dict[str, Any]:
        """Build everything anew, as a restarted script would."""
        torch.manual_seed(seed)
        self._model = torch.nn.Sequential(
            torch.nn.Linear(size, size), torch.nn.Tanh(), torch.nn.Linear(size, size)
        )
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._progress = {"seen": 0}
        chosen = Limits(**{**LIMITS, **(limits or {})})
        self._client = connect(job, agent=address, limits=chosen, **options)
        if attach:
            self._client.attach(
                model=self._model, optimizer=self._optimizer, progress=self._progress
            )
        self._extra = torch.zeros(0)
        if grown:
            self.grow()
        self._step = 0
        return {"incarnation": self._client.incarnation}

    def arm(self, failpoints: str) -> None:
        self._arm(failpoints)

    def run(
        self,
        steps: int = 1,
        level: str = "",
        timeout: float = 20.0,
        snapshot: bool = True,
        force: bool = False,
        patient: bool = False,
    ) -> list[dict[str, Any]]:
        """Train; after each step take a snapshot, and wait for it if a level is given."""
        slice_s = timeout if patient else 0.1
        return [self._one(level, timeout, snapshot, force, slice_s) for _ in range(steps)]

    def _one(
        self, level: str, timeout: float, snapshot: bool, force: bool, slice_s: float = 0.1
    ) -> dict[str, Any]:
        stats = self._client.stats
        stalled_s = stats.stall_s
        loss = self._train()
        line: dict[str, Any] = {
            "incarnation": self._client.incarnation,
            "step": self._step,
            "loss": loss,
            "digest": self.digest(),
        }
        if snapshot:
            handle = self._handles[self._step] = self._client.snapshot(self._step, force=force)
            if level and not handle.skipped:
                line["error"] = self._wait(handle, level, timeout, slice_s)
            line |= {"skipped": handle.skipped, "dropped": handle.dropped, "state": handle.state}
        return line | {"stall_s": stats.stall_s - stalled_s}

    def _wait(self, handle: Any, level: str, timeout: float, slice_s: float) -> str:
        """Wait for a level, but not for an agent that is gone; what a user would be told."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                handle.wait(level, timeout=slice_s)
                return ""
            except EverstepError as error:
                late = time.monotonic() > deadline
                if late or not self._client._session.attached or "within" not in str(error):
                    return str(error)

    def _train(self) -> float:
        size = self._model[0].in_features
        loss = self._model(torch.randn(4, size)).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._step += 1
        self._progress["seen"] += 4
        return float(loss)

    def torn_step(self, mark: str) -> dict[str, Any]:
        """Change a weight behind the optimizer's back while it is copied."""
        line = self._one("", 0.0, True, False)
        with torch.no_grad():
            self._model[0].weight.mul_(1.5)
        Path(mark).touch()
        handle = self._handles[self._step]
        handle.wait("memory", timeout=10.0)
        return line | {"dropped": handle.dropped, "state": handle.state}

    def replace(self) -> None:
        """Move every weight and its optimizer state to new memory, as offloading does."""
        for parameter in self._model.parameters():
            parameter.data = parameter.data.clone()
            state = self._optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].clone()

    def identity(self) -> dict[str, Any]:
        """What this trainer's calls carry."""
        own = self._client._session.identity
        names = ("job", "rank", "world", "process_id", "incarnation")
        return {name: getattr(own, name) for name in names}

    def ended(self) -> str:
        """Why this process can never attach again; empty while it can."""
        return str(self._client._session.ended or "")

    def digest(self) -> str:
        """Of every byte of model and optimizer, and of the attached counters."""
        whole = hashlib.sha256(json.dumps(self._progress).encode())
        for name, tensor in self._model.state_dict().items():
            whole.update(name.encode() + tensor.numpy().tobytes())
        for index, state in sorted(self._optimizer.state_dict()["state"].items()):
            for key, value in sorted(state.items()):
                whole.update(f"{index}.{key}".encode() + value.numpy().tobytes())
        whole.update(self._extra.numpy().tobytes())
        return whole.hexdigest()

    def restore(self, **options: Any) -> dict[str, Any]:
        return self._back(self._client.restore(**options))

    def rewind(self, to: int | None = None) -> dict[str, Any]:
        return self._back(self._client.rewind(to))

    def _back(self, step: int | None) -> dict[str, Any]:
        self._step = step or 0
        return {"step": step, "digest": self.digest(), "rejected": list(self._client.rejected)}

    def grow(self) -> None:
        """More state from now on: another layout, a larger arena."""
        self._extra = torch.rand(700_000)
        self._client.attach(extra={"noise": self._extra})

    def diverge(self, seed: int) -> None:
        """Draw other random numbers from now on, so that a step taken again is another step."""
        torch.manual_seed(seed)

    def waited(self, step: int, level: str = "memory", timeout: float = 20.0) -> str:
        """How an earlier snapshot came out."""
        self._handles[step].wait(level, timeout=timeout)
        return str(self._handles[step].state)

    def until_committed(self, level: str = "memory", within_s: float = 20.0) -> list[Any]:
        """Train until a snapshot gets through again; every step on the way."""
        deadline = time.monotonic() + within_s
        lines = []
        while time.monotonic() < deadline:
            lines += self.run(1, level)
            if lines[-1]["state"] in ("memory", "nvme"):
                return lines
            # What a step of a real model would take.
            time.sleep(0.02)
        raise TimeoutError(f"nothing was committed any more: {lines[-3:]}")

    def until_refused(self, fact: str, within_s: float = 20.0) -> list[Any]:
        """Train until a snapshot is skipped for a reason."""
        deadline = time.monotonic() + within_s
        lines = self.run(1)
        while fact not in lines[-1]["skipped"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{fact} is never said: {lines[-1]}")
            time.sleep(0.02)
            lines += self.run(1)
        return lines

    def until_attached(self, within_s: float = 20.0) -> list[Any]:
        """Train without snapshots until the agent is back."""
        deadline = time.monotonic() + within_s
        lines = []
        while not self._client._session.attached and time.monotonic() < deadline:
            lines += self.run(1, snapshot=False)
            time.sleep(0.02)
        return [{**line, "state": ""} for line in lines]

    def loader(self) -> dict[str, Any]:
        """Items from forked workers, one epoch."""
        loader = torch.utils.data.DataLoader(
            Forked(self._client), num_workers=2, multiprocessing_context="fork", timeout=30
        )
        pids = {int(item) for item in loader}
        return {"workers": len(pids - {os.getpid()}), "own": os.getpid() in pids}

    def stats(self) -> dict[str, Any]:
        stats = self._client.stats
        names = ("taken", "committed", "dropped", "skipped", "stall_s")
        return {name: getattr(stats, name) for name in names}

    def warned(self) -> list[str]:
        """What was logged for the user since the last time."""
        said, self._warnings.messages = self._warnings.messages, []
        return said

    def close(self, timeout: float | None = None) -> None:
        self._client.close(timeout)

    def descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))


def serve(control: socket.socket, arm: Callable[[str], None]) -> None:
    """Do commands until the other side hangs up."""
    trainer = Trainer(arm)
    with control.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            command, options = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = {"result": getattr(trainer, command)(**options)}
            except Exception as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
