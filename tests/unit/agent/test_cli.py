"""The verbs without an agent: usage, exit status, what they carry; output for people."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from everstep.agent import display
from everstep.agent.cli import app
from everstep.agent.exits import exit_status
from everstep.proto import errors

from .saved import Cli, Saved

VERBS = (
    "agent",
    "status",
    "list",
    "recover",
    "verify",
    "inspect",
    "export",
    "import",
    "gc",
    "doctor",
    "demo",
)
OF_AN_AGENT = {
    "status": (),
    "list": (),
    "recover": ("--job", "gpt", "--dry-run"),
    "inspect": ("--job", "gpt"),
    "verify": (),
    "export": ("--job", "gpt", "--to", "safetensors", "out.safetensors"),
    "gc": ("--dry-run",),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples_and_json(cli: Cli, verb: str) -> None:
    outcome = cli(verb, "--help")
    assert outcome.status == 0
    assert f"\n  Examples:\n    everstep {verb}" in outcome.out
    assert "--json" in outcome.out


def test_these_are_all_verbs(cli: Cli) -> None:
    commands = cli("--help").out.partition("Commands:\n")[2]
    assert tuple(line.split()[0] for line in commands.splitlines() if line.strip()) == VERBS


def test_the_version(cli: Cli) -> None:
    outcome = cli("--version")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("everstep ")


@pytest.mark.parametrize(
    "words",
    [
        ("frobnicate",),
        ("status", "--frobnicate"),
        ("status", "--job", "../x"),
        ("status", "--agent", "tcp:host:1"),
        ("list", "/usr"),
        ("list", "missing-directory"),
        ("list", "nvme", "--job", "other"),
        ("list", "nvme/gpt", "--job", "other"),
        ("list", "nvme", "--agent", "unix:/a.sock"),
        ("inspect", "nvme", "--step", "-1"),
        ("inspect", "nvme", "--level", "memory"),
        ("list", "nvme", "--nvme-dir", "nvme"),
        ("list", "--nvme-dir", "missing-directory"),
        ("recover",),
        ("recover", "--job", "../x"),
        ("recover", "--job", "gpt", "--level", "tape"),
        ("recover", "--job", "gpt", "--bytes-per-second", "fast"),
        ("recover", "--nvme-dir", "nvme"),
        ("recover", "--dry-run", "--memory-dir", "nvme"),
        ("recover", "--dry-run", "--nvme-dir", "nvme", "--job", "other"),
        ("recover", "--dry-run", "--nvme-dir", "nvme", "--agent", "unix:/a.sock"),
        ("verify", "nvme", "--level", "tape"),
        ("verify", "nvme", "--repair"),
        ("verify", "nvme", "--nvme-dir", "nvme"),
        ("export", "nvme", "out.safetensors"),
        ("export", "out.safetensors", "--to", "safetensors"),
        ("export", "nvme", "out.zip", "--to", "zip"),
        ("export", "a", "b", "c", "--to", "torch"),
        ("export", "nvme", "missing/out", "--to", "safetensors"),
        ("export", "nvme", "out", "--to", "safetensors", "--part", "optimizer"),
        ("export", "nvme", "out", "--to", "safetensors", "--rank", "2"),
        ("gc", "--all"),
        ("gc", "--keep-newest", "3"),
        ("gc", "nvme", "--keep-newest", "0"),
        ("agent", "--nvme-dir", "relative"),
        ("agent", "--config", "missing.toml"),
        ("agent", "--listen", "127.0.0.1:0", "--peer", "n1"),
        ("agent", "--listen", "0.0.0.0:7400"),
        ("agent", "--listen", "127.0.0.1:0", "--label", "rack"),
        ("agent", "--peers-dns", "agents:7400"),
        ("agent", "--peers-slurm", "gpu[1-:7400", "--listen", "127.0.0.1:0"),
        ("agent", "--parity", "2"),
        ("agent", "--listen", "127.0.0.1:0", "--replaces", "n1"),
        ("doctor", "--memory-dir", "relative"),
    ],
)
def test_wrong_usage_is_status_2_and_one_message(
    cli: Cli, saved: Saved, words: tuple[str, ...]
) -> None:
    outcome = cli(*words)
    assert (outcome.status, outcome.out) == (2, ""), outcome
    assert "rror" in outcome.err
    assert "Traceback" not in outcome.err
    in_json = cli(*words, "--json")
    assert (in_json.status, in_json.err) == (2, "")
    error = in_json.document["error"]
    assert error.keys() == {"type", "message"}
    assert not (saved.root / "out").exists()


@pytest.mark.parametrize("verb", OF_AN_AGENT)
def test_no_agent_is_status_3(cli: Cli, verb: str, tmp_path: Path) -> None:
    outcome = cli(verb, *OF_AN_AGENT[verb])
    assert (outcome.status, outcome.out) == (3, "")
    assert f"no agent answers at unix:{tmp_path}/home/run/agent.sock" in outcome.err
    in_json = cli(verb, *OF_AN_AGENT[verb], "--json")
    assert (in_json.status, in_json.document["error"]["type"]) == (3, "AgentUnavailable")


def test_an_agent_is_named_by_flag_or_environment(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unix:/nowhere/a.sock:" in cli("status", "--agent", "unix:/nowhere/a.sock").err
    runner = CliRunner(env={"EVERSTEP_AGENT": "unix:/elsewhere/b.sock"})
    assert "unix:/elsewhere/b.sock:" in runner.invoke(app, ["status"]).stderr


def test_every_error_of_the_tree_has_its_exit_status() -> None:
    expected = {"AgentUnavailable": 3, "DeadlineExceeded": 3, "WriteFailed": 1}
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.EverstepError):
            error = kind.__new__(kind)
            default = 2 if issubclass(kind, errors.Refused) else 1
            assert exit_status(error) == expected.get(name, default), name


def test_nothing_from_a_file_reaches_the_terminal_unprintable() -> None:
    assert display.clean("a\x1b[31mb\x07\n") == "a\N{REPLACEMENT CHARACTER}[31mb" + (
        "\N{REPLACEMENT CHARACTER}\n"
    )


def test_markup_in_names_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    display.table("[bold]t", ("name",), [("[red]x[/red] :smile:",)])
    assert "[red]x[/red] :smile:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (display.ranks([0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8"),
        (display.ranks([]), ""),
        (display.size(0), "0 B"),
        (display.size(1536), "1.5 KiB"),
        (display.size(3 << 40), "3.0 TiB"),
        (display.span(59.6), "60 s"),
        (display.span(3600), "60 min"),
        (display.span(1e6), "12 d"),
    ],
)
def test_amounts_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_doctor_exits_by_its_findings(cli: Cli, tmp_path: Path) -> None:
    words = ("doctor", "--probe-mib", 0, "--memory-dir", "/dev/shm/everstep-doctor-test")
    fine = cli(*words, "--nvme-dir", "", "--json")
    statuses = {finding["status"] for finding in fine.document["findings"]}
    assert fine.document["fit"] is ("fail" not in statuses)
    assert fine.status == (0 if fine.document["fit"] else 1)
    (tmp_path / "file").touch()
    broken = cli(*words, "--nvme-dir", tmp_path / "file")
    assert broken.status == 1
    assert "fail" in broken.out


def test_demo_passes_its_flags_and_status_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > words\nexit 7\n')
    interpreter.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    words = ["--short", "--json", "--steps", "9", "--output", "there", "--seed", "4"]
    assert cli("demo", *words).status == 7
    assert (tmp_path / "words").read_text().split() == ["-P", "-m", "everstep.client.demo", *words]


def test_the_agent_carries_nothing_that_only_other_verbs_need() -> None:
    script = (
        "import sys, everstep.agent.cli, everstep.agent.config, everstep.agent.daemon; "
        "sys.exit(', '.join(sorted({'rich', 'torch', 'everstep.agent.showing'} & "
        "sys.modules.keys())) or 0)"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
