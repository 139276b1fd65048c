"""A CLI far from any agent, and directories for it to look at."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from everstep.agent.cli import app
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel

from .saved import Cli, Outcome, Saved


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a verb, far from any agent of this user."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"EVERSTEP_HOME": str(tmp_path / "home"), "EVERSTEP_AGENT": None})

    def run(*words: object, answer: str | None = None) -> Outcome:
        result = runner.invoke(app, [str(word) for word in words], input=answer)
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    saved = Saved(tmp_path)
    with NvmeLevel(saved.nvme, write_threads=1, direct=False) as level:
        saved.store(level)
    return saved


@pytest.fixture
def in_memory(tmp_path: Path, saved: Saved) -> Path:
    root = tmp_path / "memory"
    saved.store(MemoryLevel(root, keep_free_bytes=0))
    return root
