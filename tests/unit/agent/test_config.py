"""Options: defaults, file, flags, and errors that name the option, the file and the remedy."""

import dataclasses
import os
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from everstep.agent import cluster_options
from everstep.agent import config as configuration
from everstep.agent.config import Config, load, option_names, safe_node_id
from everstep.agent.options import Interval
from everstep.proto.errors import InvalidConfiguration, InvalidName
from everstep.proto.places import default_places, private_socket

COMMENTED = Path(__file__).parents[3] / "deploy/everstep.toml"
ENVIRON = {"EVERSTEP_HOME": "/data/run"}


def written(directory: Path, text: str) -> Path:
    file = directory / "everstep.toml"
    file.write_text(text)
    return file


def value_of(config: Config, option: str) -> object:
    section, name = option.split(".")
    return getattr(getattr(config, section), name)


def test_the_commented_file_is_the_defaults_and_complete() -> None:
    assert load(COMMENTED, {}, ENVIRON) == load(None, {}, ENVIRON)
    tables = tomllib.loads(COMMENTED.read_text())
    named = [f"{section}.{name}" for section, table in tables.items() for name in table]
    assert named == list(option_names()), "every option, in the order of the dataclasses"


def test_every_option_of_the_commented_file_has_a_comment_above_it() -> None:
    lines = COMMENTED.read_text().splitlines()
    for before, line in pairwise(lines):
        if re.match(r"[a-z_]+ = ", line) and line != 'key = ""':
            assert before.startswith("#"), line


def test_every_field_has_a_docstring_under_it() -> None:
    modules = (configuration, cluster_options)
    source = "".join(Path(module.__file__).read_text() for module in modules)
    for option in option_names():
        name = option.split(".")[1]
        field = rf"^    {name}: [^\n]+(?:\n        [^\n]+|\n    \))*\n    \"\"\""
        assert re.search(field, source, re.MULTILINE), option


def test_configurations_cannot_be_changed() -> None:
    config = load(None, {}, ENVIRON)
    for section in dataclasses.fields(config):
        assert not hasattr(getattr(config, section.name), "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.memory.slots = 3  # type: ignore[misc]


def test_automatic_places() -> None:
    config = load(None, {}, ENVIRON)
    places = default_places(ENVIRON, os.getuid())
    assert config.agent.socket == places.socket
    assert config.agent.memory_dir == places.memory_dir
    assert config.agent.nvme_dir == places.nvme_dir
    assert config.lock == places.lock
    assert config.private_socket == private_socket(places.socket)


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, '[memory]\nslots = 3\ndigest_threads = 5\n[agent]\nnvme_dir = ""\n')
    config = load(file, {"memory.slots": 4, "agent.nvme_dir": None}, ENVIRON)
    assert (config.memory.slots, config.memory.digest_threads) == (4, 5)
    assert config.agent.nvme_dir is None
    assert load(file, {"agent.nvme_dir": "auto"}, ENVIRON).agent.nvme_dir is not None


def test_the_file_may_come_from_the_environment(tmp_path: Path) -> None:
    file = written(tmp_path, "[memory]\nslots = 3\n")
    assert load(None, {}, ENVIRON | {"EVERSTEP_CONFIG": str(file)}).memory.slots == 3
    other = tmp_path / "other.toml"
    other.touch()
    assert load(other, {}, ENVIRON | {"EVERSTEP_CONFIG": str(file)}).memory.slots == 2


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("memory.keep_free_bytes", 4096, 4096),
        ("memory.keep_free_bytes", "1.5 GiB", 3 << 29),
        ("memory.keep_free_bytes", "7MB", 7_000_000),
        ("memory.quota_bytes", "2 TiB", 2 << 40),
        ("nvme.interval", "off", Interval()),
        ("nvme.interval", "1 step", Interval(every_steps=1)),
        ("nvme.interval", "250 steps", Interval(every_steps=250)),
        ("nvme.interval", "90 s", Interval(every_s=90.0)),
        ("nvme.interval", "1.5 h", Interval(every_s=5400.0)),
        ("limits.declare_timeout_s", 5, 5.0),
        ("agent.allowed_uids", [0, 7, 7], frozenset({0, 7})),
        ("agent.memory_dir", Path("/dev/shm/a/../b"), Path("/dev/shm/b")),
        ("agent.listen", "127.0.0.1:7000", "127.0.0.1:7000"),
        ("agent.listen", "[::1]:7000", "[::1]:7000"),
        ("agent.node_id", "4", "4"),
        # Flags arrive as texts.
        ("memory.slots", "4", 4),
        ("nvme.direct", "false", False),
        ("agent.allowed_uids", "[1, 2]", frozenset({1, 2})),
        ("limits.restore_timeout_s", "2.5", 2.5),
    ],
)
def test_values(option: str, value: object, expected: object) -> None:
    assert value_of(load(None, {option: value}, ENVIRON), option) == expected


