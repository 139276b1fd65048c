"""Checkpoints of torch.distributed.checkpoint over Everstep: several ranks, under torchrun."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from everstep.dcp import EverstepReader, EverstepWriter

from .conftest import DEADLINE_S, AgentProcess
from .dcp_ranks import JOB, digests, sharded, state_of

LAUNCH_S = 150.0
Facts = list[dict[str, Any]]
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def run(agent_process: AgentProcess, tmp_path: Path) -> Iterator[Callable[..., dict[str, Facts]]]:
    """Runs phases of dcp_ranks.py in so many ranks; returns what each rank found, by phase."""
    started: list[subprocess.Popen[bytes]] = []

    def ran(world: int, *phases: str) -> dict[str, Facts]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(world), str(Path(__file__).parent / "dcp_ranks.py")]
        environ = {"EVERSTEP_AGENT": agent_process.address, "OMP_NUM_THREADS": "1"}
        with (tmp_path / "torchrun.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, *phases, "--out", str(tmp_path)],
                env={**os.environ, "PYTHONWARNINGS": "ignore", **environ},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        status = process.wait(LAUNCH_S)
        assert status == 0, (tmp_path / "torchrun.log").read_text()[-6000:]
        return {
            phase: [json.loads((tmp_path / f"{phase}-{r}.json").read_text()) for r in range(world)]
            for phase in phases
        }

    yield ran
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(DEADLINE_S)


def names_of_model(found: dict[str, str]) -> dict[str, str]:
    return {name: one for name, one in found.items() if name.startswith("model.")}


@pytest.mark.filterwarnings("ignore:torch.distributed is ")
def test_sharded_state_in_any_number_of_ranks(
    run: Callable[..., dict[str, Facts]], agent_process: AgentProcess
) -> None:
    first = run(2, "save", "tensor_parallel")
    saved = first["save"][0]["saved"]
    for rank in first["save"]:
        assert rank["saved"] == rank["loaded"] == saved
        assert not names_of_model(saved).items() <= rank["before"].items()
        assert rank["set"] == {name: saved[name] for name in rank["set"]}
        assert rank["trained"] == rank["expected"] != rank["set"]
    for rank in first["tensor_parallel"]:
        assert rank["found"]
        assert rank["found"] == {name: saved[name] for name in rank["found"]}
        assert rank["again"]["model.first.weight"] == saved["model.first.weight"]

    # One process, and no torch.distributed at all.
    options = {"agent": agent_process.address, "nvme_interval": 1}
    state = state_of(*sharded(5), step=0)
    dcp.load(state, storage_reader=EverstepReader(JOB, **options), checkpoint_id=1)
    assert digests(state) == {name: saved[name] for name in digests(state)}
    alone = state_of(*sharded(6), step=200)
    writer = EverstepWriter(JOB, level="nvme", **options)
    dcp.save(alone, storage_writer=writer, checkpoint_id=200)
    writer.close()

    for rank in run(3, "load")["load"]:
        assert rank["1"] == {name: saved[name] for name in rank["1"]}
        assert rank["200"] == digests(alone)


def test_saves_in_the_background_and_saves_that_fail(run: Callable[..., dict[str, Facts]]) -> None:
    found = run(2, "resharding", "sharded_tensors", "asynchronous", "failing")
    for rank in found["resharding"]:
        assert len(rank) == 9
        assert all(rank.values()), rank
    for rank in found["sharded_tensors"]:
        assert len(rank) == 16
        assert all(rank.values()), rank
    for rank in found["asynchronous"]:
        one, two = rank["saves"]
        assert [one["id"], two["id"], rank["id"]] == ["step-44", "step-45", "step-45"]
        assert one["saved"] != two["saved"] == rank["loaded"]
    for rank in found["failing"]:
        assert "ValueError: rank 1 cannot read it" in rank["broken"]
        # Whoever is first: the other rank is refused, or the coordinator notices.
        assert "captured already" in rank["differently"] or "saved steps" in rank["differently"]
        assert "step 55 is at no level" in rank["earlier"]
        assert "Missing key in checkpoint state_dict: other" in rank["missing"]
        assert "to torch.distributed.checkpoint, and" in rank["each alone"]
        assert rank["loaded"] == found["failing"][0]["loaded"] != rank["after"]
    assert [rank["group"] for rank in found["failing"]] == [3.0, None]
    # What each save fills its tensors with: nothing of a failed one is ever loaded.
    (loaded,) = {rank["loaded"]["own"] for rank in found["failing"]}
    (after,) = {rank["after"]["own"] for rank in found["failing"]}
    assert (loaded, after) == (filled(1.0), filled(4.0))


def filled(value: float) -> str:

    return str(digests({"own": torch.full((2,), value)})["own"])


@pytest.mark.long
def test_meshes_of_two_dimensions(run: Callable[..., dict[str, Facts]]) -> None:
    for rank in run(4, "two_dimensions")["two_dimensions"]:
        assert len(rank) == 16
        assert all(rank.values()), rank
