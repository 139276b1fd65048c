"""The story that this project is for: nodes die with all they hold, the job goes on bit for bit."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .clusters import AgentCluster, NodeTrainer

StartCluster = Callable[..., AgentCluster]
STEPS = 4
WIDTH = "600"


def train(
    cluster: AgentCluster, nodes: list[str], until: int, *arguments: str
) -> list[dict[str, Any]]:
    """Run one rank on each node; what each said at its start and at its end."""
    trainers = [
        cluster.trainer(node, rank, len(nodes), "--until", str(until), "--width", WIDTH, *arguments)
        for rank, node in enumerate(nodes)
    ]
    ends = [trainer.until(event="end") for trainer in trainers]
    starts = [trainer.said[0] for trainer in trainers]
    committed = [fact for t in trainers for fact in t.said if fact["event"] == "step"]
    assert all(fact["committed"] for fact in committed), committed
    for trainer in trainers:
        assert trainer.ended() == 0, trainer.words()
    return [
        {"start": start["step"], "restored": start["digest"], "end": end["digest"]}
        for start, end in zip(starts, ends, strict=True)
    ]


def undisturbed(cluster: AgentCluster, world: int, until: int) -> list[str]:
    """Digests of the same run without anything going wrong, and without Everstep."""
    trainers: list[NodeTrainer] = [
        cluster.trainer("n1", rank, world, "--until", str(until), "--width", WIDTH, "--alone")
        for rank in range(world)
    ]
    return [str(trainer.until(event="end")["digest"]) for trainer in trainers]


@pytest.mark.parametrize(
    ("count", "parities"), [(3, 1), pytest.param(4, 2, marks=pytest.mark.long)]
)
def test_as_many_nodes_as_there_are_parities(
    start_cluster: StartCluster, count: int, parities: int
) -> None:
    cluster = start_cluster(
        count, options=f"[parity]\nparities = {parities}\n[nvme]\ninterval = 'off'"
    )
    nodes = [f"n{number}" for number in range(1, count + 1)]
    before = train(cluster, nodes, STEPS, "--level", "parity")
    lost = nodes[:parities]  # the coordinator among them
    for node in lost:
        cluster.kill(node)
        cluster.wipe(node, nvme=True)
    replaced = {old: f"n{10 + index}" for index, old in enumerate(lost)}
    for old, new in replaced.items():
        cluster.replace(old, new)
    nodes = [replaced.get(node, node) for node in nodes]
    after = train(cluster, nodes, 2 * STEPS, "--level", "parity")
    assert [each["start"] for each in after] == [STEPS] * count
    assert [each["restored"] for each in after] == [each["end"] for each in before]
    assert [each["end"] for each in after] == undisturbed(cluster, count, 2 * STEPS)


def test_one_more_than_there_are_parities_goes_back_to_disk(start_cluster: StartCluster) -> None:
    """Disks of all nodes are there; their memory is not: the newest whole step is an older one."""
    cluster = start_cluster(3, options="[parity]\nparities = 1\n[nvme]\ninterval = '4 steps'")
    nodes = ["n1", "n2", "n3"]
    trainers = [
        cluster.trainer(node, rank, 3, "--until", "6", "--level", "parity", "--linger")
        for rank, node in enumerate(nodes)
    ]
    fourth = [trainer.until(event="step", step=4)["digest"] for trainer in trainers]
    for trainer in trainers:
        trainer.until(event="end")
        trainer.kill()
    for node in nodes[1:]:
        cluster.kill(node)
        cluster.wipe(node)
    for node in nodes[1:]:
        cluster.restart(node)
    cluster.await_members(3)
    again = [cluster.trainer(node, rank, 3, "--until", "7") for rank, node in enumerate(nodes)]
    starts = [trainer.until(event="start") for trainer in again]
    step = starts[0]["step"]
    # Whoever's trainer died first made its node flush what was newest then.
    assert step in (4, 6)
    ends = [trainer.said for trainer in trainers]
    wanted = [
        next(f["digest"] for f in said if f["event"] == "step" and f["step"] == step)
        for said in ends
    ]
    assert [start["digest"] for start in starts] == wanted
    assert fourth == wanted or step == 6
    for trainer in again:
        assert trainer.ended() == 0


@pytest.mark.long
def test_all_memory_and_one_disk(start_cluster: StartCluster) -> None:
    """Power goes everywhere, one disk does not come back: NVMe of p - m nodes is enough."""
    cluster = start_cluster(3, options="[parity]\nparities = 1\n[nvme]\ninterval = '2 steps'")
    nodes = ["n1", "n2", "n3"]
    before = train(cluster, nodes, STEPS, "--level", "parity")
    for node in nodes:
        cluster.kill(node)
        cluster.wipe(node, nvme=node == "n2")
    for node in nodes:
        cluster[node].start([f"{n}={cluster[n].endpoint}" for n in nodes])
    for node in nodes:
        cluster[node].await_answer()
    cluster.await_members(3)
    after = train(cluster, nodes, 2 * STEPS)
    assert [each["start"] for each in after] == [STEPS] * 3
    assert [each["restored"] for each in after] == [each["end"] for each in before]


@pytest.mark.long
def test_agents_restarted_one_by_one_lose_nothing(start_cluster: StartCluster) -> None:
    """Trainers go on meanwhile; what was in memory before is restored after."""
    cluster = start_cluster(3, options="[nvme]\ninterval = 'off'")
    nodes = ["n1", "n2", "n3"]
    before = train(cluster, nodes, STEPS, "--level", "parity")
    for node in nodes:
        cluster.restart(node)
        cluster.await_members(3)
    after = train(cluster, nodes, STEPS + 1, "--level", "parity")
    assert [each["restored"] for each in after] == [each["end"] for each in before]


def certificates(folder: Path) -> str:
    """A [tls] section with a throw-away authority's files."""
    if shutil.which("openssl") is None:
        pytest.skip("making certificates needs the openssl command")

    def openssl(words: str) -> None:
        subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True)

    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    openssl(f"req -x509 {key} -keyout ca.key -out ca.crt -days 2 -subj /CN=ca")
    openssl(f"req {key} -keyout node.key -out node.csr -subj /CN=node")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        "x509 -req -in node.csr -CA ca.crt -CAkey ca.key -CAcreateserial "
        "-out node.crt -days 2 -extfile names"
    )
    return (
        f"[tls]\ncertificate = '{folder}/node.crt'\nkey = '{folder}/node.key'\n"
        f"authority = '{folder}/ca.crt'\n"
    )


def test_under_tls_too(start_cluster: StartCluster, tmp_path: Path) -> None:
    """Both planes: parity is committed, a node is lost, and decoded."""
    cluster = start_cluster(3, options=certificates(tmp_path))
    nodes = ["n1", "n2", "n3"]
    before = train(cluster, nodes, STEPS, "--level", "parity")
    cluster.kill("n3")
    cluster.wipe("n3", nvme=True)
    cluster.restart("n3")
    cluster.await_members(3)
    after = train(cluster, nodes, STEPS + 1, "--level", "parity")
    assert [each["restored"] for each in after] == [each["end"] for each in before]
