"""Seeds from a list, a name, Slurm and a file; and what is said when they are wrong."""

from pathlib import Path
from typing import Any

import pytest

from everstep.agent.cluster_options import ClusterOptions
from everstep.agent.config import load
from everstep.agent.discovery import Discovery, addresses_of, parsed_peers, slurm_seeds, united
from everstep.agent.options import expanded_nodes
from everstep.proto.errors import InvalidConfiguration


def found(resolve: Any = None, **options: Any) -> Discovery:
    listen = {"agent.listen": "127.0.0.1:7400"}
    given = listen | {f"cluster.{name}": value for name, value in options.items()}
    cluster = load(None, given, {"EVERSTEP_HOME": "/data/run"}).cluster
    return Discovery(cluster) if resolve is None else Discovery(cluster, resolve)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n5", ["n5"]),
        ("gpu[001-003,7],n5", ["gpu001", "gpu002", "gpu003", "gpu7", "n5"]),
        ("gpu[9-11]", ["gpu9", "gpu10", "gpu11"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
        ("a,b[3],c", ["a", "b3", "c"]),
    ],
)
def test_slurm_node_lists(text: str, names: list[str]) -> None:
    assert list(expanded_nodes(text)) == names


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,,b",
        "gpu[",
        "gpu[1-3",
        "gpu]1[",
        "gpu[]",
        "gpu[3-1]",
        "gpu[1-a]",
        "gpu[1-99999999]",
        "r[1-1000]n[1-1000]",
        "a[1-300]b[1-300],c",
        "n1,n1",
        "../up",
        "n 1",
        "gpu[1-2][",
        "[" * 2000,
    ],
)
def test_what_is_no_node_list(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        expanded_nodes(text)


def test_slurm_nodes_are_agents_named_as_the_nodes() -> None:
    assert slurm_seeds("n[1-2]:7400") == (("n1", "n1:7400"), ("n2", "n2:7400"))


def test_nothing_named_is_nobody() -> None:
    discovery = Discovery(ClusterOptions())
    assert discovery.seeds() == ()
    assert not discovery.changes


def test_all_sources_together(tmp_path: Path) -> None:
    file = tmp_path / "peers"
    file.write_text("# all of them\n\nn3=10.0.0.3:1  # the third\nn1=10.0.0.1:1\n")
    discovery = found(
        lambda host, port: ("10.0.0.3:1", f"10.0.0.9:{port}") if host == "agents" else (),
        peers=["n1=10.0.0.1:1"],
        peers_dns="agents:9",
        peers_slurm="gpu[1-2]:1",
        peers_file=file,
    )
    assert discovery.seeds() == (
        ("", "10.0.0.9:9"),
        ("gpu1", "gpu1:1"),
        ("gpu2", "gpu2:1"),
        ("n1", "10.0.0.1:1"),
        ("n3", "10.0.0.3:1"),
    )
    assert discovery.changes


@pytest.mark.parametrize(
    ("text", "line"),
    [("n1=h:1\nn2", "line 2"), ("=h:1", "line 1"), ("n1=h", "line 1"), ("n1=0.0.0.0:1", "line 1")],
)
def test_a_line_that_is_wrong_is_named(text: str, line: str) -> None:
    with pytest.raises(InvalidConfiguration, match="/etc/peers") as raised:
        parsed_peers(text, "/etc/peers")
    assert raised.value.option == line


@pytest.mark.parametrize("seeds", [[("n1", "a:1"), ("n1", "b:1")], [("n1", "a:1"), ("n2", "a:1")]])
def test_contradictions_name_both_sources(seeds: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidConfiguration, match="one place") as raised:
        united([("one place", seeds[:1]), ("another", seeds[1:])])
    assert raised.value.source == "another"
    assert united([("one place", seeds[:1]), ("another", seeds[:1])]) == (seeds[0],)


def test_a_file_is_read_again_when_it_changed_and_kept_while_it_is_bad(tmp_path: Path) -> None:
    file = tmp_path / "peers"
    discovery = found(peers_file=file)
    for write in (lambda: None, lambda: file.write_bytes(b"\xff"), lambda: file.write_text("x")):
        write()
        with pytest.raises(InvalidConfiguration, match=str(file)):
            discovery.seeds()
    file.write_text("n1=a:1\n")
    assert discovery.seeds() == (("n1", "a:1"),)
    file.write_text("n1=a:1\nn2=\n")
    assert discovery.seeds() == (("n1", "a:1"),)
    assert "line 2" in discovery.problem
    file.unlink()
    assert discovery.seeds() == (("n1", "a:1"),)
    assert "cannot be read" in discovery.problem
    file.write_text("n1=a:1\nn2=b:1\n")
    assert discovery.seeds() == (("n1", "a:1"), ("n2", "b:1"))
    assert not discovery.problem


def test_a_file_without_end_is_not_read_whole() -> None:
    with pytest.raises(InvalidConfiguration, match="too large"):
        found(peers_file="/dev/zero").seeds()


def test_names_that_do_not_resolve_keep_what_they_had() -> None:
    answers: list[tuple[str, ...] | OSError] = [
        OSError(-2, "no such name"),
        ("10.0.0.1:1", "10.0.0.2:1"),
        OSError(-3, "try again"),
    ]

    def resolve(host: str, port: int) -> tuple[str, ...]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    discovery = found(resolve, peers_dns="agents:1")
    assert discovery.seeds() == ()
    assert "agents cannot be resolved (no such name)" in discovery.problem
    both = (("", "10.0.0.1:1"), ("", "10.0.0.2:1"))
    assert discovery.seeds() == both
    assert not discovery.problem
    assert discovery.seeds() == both
    assert "try again" in discovery.problem


def test_real_names() -> None:
    assert "127.0.0.1:7400" in addresses_of("localhost", 7400)
    assert addresses_of("::1", 7400) == ("[::1]:7400",)
