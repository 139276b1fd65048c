"""The import table of the architecture, executed: who may import whom, torch, the environment."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "everstep": {"client"},
    "client": {"snapshot", "kernels", "proto"},
    "agent": {"snapshot", "storage", "erasure", "proto"},
    "snapshot": {"kernels", "proto"},
    "erasure": {"kernels", "proto"},
    "storage": {"kernels", "proto"},
    "kernels": set(),
    "proto": set(),
}
FOLDERS = MAY_IMPORT.keys() - {"everstep"}

# What only some modules may import, and which ones; the agent runs without any of it.
CONFINED = {
    "torch": (
        "client/*",
        "snapshot/capture*.py",
        "snapshot/restore*.py",
        "snapshot/device.py",
        "snapshot/device_part.py",
        "snapshot/device_cuda.py",
        "snapshot/device_tripwire.py",
        "snapshot/placement.py",
        "kernels/*_triton.py",
    ),
    "torchdata": ("client/*",),
    "triton": ("kernels/*_triton.py",),
    "accelerate": ("client/adapters/*",),
    "deepspeed": ("client/adapters/*",),
    "lightning": ("client/adapters/*",),
    "pytorch_lightning": ("client/adapters/*",),
    "torchtitan": ("client/adapters/*",),
    "transformers": ("client/adapters/*",),
    "pickle": (),
    "marshal": (),
    "shelve": (),
    "dill": (),
    "cloudpickle": (),
}
READS_ENVIRONMENT = ("agent/config.py", "client/environment.py", "proto/failpoint.py")
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def modules() -> list[str]:
    found = (path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def imported(module: str, tree: ast.Module) -> Iterator[str]:
    """The full dotted name of everything that a module imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["everstep", *Path(module).parts]
                if module.startswith("everstep/"):
                    del here[0]
                base = ".".join([*here[: -node.level], *([base] if base else [])])
            yield from (f"{base}.{name.name}" for name in node.names)


def violations(module: str, source: str) -> list[str]:
    """Every way in which a module breaks the table, as messages."""
    tree = ast.parse(source, module)
    folder = Path(module).parts[0]
    problems = []
    for name in imported(module, tree):
        first, _, rest = name.partition(".")
        second = rest.partition(".")[0]
        if first in FOLDERS:
            problems.append(f"imports {first} where everstep.{first} is meant")
        elif first == "everstep":
            target = second if second in FOLDERS else "everstep"
            if target not in MAY_IMPORT[folder] | {folder}:
                problems.append(f"imports {name}, and {folder}/ may not import {target}/")
        elif first in CONFINED and not any(fnmatch(module, where) for where in CONFINED[first]):
            problems.append(f"imports {name}, which belongs to {CONFINED[first] or 'no module'}")
    if module not in READS_ENVIRONMENT:
        problems += environment_reads(tree)
    return problems


def environment_reads(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os" and node.attr in ENVIRONMENT:
                yield f"line {node.lineno} uses os.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"imports os.{n.name}" for n in node.names if n.name in ENVIRONMENT)


@pytest.mark.parametrize("module", modules())
def test_imports_follow_the_table(module: str) -> None:
    assert violations(module, (ROOT / module).read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("agent/a.py", "import everstep.client.client"),
        ("agent/a.py", "from everstep import client"),
        ("agent/a.py", "from everstep import kernels"),
        ("agent/a.py", "from everstep import __version__"),
        ("agent/a.py", "import torch"),
        ("agent/a.py", "def late():\n    from torch.nn import Module"),
        ("agent/a.py", "from .. import client"),
        ("agent/a.py", "from ..client import client"),
        ("agent/a.py", "import proto.errors"),
        ("agent/a.py", "from snapshot import layout"),
        ("agent/a.py", "import os\nos.environ['HOME']"),
        ("agent/a.py", "from os import getenv"),
        ("agent/a.py", "import pickle"),
        ("client/a.py", "from everstep.agent import config"),
        ("client/a.py", "from everstep.storage.arena import Arena"),
        ("client/a.py", "from everstep.erasure import codec"),
        ("snapshot/layout.py", "import torch"),
        ("snapshot/a.py", "from everstep.storage import arena"),
        ("storage/a.py", "from everstep.erasure import codec"),
        ("erasure/a.py", "import everstep.snapshot"),
        ("kernels/a.py", "from everstep.proto.errors import EverstepError"),
        ("kernels/a.py", "import triton"),
        ("proto/a.py", "from everstep.kernels import native"),
        ("everstep/__init__.py", "from everstep.agent import cli"),
        ("everstep/__init__.py", "from .proto import errors"),
    ],
)
def test_a_violation_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("agent/a.py", "from everstep.agent import state\nfrom everstep.snapshot import record"),
        ("agent/a.py", "from . import state\nfrom .state import State\nfrom ..proto import ids"),
        ("agent/config.py", "import os\nos.environ.get('HOME')"),
        ("client/a.py", "import torch\nfrom everstep.proto.errors import EverstepError"),
        ("snapshot/capture_cuda.py", "import torch"),
        ("snapshot/restore.py", "import torch"),
        ("kernels/pack_triton.py", "import torch, triton"),
        ("everstep/__init__.py", "from everstep.client import Client\nfrom .client import x"),
    ],
)
def test_what_the_table_allows_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_every_folder_was_looked_at() -> None:
    seen = {Path(module).parts[0] for module in modules()}
    assert seen >= {"kernels", "proto"}
    assert seen <= MAY_IMPORT.keys()


def test_hosts_of_adapters_are_imported_by_their_adapters_only() -> None:
    script = (
        "import sys, everstep.client; everstep.connect; hosts = "
        "{'accelerate', 'deepspeed', 'lightning', 'torchtitan', 'transformers'}; "
        "sys.exit(', '.join(sorted(hosts & sys.modules.keys())) or 0)"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 0, f"everstep.client imports {outcome.stderr}"


def test_the_agent_runs_without_torch() -> None:
    script = (
        "import sys, everstep.agent.daemon; "
        "sys.exit(', '.join(sorted({'torch', 'everstep.client'} & sys.modules.keys())) or 0)"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 0, f"the daemon imports {outcome.stderr}"
