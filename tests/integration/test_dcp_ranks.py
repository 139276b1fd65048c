"""Checkpoints of torch.distributed.checkpoint over Everstep: several ranks and nodes."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from everstep.dcp import EverstepReader, EverstepWriter
from tests.zygotes import Program

from .clusters import AgentCluster
from .conftest import DEADLINE_S, AgentProcess
from .dcp_ranks import JOB, digests, sharded, state_of

LAUNCH_S = 150.0
Facts = list[dict[str, Any]]
Launch = Callable[..., dict[str, Facts]]
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Runs phases of dcp_ranks.py, one rank with each agent; returns what each found, by phase."""
    started: list[Program] = []

    def launched(agents: Sequence[str], *phases: str) -> dict[str, Facts]:
        meet = tmp_path / f"meet-{len(started)}"
        world = len(agents)
        log = tmp_path / "ranks.log"
        for rank, address in enumerate(agents):
            command = [str(Path(__file__).parent / "dcp_ranks.py"), *phases]
            command += ["--rank", str(rank), "--world", str(world)]
            command += ["--out", str(tmp_path), "--meet", str(meet)]
            environ = {"EVERSTEP_AGENT": address}
            started.append(Program("trainer", *command, environ=environ, log=log))
        deadline = time.monotonic() + LAUNCH_S
        for process in started[-world:]:
            status = process.wait(max(0.0, deadline - time.monotonic()))
            assert status == 0, log.read_text()[-6000:]
        return {
            phase: [json.loads((tmp_path / f"{phase}-{r}.json").read_text()) for r in range(world)]
            for phase in phases
        }

    yield launched
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait(DEADLINE_S)


@pytest.fixture
def run(agent_process: AgentProcess, launch: Launch) -> Launch:
    """The same on one node: so many ranks."""
    return lambda world, *phases: launch([agent_process.address] * world, *phases)


def names_of_model(found: dict[str, str]) -> dict[str, str]:
    return {name: one for name, one in found.items() if name.startswith("model.")}


@pytest.mark.filterwarnings("ignore:torch.distributed is ")
def test_sharded_state_in_any_number_of_ranks(run: Launch, agent_process: AgentProcess) -> None:
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


def test_saves_in_the_background_and_saves_that_fail(run: Launch) -> None:
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


@pytest.mark.filterwarnings("ignore:torch.distributed is ")
def test_nodes_that_are_lost_take_nothing_with_them(
    start_cluster: Callable[..., AgentCluster], launch: Launch
) -> None:
    cluster = start_cluster(2, options="[parity]\nparities = 1\n[nvme]\ninterval = 'off'")
    nodes = [cluster["n1"], cluster["n2"]]
    found = launch([node.address for node in nodes], "resharding", "protected")
    for rank in found["resharding"]:
        assert len(rank) == 9
        assert all(rank.values()), rank
    cluster.kill("n2")
    cluster.wipe("n2", nvme=True)
    state = {"w": torch.zeros(100_000), "step": 0}
    reader = EverstepReader(JOB, agent=nodes[0].address)
    dcp.load(state, storage_reader=reader, checkpoint_id=50)
    assert digests(state) == found["protected"][0] == found["protected"][1]
    reader.close()


@pytest.mark.long
def test_meshes_of_two_dimensions(run: Launch) -> None:
    for rank in run(4, "two_dimensions")["two_dimensions"]:
        assert len(rank) == 16
        assert all(rank.values()), rank
