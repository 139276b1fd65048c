"""What people see of a cluster: status, plans and their outcome, verification, lists."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from everstep.agent.cli import app

from .clusters import AgentCluster, eventually

StartCluster = Callable[..., AgentCluster]
STEPS = 4
NVME_STEP = 2
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


def test_a_node_is_lost_and_recovered(start_cluster: StartCluster, cli: Cli) -> None:
    cluster = start_cluster(3, "[parity]\nparities = 1\n")
    trained(cluster)

    def settled() -> Any:
        job = job_of(cli("status", "--json", cluster=cluster, node="n3").document)
        return job["newest"].keys() == {"memory", "parity", "nvme"} and job

    safe = eventually(settled, "all levels")
    assert {level: one["step"] for level, one in safe["newest"].items()} == {
        "memory": STEPS,
        "parity": STEPS,
        "nvme": STEPS,
    }
    assert safe["recoverable"]["further_losses"] == 1
