"""The demo and the example, as users run them: killed, restored, equal bit for bit."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest

from everstep.client.demo.__main__ import main
from everstep.client.demo.corpus import Batches, standard_library
from everstep.client.demo.diary import Diary, Entry, Follower
from everstep.client.demo.processes import agent_of, end_agent
from everstep.client.demo.report import as_document
from everstep.client.demo.scenario import Outcome, Plan, Recovery, Run
from everstep.client.environment import places

from .conftest import eventually

DEMO = [sys.executable, "-P", "-m", "everstep.client.demo"]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train.py"
PNG = b"\x89PNG\r\n\x1a\n"


class Demo:
    """The demo as a child process, with temporary files where the test can see them."""

    def __init__(self, tmp_path: Path, *options: str, environ: dict[str, str] | None = None):
        self.temporary = tmp_path / "t"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [*DEMO, f"--output={tmp_path / 'output'}", *options],
            env={**os.environ, "TMPDIR": str(self.temporary), **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.home: Path = eventually(self._home, "a home of the demo's own")

    def _home(self) -> Path | None:
        return next(iter(self.temporary.glob("everstep-demo-*")), None)

    def end(self, deadline_s: float) -> tuple[int, str, str]:
        """Wait for it; return status, stdout and stderr."""
        out, err = self.process.communicate(timeout=deadline_s)
        return self.process.returncode, out, err

    def left_behind(self) -> list[str]:
        """Processes and directories that should be gone."""
        found = [
            f"{process.pid}: {process.info['cmdline']}"
            for process in psutil.process_iter(["cmdline", "status"])
            if str(self.home) in " ".join(process.info["cmdline"] or ())
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]
        memory = places({"EVERSTEP_HOME": str(self.home)}).memory_dir
        return found + [str(path) for path in (self.home, memory) if path.exists()]


def check_document(text: str, plan_interval: int = 4) -> None:
    document = json.loads(text)
    assert document["equal"] is document["losses_equal"] is document["weights_equal"] is True
    assert [kill["killed"] for kill in document["kills"]] == ["trainer", "trainer and agent"]
    for kill in document["kills"]:
        assert kill["level"] == "memory"
        # Skipped snapshots lose more than one interval, but never a whole life.
        assert 0 < kill["restored_step"] <= kill["step"] < document["steps"]
        assert kill["restored_step"] % plan_interval == 0
        assert kill["lost_steps"] == kill["step"] - kill["restored_step"]
        parts = ("start_s", "connect_s", "restore_s", "first_step_s")
        assert all(kill[part] > 0 for part in parts)
        assert math.isclose(kill["recovery_s"], sum(kill[part] for part in parts))
    assert document["kills"][0]["step"] < document["kills"][1]["restored_step"]
    assert 0 < document["stall_median_s"] <= document["stall_max_s"]
    assert Path(document["image"]).read_bytes().startswith(PNG)


@pytest.mark.long  # .ci/run lets the wheel, outside of the checkout, do the same
@pytest.mark.timeout(300)
def test_the_short_demo_ends_equal_and_leaves_nothing(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "--short", "--json")
    status, out, err = demo.end(280)
    assert (status, err) == (0, "")
    check_document(out)
    assert demo.left_behind() == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_full_demo_shows_a_table(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "--seed=3")
    status, out, err = demo.end(880)
    assert status == 0, err
    assert "kill -9 trainer and agent" in err
    assert out.count("yes, bit for bit") == 2
    assert str(tmp_path / "output" / "everstep-demo.png") in out.replace("\n", "")
    assert demo.left_behind() == []


@pytest.mark.long
@pytest.mark.timeout(180)
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "--short")
    diary = Follower(demo.home / "killed.jsonl")
    eventually(lambda: any(entry.kind == "stall" for entry in diary.poll()), "a snapshot", 120)
    assert places({"EVERSTEP_HOME": str(demo.home)}).memory_dir.exists()
    demo.process.send_signal(signal.SIGTERM)
    status, out, _ = demo.end(60)
    assert (status, out) == (130, "")
    assert demo.left_behind() == []


@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_failed_demo_says_where_to_look(tmp_path: Path) -> None:
    # The trainer ends by itself at its third seal.
    points = {"EVERSTEP_FAILPOINTS": "client.seal.before=exit@3"}
    demo = Demo(tmp_path, "--short", "--json", environ=points)
    status, out, err = demo.end(160)
    assert (status, out) == (1, "")
    assert "the trainer ended with status 3" in err
    assert str(demo.home) in err
    assert demo.left_behind() == [str(demo.home)]
    assert (demo.home / "trainer.log").exists()


@pytest.mark.parametrize("options", [["--steps=3"], ["--steps=many"], ["--sed=1"]])
def test_wrong_options_are_refused(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    with pytest.raises(SystemExit) as refusal:
        main()
    assert refusal.value.code == 2
    assert options[0].partition("=")[0] in capsys.readouterr().err


def run_of(losses: list[tuple[int, float]], digest: str = "d") -> Run:
    steps = [Entry("step", n / 10, {"step": s, "loss": v}) for n, (s, v) in enumerate(losses)]
    facts: dict[str, Any] = {"taken": 1, "skipped": {}}
    others = [Entry("built", 0.0, {"parameters": 5}), Entry("closed", 9.0, facts)]
    return Run([*others, *steps, Entry("ended", 9.0, {"digest": digest})])


LOSSES = [(1, 3.0), (2, 2.0), (3, 1.0)]
LATER = [(1, 3.0), (2, math.nextafter(2.0, 3.0)), (3, 1.0)]


@pytest.mark.parametrize(
    ("killed", "first_difference"),
    [
        (LOSSES, None),
        ([(1, 3.0), (2, 2.0), (2, 2.0), (3, 1.0)], None),
        (LATER, 2),
        ([(1, 3.0), *LATER], 2),
        ([*LATER, *LOSSES[1:]], 2),
        (LOSSES[:2], 3),
        (LOSSES[1:], 1),
    ],
    ids=["same", "redone", "last bit", "redone wrongly", "first wrong", "last missing", "gap"],
)
def test_one_bit_of_one_loss_is_a_difference(
    killed: list[tuple[int, float]], first_difference: int | None
) -> None:
    recovery = Recovery("trainer", 2, 1, "memory", 1.0, 2.0, 3.0, 4.0)
    outcome = Outcome(Plan(3, 0, 1), run_of(LOSSES), run_of(killed), [recovery], 1.0)
    assert outcome.first_difference == first_difference
    document = as_document(outcome, None)
    assert document["equal"] is (first_difference is None)
    assert document["kills"][0]["recovery_s"] == 10.0


def test_other_weights_are_a_difference() -> None:
    outcome = Outcome(Plan(3, 0, 1), run_of(LOSSES), run_of(LOSSES, "other"), [], 1.0)
    assert outcome.losses_equal
    assert not outcome.equal


@pytest.mark.parametrize("steps", [40, 60, 400, 10_000])
def test_kills_follow_from_the_seed_and_hit_both_halves(steps: int) -> None:
    plans = [Plan(steps, seed, 4) for seed in range(50)]
    assert plans[7].kills() == Plan(steps, 7, 4).kills()
    for plan in plans:
        early, late = plan.kills()
        assert 4 < early.after_step < steps / 2 < late.after_step < steps - 4
        assert (early.with_agent, late.with_agent) == (False, True)
    assert len({plan.kills()[0].after_step for plan in plans}) > 3


def test_a_diary_is_read_by_whole_lines_and_floats_keep_their_bits(tmp_path: Path) -> None:
    path = tmp_path / "diary.jsonl"
    follower = Follower(path)
    assert follower.poll() == []
    loss = math.nextafter(0.1, 1.0)
    Diary(path).note("step", step=1, loss=loss)
    with path.open("ab") as file:
        file.write(b'{"kind": "st')
        file.flush()
        (entry,) = follower.poll()
        assert (entry.kind, entry.facts) == ("step", {"step": 1, "loss": loss})
        file.write(b'ep", "at_s": 1.0}\n')
    assert [entry.at_s for entry in follower.poll()] == [1.0]
    assert len(follower.entries) == 2


def test_batches_go_on_where_their_state_was_taken() -> None:
    def seeded() -> Batches:
        random.seed(1)
        numpy.random.seed(1)
        return Batches(standard_library(10_000), 64, 8)

    # 154 windows: the second epoch begins at the twentieth batch.
    expected = _draw(seeded(), 40)
    assert len({inputs for inputs, _ in expected}) == 40
    first = seeded()
    drawn = _draw(first, 25)
    state = first.state_dict()
    generators = random.getstate(), numpy.random.get_state()
    second = seeded()
    second.load_state_dict(state)
    random.setstate(generators[0])
    numpy.random.set_state(generators[1])
    assert drawn + _draw(second, 15) == expected


def _draw(batches: Batches, count: int) -> list[tuple[bytes, bytes]]:
    pairs = (batches.draw() for _ in range(count))
    return [(inputs.numpy().tobytes(), following.numpy().tobytes()) for inputs, following in pairs]


class Example:
    """The example as a child process, line by line; a context manager."""

    def __init__(self, home: Path):
        with (home / "stderr").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(EXAMPLE)],
                env={**os.environ, "EVERSTEP_HOME": str(home), "OMP_WAIT_POLICY": "PASSIVE"},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> "Example":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def lines(self, until_step: int = 0) -> list[tuple[int, str]]:
        """Steps and losses, to the end or up to a step."""
        assert self.process.stdout is not None
        found: list[tuple[int, str]] = []
        for line in self.process.stdout:
            step, loss = line.split()
            found.append((int(step), loss))
            if until_step and int(step) >= until_step:
                break
        return found

    def kill(self) -> list[tuple[int, str]]:
        """SIGKILL; what it had printed before."""
        self.process.kill()
        rest = self.lines()
        assert self.process.wait(20) == -signal.SIGKILL
        return rest


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[list[Path]]:
    found = [tmp_path / "a", tmp_path / "b"]
    for home in found:
        home.mkdir()
    yield found
    for home in found:
        end_agent(home)


@pytest.mark.timeout(240)
def test_the_example_goes_on_after_sigkill(homes: list[Path]) -> None:
    with Example(homes[0]) as left_alone:
        whole = dict(left_alone.lines())
        assert left_alone.process.wait(60) == 0
    assert list(whole) == list(range(1, 1001))

    with Example(homes[1]) as first:
        before = first.lines(until_step=617)
        before += first.kill()
    assert agent_of(homes[1]) is not None
    with Example(homes[1]) as second:
        after = second.lines()
        assert second.process.wait(60) == 0
    assert 617 <= before[-1][0] < 1000
    assert 1 < after[0][0] <= before[-1][0] + 1
    assert after[-1][0] == 1000
    assert [whole[step] for step, _ in before + after] == [loss for _, loss in before + after]
