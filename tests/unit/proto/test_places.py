"""Default places: a pure function of the environment; directories that hold state are private."""

import os
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from everstep.proto.errors import InvalidConfiguration
from everstep.proto.places import (
    SOCKET_PATH_MAX_BYTES,
    default_places,
    directory_problem,
    fits_socket,
    format_address,
    offers_socket,
    parse_address,
    private_directory,
    private_socket,
)


def test_everstep_home_alone_decides_everything() -> None:
    noise = {"XDG_RUNTIME_DIR": "/run/user/7", "XDG_STATE_HOME": "/s", "HOME": "/home/a"}
    alone = default_places({"EVERSTEP_HOME": "/data/run1"}, 7)
    assert default_places({"EVERSTEP_HOME": "/data/run1", **noise}, 7) == alone
    assert alone.socket == Path("/data/run1/run/agent.sock")
    assert alone.nvme_dir == Path("/data/run1/nvme")
    assert alone.log == Path("/data/run1/agent.log")
    assert alone.lock == Path("/data/run1/run/agent.lock")
    assert alone.memory_dir.parent == Path("/dev/shm")
    prefix, _, digest = alone.memory_dir.name.rpartition("-")
    assert prefix == "everstep-7"
    assert len(bytes.fromhex(digest)) == 4


def test_one_home_is_one_place_and_two_homes_share_nothing() -> None:
    one = default_places({"EVERSTEP_HOME": "/data/one"}, 7)
    same = default_places({"EVERSTEP_HOME": "/data//x/../one/"}, 7)
    other = default_places({"EVERSTEP_HOME": "/data/two"}, 7)
    assert one == same
    for name in ("socket", "memory_dir", "nvme_dir", "log", "lock"):
        assert getattr(one, name) != getattr(other, name)


@pytest.mark.parametrize("home", ["data", "~/everstep", "./x"])
def test_home_must_be_absolute(home: str) -> None:
    with pytest.raises(InvalidConfiguration, match="EVERSTEP_HOME"):
        default_places({"EVERSTEP_HOME": home}, 7)


def test_places_of_a_user() -> None:
    places = default_places(
        {"XDG_RUNTIME_DIR": "/run/user/7", "HOME": "/home/a", "EVERSTEP_HOME": ""}, 7
    )
    assert places.socket == Path("/run/user/7/everstep/agent.sock")
    assert places.lock == Path("/run/user/7/everstep/agent.lock")
    assert places.memory_dir == Path("/dev/shm/everstep-7")
    assert places.nvme_dir == Path("/home/a/.local/state/everstep/nvme")
    assert places.log == Path("/home/a/.local/state/everstep/agent.log")
    state = default_places({"XDG_STATE_HOME": "/s", "HOME": "/home/a"}, 7)
    assert state.nvme_dir == Path("/s/everstep/nvme")
    assert state.socket == Path("/tmp/everstep-7/agent.sock")


def test_without_any_variable_and_with_relative_ones() -> None:
    bare = default_places({}, 7)
    assert bare.socket == Path("/tmp/everstep-7/agent.sock")
    assert bare.nvme_dir == Path("/var/tmp/everstep-7/nvme")
    relative = {"XDG_RUNTIME_DIR": "run", "XDG_STATE_HOME": "state", "HOME": "a"}
    assert default_places(relative, 7) == bare


@pytest.mark.parametrize("variable", ["EVERSTEP_HOME", "XDG_RUNTIME_DIR"])
def test_a_socket_path_always_fits(variable: str) -> None:
    seen = set()
    for length in range(60, 140):
        places = default_places({variable: "/" + "x" * length}, 7)
        assert fits_socket(places.socket)
        assert fits_socket(private_socket(places.socket))
        assert fits_socket(offers_socket(places.socket))
        seen.add(places.socket)
    assert len(seen) == 80, "two homes must not end at one socket"
    assert places.socket.parent == Path("/tmp/everstep-7")


def test_the_limit_is_the_kernels(tmp_path: Path) -> None:
    for length, fits in ((SOCKET_PATH_MAX_BYTES, True), (SOCKET_PATH_MAX_BYTES + 1, False)):
        name = "s" * (length - len(os.fsencode(tmp_path)) - 1)
        if len(name) < 1:
            pytest.skip("the temporary directory's own path is too long")
        path = tmp_path / name
        assert fits_socket(path) is fits
        with socket.socket(socket.AF_UNIX) as listener:
            if fits:
                listener.bind(str(path))
            else:
                with pytest.raises(OSError, match="too long"):
                    listener.bind(str(path))


@pytest.mark.parametrize("address", ["unix:/a/b.sock", "unix:///a/b.sock", "unix:/a//c/../b.sock"])
def test_parse_address(address: str) -> None:
    assert parse_address(address) == Path("/a/b.sock")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/a/b",
        "unix:",
        "unix:a/b",
        "unix://a/b",
        "unix://///a",
        "tcp:/a",
        "localhost:80",
        "unix:/a%00b",
        "unix:/" + "x" * 107,
    ],
)
def test_parse_address_refuses(address: str) -> None:
    with pytest.raises(InvalidConfiguration, match="agent address"):
        parse_address(address)


@pytest.mark.parametrize("name", ["plain", "100%20 a#b?c", "gäöü", os.fsdecode(b"\xff\xfe")])
def test_an_address_means_the_same_to_grpc(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert parse_address(format_address(path)) == path
    if not name.isprintable():
        return  # gRPC takes UTF-8 only
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        server.add_insecure_port(format_address(path))
        server.start()
        try:
            assert stat.S_ISSOCK(path.stat().st_mode)
        finally:
            server.stop(0).wait()


def test_private_directory_is_created_closed_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        private_directory(tmp_path / "a/b", os.getuid())
    finally:
        os.umask(before)
    for path in (tmp_path / "a", tmp_path / "a/b"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    private_directory(tmp_path / "a/b", os.getuid())


@pytest.mark.parametrize("mode", [0o710, 0o701, 0o777, 0o750])
def test_an_open_directory_is_refused_and_left_alone(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(InvalidConfiguration, match="chmod 700"):
        private_directory(path, os.getuid())
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_link_a_file_and_a_strangers_directory_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name, problem in (
        ("link", "symbolic link"),
        ("dangling", "symbolic link"),
        ("file", "not a directory"),
    ):
        with pytest.raises(InvalidConfiguration, match=problem):
            private_directory(tmp_path / name, os.getuid())
    with pytest.raises(InvalidConfiguration, match="belongs to user id"):
        private_directory(target, os.getuid() + 1)
    assert not (tmp_path / "nowhere").exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfiguration, match="EVERSTEP_HOME"):
        private_directory(tmp_path / "file/below", os.getuid())


def test_directory_problem_changes_nothing(tmp_path: Path) -> None:
    problem = directory_problem(tmp_path / "missing", os.getuid())
    assert problem is not None
    assert not (tmp_path / "missing").exists()
    tmp_path.chmod(0o700)
    assert directory_problem(tmp_path, os.getuid()) is None
