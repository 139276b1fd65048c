"""One embedded agent for all adapters' tests, and how to tell two runs apart."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from everstep.proto.places import default_places

DEADLINE_S = 30.0


class Killed(Exception):
    """What a test raises in the middle of a run."""


@pytest.fixture(scope="session", autouse=True)
def _agent() -> Iterator[None]:
    torch.set_num_threads(1)
    # In /tmp, since a socket's path must be short.
    home = Path(tempfile.mkdtemp(prefix="es-", dir="/tmp"))
    places = default_places({"EVERSTEP_HOME": str(home)}, os.getuid())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERSTEP_HOME", str(home))
        (home / "everstep.toml").write_text("[agent]\nmax_jobs = 512\n")
        patch.setenv("EVERSTEP_CONFIG", str(home / "everstep.toml"))
        yield
    for process in psutil.process_iter(["cmdline"]):
        if str(places.socket) in (process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
                process.wait(DEADLINE_S)
    shutil.rmtree(places.memory_dir, ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def job() -> str:
    """A name that no other test uses."""
    return f"job-{uuid.uuid4().hex[:12]}"


def digest(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> str:
    """Of every byte of a model's state and of its optimizers'."""
    tensors = [tensor for _, tensor in sorted(model.state_dict().items())]
    for optimizer in optimizers:
        for state in optimizer.state_dict()["state"].values():
            tensors += [value for _, value in sorted(state.items()) if torch.is_tensor(value)]
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()
