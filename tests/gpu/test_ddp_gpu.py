"""DDP with NCCL on two devices: each rank copies half of what is equal; all of it comes back."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.snapshot.layout import decode
from tests.integration.conftest import AgentProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices"),
]
Facts = list[dict[str, Any]]
Launch = Callable[..., dict[str, Facts]]
_LIMIT_S = 240.0


@pytest.fixture
def own_agent(start_agent: Callable[..., AgentProcess]) -> AgentProcess:
    return start_agent("[memory]\nslots = 5\n")


@pytest.fixture
def launch(own_agent: AgentProcess, tmp_path: Path) -> Launch:
    """Runs torchrun with the script ranks_gpu.py to its end; what each rank wrote, by phase."""

    def launched(*phases: str) -> dict[str, Facts]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", str(Path(__file__).parent / "ranks_gpu.py")]
        command += [*phases, "--out", str(tmp_path)]
        environ = {"EVERSTEP_AGENT": own_agent.address, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **environ},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return {
            phase: [json.loads((tmp_path / f"{phase}-{rank}.json").read_text()) for rank in (0, 1)]
            for phase in phases
        }

    return launched


def test_two_ranks_share_what_is_equal(own_agent: AgentProcess, launch: Launch) -> None:
    seen = launch("save")["save"]
    assert all(rank["committed"] for rank in seen)
    # What DDP keeps equal is, and the rest is each rank's own: else nothing below would count.
    for name in ("weights", "optimizer"):
        assert seen[0]["at 8"][name] == seen[1]["at 8"][name]
    for name in ("buffers", "residual", "generator"):
        assert seen[0]["at 8"][name] != seen[1]["at 8"][name]
    check_halves(own_agent)

    again = launch("load")["load"]
    assert [rank["start"] for rank in again] == [8, 8]
    assert [rank["restored"] for rank in again] == [rank["at 8"] for rank in seen]
    assert all(rank["committed"] for rank in again)


def check_halves(agent: AgentProcess) -> None:
    """Each rank holds half of every replicated byte, digested with a sample of each leaf."""
    held = [one for one in agent.memory.records("ddp") if one.snapshot.step == 8]
    assert sorted(one.rank for one in held) == [0, 1]
    for one in held:
        layout = decode(agent.memory.layout("ddp", one.record.layout_id), "layout")
        replicated = [leaf for leaf in layout.leaves if leaf.replicated]
        held_bytes = sum(leaf.held_bytes for leaf in replicated)
        whole_bytes = sum(leaf.whole_bytes for leaf in replicated)
        assert whole_bytes >= 3 * 4 * 2 * 600 * 600
        assert abs(held_bytes - whole_bytes / 2) <= 64 * 1024
        own = {leaf.name for leaf in layout.leaves if not leaf.replicated}
        assert {"model/1.running_mean", "own/residual"} <= own
        assert len(one.record.replica_samples) == 8 * (2 + len(replicated))


def test_a_replica_that_drifts_is_noticed(launch: Launch) -> None:
    for rank in launch("drift")["drift"]:
        assert rank["before"]
        committed, reason = rank["drifted"]
        assert not committed
        assert "model/2.weight" in reason
        assert "model/0.weight" not in reason
        assert rank["after"]
        assert rank["rewound to"] == 3
        assert rank["same again"]
