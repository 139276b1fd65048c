"""Each example is killed with SIGKILL, started again, and ends as if it had been left alone."""

import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HOSTS = {
    "hf_trainer.py": "transformers",
    "lightning_fit.py": "lightning",
    "accelerate_loop.py": "accelerate",
    "deepspeed_engine.py": "deepspeed",
    "torchtitan_checkpointer.py": "torchtitan",
}


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.long
@pytest.mark.parametrize("example", HOSTS)
def test_killed_and_started_again(example: str, job: str) -> None:
    if importlib.util.find_spec(HOSTS[example]) is None:
        pytest.skip(f"pip install {HOSTS[example]}")
    alone = run(example, "--job", f"{job}-alone")
    assert alone.returncode == 0, alone.stderr[-2000:]
    killed = run(example, "--job", job, "--kill-at", "33")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    again = run(example, "--job", job)
    assert again.returncode == 0, again.stderr[-2000:]
    went_on = re.search(r"(?:goes|went) on at step (\d+)", again.stdout)
    assert went_on is not None
    assert 0 < int(went_on[1]) <= 33
    last = again.stdout.splitlines()[-1]
    assert re.fullmatch(r"step \d+, weights [0-9a-f]{64}", last)
    assert last == alone.stdout.splitlines()[-1]


def test_every_adapter_has_an_example() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*HOSTS, "train.py"}
