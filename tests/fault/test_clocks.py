"""A clock that jumps by an hour expires nothing: the wall clock is for people to read only."""

import ast
from pathlib import Path

import everstep.agent

ROOT = Path(next(iter(everstep.agent.__path__))).resolve().parent
FOLDERS = ("agent", "client", "snapshot", "storage", "erasure", "kernels", "proto")
WALL_CLOCK = {"time", "time_ns", "localtime", "gmtime", "ctime", "now", "utcnow", "today"}
CLOCK_MODULES = {"time", "datetime", "date"}
SHOWN = ("_unix_s",)
"""Fields with these endings are shown to people; nothing is decided by them."""


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def reads_wall_clock(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in WALL_CLOCK
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in CLOCK_MODULES
        and not (node.func.attr == "time" and node.func.value.id != "time")
    )


def shown(tree: ast.AST) -> set[ast.AST]:
    """Calls whose value goes straight into a field for people."""
    return {
        keyword.value
        for keyword in ast.walk(tree)
        if isinstance(keyword, ast.keyword) and (keyword.arg or "").endswith(SHOWN)
    }


def test_time_comes_from_monotonic_clocks() -> None:
    found = []
    # Tools for people may say what time it is, and the doctor compares clocks on purpose.
    spared = {"doctor.py", "display.py"}
    for path in sources():
        tree = ast.parse(path.read_text())
        fields = shown(tree)
        for node in ast.walk(tree):
            if reads_wall_clock(node) and node not in fields and path.name not in spared:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: imported by name")
    assert not found, "\n".join(found)


def test_shown_times_decide_nothing() -> None:
    """What is stored of the wall clock is passed on, never compared or counted with."""
    found = []
    for path in sources():
        if path.name in {"doctor.py", "display.py"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            parts: list[ast.AST] = []
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
            elif isinstance(node, ast.BinOp):
                parts = [node.left, node.right]
            names = [part.attr for part in parts if isinstance(part, ast.Attribute)]
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
                for name in names
                if name.endswith(SHOWN)
            ]
    assert not found, "\n".join(found)


def test_a_process_keeps_its_start_when_the_clock_is_set() -> None:
    """By ticks since boot: what psutil says moves with the wall clock, and claims would lapse."""
    uses = [path for path in sources() if "create_time" in path.read_text()]
    assert not uses, uses
