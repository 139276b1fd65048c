"""What the one-node benchmarks train, and the agent that they train beside."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

PARAMETERS = 50_000_000
WIDTH = 2048
ROWS = 96


@dataclass(slots=True)
class Training:
    """A multi-layer perceptron of 50 M fp32 parameters with fused AdamW: 600 MB of state."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batch: torch.Tensor

    @classmethod
    def start(cls, parameters: int = PARAMETERS) -> "Training":
        """Build it and take the first steps, which allocate the optimizer's state."""
        torch.manual_seed(0)
        layers: list[torch.nn.Module] = []
        for _ in range(max(1, parameters // (WIDTH * WIDTH))):
            layers += [torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU()]
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        training = cls(model, optimizer, torch.randn(ROWS, WIDTH))
        training.steps(2)
        return training

    def steps(self, count: int, after: Callable[[int], object] | None = None) -> float:
        """Take steps; return the seconds they took, `after` included."""
        begun = time.perf_counter()
        for step in range(count):
            loss = (self.model(self.batch) - self.batch).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)
            if after is not None:
                after(step)
        return time.perf_counter() - begun

    def state(self) -> dict[str, object]:
        """What a user would save."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    @property
    def state_bytes(self) -> int:
        """Of all tensors."""
        states = self.optimizer.state.values()
        tensors = [tensor for state in states for tensor in state.values()]
        return sum(t.nbytes for t in [*self.model.parameters(), *self.model.buffers(), *tensors])


@contextmanager
def agent(**options: str) -> Iterator[str]:
    """An agent of the benchmark's own; its address."""
    home = Path(tempfile.mkdtemp(prefix="everstep-bench-"))
    memory = Path(tempfile.mkdtemp(prefix="everstep-bench-", dir="/dev/shm"))
    command = [sys.executable, "-m", "everstep.agent", "agent"]
    given = {"socket": str(home / "a.sock"), "memory-dir": str(memory)} | options
    given.setdefault("nvme-dir", str(home / "nvme"))
    command += [word for name, value in given.items() for word in (f"--{name}", value)]
    log = (home / "log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, cwd=home)
    try:
        deadline = time.monotonic() + 20
        while not Path(given["socket"]).exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((home / "log").read_text())
            time.sleep(0.02)
        yield f"unix:{given['socket']}"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        log.close()
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)


@contextmanager
def scratch(parent: str) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="everstep-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def drop_page_cache(path: Path) -> None:
    """Make the next read of a file come from the disk."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
