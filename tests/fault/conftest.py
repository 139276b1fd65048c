"""Warm zygotes for the whole run, a fresh node for each test."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import HERE, Node, Shim, Zygote


@pytest.fixture(scope="session")
def zygotes() -> Iterator[dict[str, Zygote]]:
    started = {kind: Zygote(kind) for kind in ("agent", "trainer")}
    yield started
    for zygote in started.values():
        zygote.close()


@pytest.fixture
def node(zygotes: dict[str, Zygote]) -> Iterator[Node]:
    made = Node(zygotes)
    yield made
    made.close()


@pytest.fixture
def small_tmpfs(node: Node) -> Iterator[Path]:
    """64 MB and no more."""
    if os.getuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    path = node.base / "small"
    path.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=0700", "none", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("the shim needs gcc")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library)]
    subprocess.run([*command, str(HERE / "shim.c"), "-ldl", "-lpthread"], check=True)
    return library


@pytest.fixture
def shim(node: Node, shim_library: Path) -> Shim:
    """For an agent started with ``preload=shim.library, environ=shim.environ``."""
    return Shim(shim_library, node.base / "switch")
