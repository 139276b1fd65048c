"""Warm zygotes for the whole run, a fresh node for each test."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Node, Zygote


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
