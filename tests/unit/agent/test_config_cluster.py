"""Options of agents that have peers: how they are given, what they lead to, what is refused."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from everstep.agent.config import Config, load
from everstep.agent.options import Interval
from everstep.proto.errors import InvalidConfiguration, InvalidName

ENVIRON = {"EVERSTEP_HOME": "/data/run"}
LISTENING = {"agent.listen": "127.0.0.1:7400"}
PEERS = ["n1=10.0.0.1:7400", "n2=host-2.x:7400", "n3=[fd00::3]:7400"]


def loaded(environ: dict[str, str] | None = None, **given: Any) -> Config:
    options = {name.replace("__", "."): value for name, value in given.items()}
    return load(None, LISTENING | options, ENVIRON | (environ or {}))


def test_alone_by_default() -> None:
    config = load(None, {}, ENVIRON)
    assert not config.cluster.configured
    assert config.parity.parities is None
    assert config.parity.interval == Interval(every_steps=1)
    assert config.address == config.bulk_listen == ""
    assert config.memory.slots == 2


def test_peers_and_labels(tmp_path: Path) -> None:
    file = tmp_path / "everstep.toml"
    file.write_text(
        '[agent]\nnode_id = "n1"\nlisten = "127.0.0.1:7400"\n'
        f"[cluster]\npeers = {PEERS}\nlabels = ['rack=a', 'power=2']\n[parity]\nparities = 2\n"
    )
    config = load(file, {}, ENVIRON)
    assert dict(config.cluster.peers) == {
        "n1": "10.0.0.1:7400",
        "n2": "host-2.x:7400",
        "n3": "[fd00::3]:7400",
    }
    assert config.cluster.labels == (("power", "2"), ("rack", "a"))
    assert config.parity.parities == 2
    assert load(file, {"parity.parities": "auto"}, ENVIRON).parity.parities is None
    assert load(file, {"parity.parities": "0"}, ENVIRON).parity.parities == 0


@pytest.mark.parametrize(
    "source",
    [
        {"peers": PEERS},
        {"peers_dns": "agents:7400"},
        {"peers_slurm": "n[1-3]:7400"},
        {"peers_file": "/etc/peers"},
    ],
)
def test_peers_with_parity_take_a_third_slot(source: dict[str, Any]) -> None:
    given = {f"cluster__{name}": value for name, value in source.items()}
    assert loaded(**given).memory.slots == 3
    assert loaded(**given, memory__slots="auto").memory.slots == 3
    assert loaded(**given, memory__slots=2).memory.slots == 2
    assert loaded(**given, parity__parities=0).memory.slots == 2
    with pytest.raises(InvalidConfiguration, match=r"needs agent\.listen") as raised:
        loaded(**given, agent__listen="")
    assert raised.value.option == f"cluster.{next(iter(source))}"


def test_the_nodes_of_a_slurm_job() -> None:
    job = {"SLURM_JOB_NODELIST": "gpu[001-002]", "SLURMD_NODENAME": "gpu002"}
    config = loaded(job, cluster__peers_slurm="7400")
    assert config.cluster.peers_slurm == "gpu[001-002]:7400"
    assert config.agent.node_id == "gpu002"
    assert loaded(job, cluster__peers_slurm=7400, agent__node_id="x").agent.node_id == "x"
    assert loaded(job).agent.node_id != "gpu002", "only where Slurm names the others, too"
    with pytest.raises(InvalidConfiguration, match="SLURM_JOB_NODELIST is not set"):
        loaded(cluster__peers_slurm="7400")
    with pytest.raises(InvalidConfiguration, match="SLURM_JOB_NODELIST in the environment"):
        loaded({"SLURM_JOB_NODELIST": "gpu[1-"}, cluster__peers_slurm="7400")
    with pytest.raises(InvalidName):
        loaded({**job, "SLURMD_NODENAME": "../up"}, cluster__peers_slurm="7400")


@pytest.mark.parametrize(
    ("given", "address", "bulk"),
    [
        ({"agent.listen": "10.0.0.7:7400"}, "10.0.0.7:7400", "10.0.0.7:0"),
        ({"agent.listen": "[fd00::7]:7400"}, "[fd00::7]:7400", "[fd00::7]:0"),
        ({"agent.listen": "127.0.0.1:0"}, "127.0.0.1:0", "127.0.0.1:0"),
        (
            {"agent.listen": "0.0.0.0:7400", "cluster.peers": PEERS, "agent.node_id": "n1"},
            "10.0.0.1:7400",
            "0.0.0.0:0",
        ),
        (
            {"agent.listen": "10.0.0.7:7400", "cluster.address": "outside:1"},
            "outside:1",
            "10.0.0.7:0",
        ),
        (
            {"agent.listen": "10.0.0.7:7400", "bulk.listen": "10.1.0.7:7500"},
            "10.0.0.7:7400",
            "10.1.0.7:7500",
        ),
    ],
)
def test_where_others_reach_an_agent(given: dict[str, Any], address: str, bulk: str) -> None:
    config = load(None, {"agent.insecure": True} | given, ENVIRON)
    assert config.address == address
    assert config.bulk_listen == bulk


def test_an_agent_on_all_addresses_is_reached_by_its_host_name() -> None:
    address = loaded(agent__listen="0.0.0.0:7400", agent__insecure=True).address
    assert address.endswith(":7400") and not address.startswith("0.")


REFUSED: list[tuple[str, Any]] = [
    ("cluster.peers", "n1=10.0.0.1:7400"),
    ("cluster.peers", [7400]),
    ("cluster.peers", ["10.0.0.1:7400"]),
    ("cluster.peers", ["n1=10.0.0.1"]),
    ("cluster.peers", ["n1=10.0.0.1:0"]),
    ("cluster.peers", ["n1=0.0.0.0:7400"]),
    ("cluster.peers", ["../n1=10.0.0.1:7400"]),
    ("cluster.peers", ["=10.0.0.1:7400"]),
    ("cluster.peers", ["n1=10.0.0.1:7400", "n1=10.0.0.2:7400"]),
    ("cluster.peers", ["n1=10.0.0.1:7400", "n2=10.0.0.1:7400"]),
    ("cluster.peers_dns", "agents"),
    ("cluster.peers_slurm", "gpu[1-3]"),
    ("cluster.peers_slurm", "gpu[1-:7400"),
    ("cluster.peers_slurm", "99999"),
    ("cluster.peers_slurm", True),
    ("cluster.peers_file", "peers"),
    ("cluster.address", "0.0.0.0:7400"),
    ("cluster.address", "host:0"),
    ("cluster.replaces", "self"),
    ("cluster.replaces", "n1"),
    ("cluster.labels", ["rack"]),
    ("cluster.labels", ["rack=a", "rack=b"]),
    ("cluster.labels", ["rack=a b"]),
    ("cluster.labels", [f"l{i}=x" for i in range(17)]),
    ("cluster.suspect_after_s", 2.9),
    ("cluster.heartbeat_s", 0),
    ("parity.parities", -1),
    ("parity.parities", 17),
    ("parity.parities", "two"),
    ("parity.parities", True),
    ("parity.group_size", 1),
    ("parity.group_size", 256),
    ("parity.timeout_s", 0),
    ("parity.interval", "1"),
    ("bulk.listen", "0.0.0.0:7500"),
    ("bulk.max_streams", 0),
    ("bulk.buffer_bytes", "1 MiB"),
]


@pytest.mark.parametrize(("option", "value"), REFUSED)
def test_refused_values_name_the_option(option: str, value: object) -> None:
    with pytest.raises(InvalidConfiguration) as raised:
        load(None, LISTENING | {"agent.node_id": "self", option: value}, ENVIRON)
    assert raised.value.option == option


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(InvalidConfiguration, match="cannot survive the loss of 2"):
        loaded(parity__parities=2, parity__group_size=2)
    assert loaded(parity__parities=2, parity__group_size=3).parity.group_size == 3
    with pytest.raises(InvalidConfiguration, match="needs other agents") as raised:
        load(None, {"parity.parities": 1}, ENVIRON)
    assert raised.value.option == "parity.parities"
    with pytest.raises(InvalidConfiguration, match=r"needs agent\.listen"):
        load(None, {"bulk.listen": "127.0.0.1:7500"}, ENVIRON)
    with pytest.raises(InvalidName):
        loaded(cluster__replaces="../n1")
    assert loaded(cluster__replaces="n1", cluster__peers=PEERS).cluster.replaces == "n1"


def test_bulk_beyond_loopback_needs_tls_or_a_word_too() -> None:
    assert loaded(bulk__listen="0.0.0.0:7500", agent__insecure=True).bulk_listen == "0.0.0.0:7500"
    pems = {f"tls__{name}": f"/etc/{name}" for name in ("certificate", "key", "authority")}
    assert loaded(bulk__listen="0.0.0.0:7500", **pems).bulk_listen == "0.0.0.0:7500"


def test_the_example_for_kubernetes_is_accepted(tmp_path: Path) -> None:
    folder = Path(__file__).parents[3] / "deploy/kubernetes"
    text = (folder / "cluster.yaml").read_text().partition("everstep.toml: |\n")[2]
    file = tmp_path / "everstep.toml"
    file.write_text(textwrap.dedent(text.partition("\n---")[0]))
    patch = (folder / "cluster-patch.yaml").read_text()
    flags = dict(re.findall(r"^ +- --([a-z-]+)=?(.*)$", patch, re.MULTILINE))
    assert flags == {"node-id": "$(NODE_NAME)", "listen": "$(POD_IP):7400", "insecure": ""}
    given = {"agent.node_id": "gpu-7", "agent.listen": "10.1.2.3:7400", "agent.insecure": True}
    config = load(file, given, ENVIRON)
    assert config.cluster.peers_dns == "everstep-agents:7400"
    assert config.address == "10.1.2.3:7400"
    assert config.bulk_listen.endswith(":7401")
