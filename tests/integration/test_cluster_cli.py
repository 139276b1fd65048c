"""What people see of a cluster: status, plans and their outcome, verification, lists."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import everstep
from everstep.agent.cli import app

from .clusters import AgentCluster, eventually
from .conftest import AgentProcess

StartCluster = Callable[..., AgentCluster]
STEPS = 3
NVME_STEP = 2
PARITY = "[parity]\nparities = 1\n[nvme]\nflush_on_exit = false\n"
JOB = "gpt"


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a verb against a node's agent, or against none."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"EVERSTEP_HOME": str(tmp_path / "home"), "EVERSTEP_AGENT": None})

    def run(*words: object, cluster: AgentCluster | None = None, node: str = "n1") -> Outcome:
        said = [str(word) for word in words]
        if cluster is not None:
            said += ["--agent", cluster[node].address]
        result = runner.invoke(app, said)
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


def trained(cluster: AgentCluster, world: int = 3) -> None:
    """A rank on each node, trained for some steps, all with parity, one on NVMe; still attached."""
    words = ("--job", JOB, "--until", str(STEPS), "--level", "parity", "--linger")
    words += ("--nvme-interval", str(NVME_STEP))
    ranks = [cluster.trainer(f"n{rank + 1}", rank, world, *words) for rank in range(world)]
    for rank in ranks:
        rank.until(event="end")
        committed = [fact["committed"] for fact in rank.said if fact["event"] == "step"]
        assert committed == [True] * STEPS, rank.words()


def job_of(report: Any) -> Any:
    (job,) = report["cluster"]["jobs"]
    return job


def test_status_shows_the_membership(start_cluster: StartCluster) -> None:
    cluster = start_cluster(3)
    told = cluster.status("n2").cluster
    assert told.coordinator == "n1"
    assert [(m.node_id, m.state) for m in told.members] == [(f"n{i}", "live") for i in (1, 2, 3)]
    cluster.kill("n3")
    cluster.await_members(2)
    cluster.restart("n3")
    cluster.await_members(3)
    cluster.kill("n2")
    cluster.await_members(2)
    cluster.wipe("n2", nvme=True)
    cluster.replace("n2", "n4")
    cluster.await_members(3)
    states = {m.node_id: (m.state, m.replaced_by) for m in cluster.status("n1").cluster.members}
    assert states["n2"] == ("replaced", "n4")


def images(cluster: AgentCluster, node: str, step: int) -> dict[int, bytes]:
    """Every byte of a step's shards in a node's memory, by rank."""
    memory = cluster[node].memory
    found = {}
    for held in memory.records(JOB):
        if held.snapshot.step == step:
            with memory.open_shard(JOB, held.snapshot, held.rank) as shard:
                found[held.rank] = bytes(shard.image)
    return found


def newest(cluster: AgentCluster, cli: Cli, node: str) -> dict[str, int]:
    report = cli("status", "--json", cluster=cluster, node=node).document
    return {level: one["step"] for level, one in job_of(report)["newest"].items()}


def test_a_node_is_lost_and_recovered(start_cluster: StartCluster, cli: Cli) -> None:
    cluster = start_cluster(3, PARITY)
    trained(cluster)
    everywhere = {"memory": STEPS, "parity": STEPS, "nvme": NVME_STEP}
    eventually(lambda: newest(cluster, cli, "n3") == everywhere, "all levels")
    safe = job_of(cli("status", "--json", cluster=cluster, node="n3").document)
    assert safe["recoverable"]["further_losses"] == 1
    assert [f"{one['rank']}@{one['node_id']}" for one in safe["ranks"]] == ["0@n1", "1@n2", "2@n3"]
    assert [risk for risk in safe["at_risk"] if "NVMe" not in risk] == []
    assert f"goes back to step {NVME_STEP}" in safe["at_risk"][0]
    before = images(cluster, "n2", STEPS)
    assert before.keys() == {1}

    for trainer in cluster.trainers:
        trainer.kill()
    cluster.kill("n2")
    cluster.wipe("n2", nvme=True)
    cluster.await_members(2)
    weak = job_of(cli("status", "--json", cluster=cluster).document)
    assert weak["recoverable"]["further_losses"] == 0
    assert weak["silent"] == ["n2"]
    assert [group["missing"] for group in weak["groups"]] == [["n2"]]
    assert "the loss of one node" in cli("status", cluster=cluster).out
    row = cli("list", "--json", cluster=cluster).document["cluster"]["snapshots"][0]
    assert (row["step"], row["recoverable"], row["further_losses"]) == (STEPS, True, 0)

    cluster.replace("n2", "n4")
    words = ("recover", "--job", JOB, "--json")
    planned = cli(*words, "--dry-run", "--bytes-per-second", "1 MB", cluster=cluster).document
    moved = planned["destinations"][1]
    assert (moved["rank"], moved["node_id"], moved["reason"]) == (1, "n4", "n4 replaces n2")
    assert {one["to"] for one in planned["movements"] if "decoded" in one["what"]} == {"n4"}
    assert planned["expected_s"] > 0
    assert images(cluster, "n4", STEPS) == {}, "a dry run moves nothing"
    cluster.restart("n4", {"EVERSTEP_FAILPOINTS": "agent.mend.before_record=kill"})
    broken = cli(*words, "--yes", cluster=cluster)
    assert (broken.status, broken.document["recovered"]) == (1, False), broken
    assert [one["node_id"] for one in broken.document["nodes"] if one["problem"]] == ["n4"]
    assert images(cluster, "n4", STEPS) == {}, "all of a shard, or nothing"
    cluster.restart("n4")
    done = cli(*words, "--yes", cluster=cluster, node="n4")
    assert done.document.get("recovered"), done
    assert [one["node_id"] for one in done.document["nodes"]] == ["n4"]
    assert images(cluster, "n4", STEPS) == before

    def with_n4() -> Outcome | None:
        found = cli(*words, "--yes", cluster=cluster)
        late = "not reached, and counted as lost: n4" in found.document["problems"]
        return None if late else found

    again = eventually(with_n4, "n4 answering in time")
    assert (again.status, again.document["movements"]) == (0, []), again

    def protected() -> bool:
        job = job_of(cli("status", "--json", cluster=cluster, node="n4").document)
        plan = job["recoverable"]
        return bool(plan["memory_losses"] == 1 and not job["silent"])

    eventually(protected, "parity over the new group")


def test_what_rots_is_found_on_every_node_and_mended(start_cluster: StartCluster, cli: Cli) -> None:
    cluster = start_cluster(3, PARITY)
    trained(cluster)
    whole = images(cluster, "n1", STEPS)
    cluster["n1"].flip(JOB, STEPS, 0)
    words = ("verify", "--json", "--job", JOB, "--step", STEPS)
    found = cli(*words, cluster=cluster, node="n2")
    assert found.status == 1
    damaged = [(one["node_id"], one["level"], one["rank"]) for one in found.document["damaged"]]
    assert damaged == [("n1", "memory", 0)]
    assert images(cluster, "n1", STEPS) != whole, "nothing is repaired unasked"
    assert [one["step"] for one in found.document["usable"]] == [STEPS], "from parity"
    mended = cli(*words, "--repair", cluster=cluster, node="n2")
    assert mended.status == 0, mended
    assert [one["node_id"] for one in mended.document["repaired"]] == ["n1"]
    assert images(cluster, "n1", STEPS) == whole
    assert cli(*words, cluster=cluster, node="n3").status == 0

    for verb in ("status", "list", "verify"):
        outcome = cli(verb, "--job", "other", cluster=cluster)
        assert outcome.status == 2, verb
        assert f"it knows {JOB}" in outcome.err
    assert cli("recover", "--job", "other", "--dry-run", cluster=cluster).status == 1

    # All nodes restart with empty memory, and one of them lost its disk as well.
    for trainer in cluster.trainers:
        trainer.kill()
    nodes = [cluster[f"n{number}"] for number in (1, 2, 3)]
    for node in nodes:
        cluster.kill(node.node_id)
        cluster.wipe(node.node_id)
    disks = [word for node in (nodes[0], nodes[2]) for word in ("--nvme-dir", node.nvme_dir)]
    planned = cli("recover", "--dry-run", *disks, "--json")
    assert planned.status == 0, planned
    first = planned.document["snapshots"][0]
    assert (first["levels"], first["decoded_ranks"]) == (["nvme"], [1])
    assert cli("verify", *disks).status == 0
    (listed,) = cli("list", *disks[:2], "--json").document["cluster"]["snapshots"][:1]
    assert listed["recoverable"] is False
    assert "nothing is in reach of" in listed["missing"][0]
    lost = cli("recover", "--dry-run", *disks[:2], "--json")
    assert (lost.status, lost.document["chosen"]) == (1, None)
    assert cli("recover", *disks).status == 2, "nobody is there to move anything"


def test_an_agent_alone_recovers_what_it_has(agent_process: AgentProcess, cli: Cli) -> None:
    with everstep.connect(JOB, agent=agent_process.address, rank=0, world=1) as client:
        client.attach(model=torch.nn.Linear(8, 8))
        assert client.snapshot(3).wait("nvme")
    words = ("recover", "--job", JOB, "--agent", agent_process.address, "--json", "--yes")
    for levels in (["memory"], ["nvme"]):
        outcome = cli(*words)
        assert outcome.status == 0, outcome
        (snapshot,) = outcome.document["snapshots"]
        assert (snapshot["step"], snapshot["levels"]) == (3, levels)
        assert (outcome.document["recovered"], outcome.document["movements"]) == (True, [])
        agent_process.kill()
        shutil.rmtree(agent_process.memory_dir / JOB, ignore_errors=True)
        agent_process.start()
    assert cli("recover", "--job", "other", *words[3:]).status == 1
    report = cli("status", "--json", "--agent", agent_process.address).document
    assert report["cluster"] is None
