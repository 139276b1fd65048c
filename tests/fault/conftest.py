"""Warm zygotes for the whole run, a fresh node for each test."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fleet import Fleet
from harness import HERE, Node, Shim, Zygote
from netns import clear_stale, lacking

from tests.zygotes import zygote


@pytest.fixture(scope="session")
def zygotes() -> dict[str, Zygote]:
    return {kind: zygote(kind) for kind in ("agent", "trainer")}


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


@pytest.fixture(scope="session")
def network_namespaces() -> None:
    """For tests that need them: skips, with a clear word, where there are none."""
    problem = lacking()
    if problem:
        pytest.skip(problem)
    clear_stale()


@pytest.fixture
def fleet_of(
    zygotes: dict[str, Zygote], network_namespaces: None
) -> Iterator[Callable[..., Fleet]]:
    """Makes fleets, which go with the test; what their agents said last is shown if it fails."""
    made: list[Fleet] = []

    def make(count: int = 4, **options: Any) -> Fleet:
        made.append(Fleet(zygotes, count, **options))
        return made[-1]

    yield make
    for fleet in made:
        print(fleet.last_words())
        fleet.close()


@pytest.fixture
def small_disk(network_namespaces: None) -> Iterator[Callable[[Node, int], None]]:
    """Gives a node a disk of its own, with so many MiB and no more."""
    mounted: list[Path] = []

    def mount(node: Node, size_mib: int) -> None:
        node.nvme.mkdir(mode=0o700, exist_ok=True)
        options = f"size={size_mib}m,mode=0700"
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(node.nvme)]
        subprocess.run(command, check=True)
        mounted.append(node.nvme)

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)