REFUSED: list[tuple[str, Any]] = [
    ("memory.slots", 1),
    ("memory.slots", 9),
    ("memory.slots", 2.0),
    ("memory.slots", True),
    ("memory.keep_free_bytes", -1),
    ("memory.keep_free_bytes", "512 Mib"),
    ("memory.keep_free_bytes", "-5 GiB"),
    ("memory.keep_free_bytes", "9" * 5000),
    ("memory.quota_bytes", 1.5),
    ("nvme.interval", "100"),
    ("nvme.interval", 100),
    ("nvme.interval", "0 steps"),
    ("nvme.interval", "1.5 steps"),
    ("nvme.interval", "0.5 s"),
    ("nvme.chunk_bytes", 4097),
    ("nvme.chunk_bytes", 0),
    ("nvme.direct", 1),
    ("nvme.keep_newest", 0),
    ("limits.declare_timeout_s", float("nan")),
    ("limits.declare_timeout_s", float("inf")),
    ("limits.declare_timeout_s", 0),
    ("limits.max_message_bytes", "2 GiB"),
    ("agent.log_level", "verbose"),
    ("agent.log_level", 3),
    ("agent.memory_dir", "relative"),
    ("agent.memory_dir", "~/x"),
    ("agent.memory_dir", ""),
    ("agent.socket", "/" + "x" * 107),
    ("agent.socket", "/" + "x" * 90 + "/agent.sock"),
    ("agent.allowed_uids", 7),
    ("agent.allowed_uids", [-1]),
    ("agent.allowed_uids", ["root"]),
    ("agent.listen", "7000"),
    ("agent.listen", "127.0.0.1:70000"),
    ("agent.listen", "0.0.0.0:7000"),
    ("agent.listen", "[::]:7000"),
    ("agent.listen", "node7:7000"),
    ("agent.nvme_dir", "/dev/shm/everstep-nvme/../everstep-x/nvme"),
]


@pytest.mark.parametrize(("option", "value"), REFUSED)
def test_refused_values_name_the_option(option: str, value: object) -> None:
    overrides = {"agent.memory_dir": "/dev/shm/everstep-x", option: value}
    with pytest.raises(InvalidConfiguration) as raised:
        load(None, overrides, ENVIRON)
    assert raised.value.option == option


def test_listening_beyond_loopback_needs_tls_or_a_word() -> None:
    beyond = {"agent.listen": "0.0.0.0:7000"}
    assert load(None, beyond | {"agent.insecure": True}, ENVIRON).agent.listen
    pems = {f"tls.{name}": f"/etc/{name}" for name in ("certificate", "key", "authority")}
    assert load(None, beyond | pems, ENVIRON).tls.enabled
    for name in pems:
        partial = {option: path for option, path in pems.items() if option != name}
        with pytest.raises(InvalidConfiguration, match="tls"):
            load(None, partial, ENVIRON)


@pytest.mark.parametrize("node_id", ["", "../up", "a b", ".hidden", "x" * 129])
def test_node_ids_are_names(node_id: str) -> None:
    with pytest.raises(InvalidName):
        load(None, {"agent.node_id": node_id}, ENVIRON)


@pytest.mark.parametrize("hostname", ["node-7.cluster", "", "..", "knöten 7", "x" * 300, ".a/b"])
def test_any_host_name_makes_a_node_id(hostname: str) -> None:
    node_id = safe_node_id(hostname)
    assert load(None, {"agent.node_id": node_id}, ENVIRON).agent.node_id == node_id


@pytest.mark.parametrize(
    ("text", "option", "nearest"),
    [
        ("[memory]\nslot = 3", "memory.slot", "memory.slots"),
        ("[nvme]\nkeep_newst = 3", "nvme.keep_newst", "nvme.keep_newest"),
        ("[agent]\nslots = 3", "agent.slots", "memory.slots"),
        ("slots = 3", "slots", "memory.slots"),
        ("[memry]\nslots = 3", "[memry]", "memory"),
    ],
)
def test_unknown_options_name_the_nearest_and_the_file(
    text: str, option: str, nearest: str, tmp_path: Path
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(InvalidConfiguration, match=re.escape(f"the nearest is {nearest}")) as error:
        load(file, {}, ENVIRON)
    assert error.value.option == option
    assert error.value.source == str(file)


def test_unknown_flags_are_errors_too() -> None:
    with pytest.raises(InvalidConfiguration, match=r"memory\.slots"):
        load(None, {"memory.slot": 3}, ENVIRON)


def test_a_file_is_strict_where_a_flag_is_not(tmp_path: Path) -> None:
    file = written(tmp_path, '[memory]\nslots = "4"\n')
    with pytest.raises(InvalidConfiguration, match="not a whole number") as error:
        load(file, {}, ENVIRON)
    assert error.value.source == str(file)


@pytest.mark.parametrize("content", [b"[memory", b"\xff\xfe", b"[memory]\nslots=2\nslots=3"])
def test_a_file_that_is_not_toml(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "everstep.toml"
    file.write_bytes(content)
    with pytest.raises(InvalidConfiguration, match="not TOML"):
        load(file, {}, ENVIRON)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="cannot be read"):
        load(tmp_path / "missing.toml", {}, ENVIRON)


@pytest.mark.parametrize("interval", [Interval(), Interval(every_steps=7), Interval(every_s=90.0)])
def test_an_interval_reads_as_it_prints(interval: Interval) -> None:
    assert load(None, {"nvme.interval": str(interval)}, ENVIRON).nvme.interval == interval
    assert interval.off == (str(interval) == "off")
