"""The demo of lost nodes, as users run it: decoded from the others' memory, equal bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from everstep.client.demo.__main__ import main
from everstep.client.demo.diary import Entry, Follower
from everstep.client.demo.losing import in_words, parity_levels
from everstep.client.demo.losses import Held, Losses, Outcome, Return
from everstep.client.demo.losses_report import as_document
from everstep.client.demo.scenario import Run
from everstep.client.environment import places
from everstep.proto.peer_pb2 import ParitySource, ShardSource, SnapshotPlan

from .conftest import eventually

DEMO = [sys.executable, "-P", "-m", "everstep.client.demo"]
PARTS = ("notice_s", "replace_s", "start_s", "connect_s", "restore_s", "first_step_s")


class NodesDemo:
    """The demo as a child process, with temporary files where the test can see them."""

    def __init__(self, tmp_path: Path, *options: str):
        self.temporary = tmp_path / "t"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [*DEMO, *options],
            env={**os.environ, "TMPDIR": str(self.temporary)},
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

    def left_behind(self, nodes: int) -> list[str]:
        """Processes and directories that should be gone."""
        found = [
            f"{process.pid}: {process.info['cmdline']}"
            for process in psutil.process_iter(["cmdline", "status"])
            if str(self.home) in " ".join(process.info["cmdline"] or ())
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]
        homes = [self.home, *(self.home / f"n{number + 1}" for number in range(nodes))]
        memory = [places({"EVERSTEP_HOME": str(home)}).memory_dir for home in homes]
        there = [path for path in memory if path.exists()] + list(self.temporary.iterdir())
        return found + [str(path) for path in there]


def check_equal(document: dict[str, Any]) -> dict[str, Any]:
    for verdict in ("equal", "losses_equal", "weights_equal", "restored_as_promised"):
        assert document[verdict] is True, document
    # Else it would say little that they are equal.
    assert len(set(document["weights_sha256"])) == document["nodes"]
    assert len(set(document["final_losses"])) == document["nodes"]
    loss: dict[str, Any] = document["loss"]
    assert all(loss[part] >= 0 for part in PARTS)
    assert math.isclose(loss["recovery_s"], sum(loss[part] for part in PARTS))
    assert 0 < loss["restored_step"] <= loss["step"] < document["steps"]
    assert loss["lost_steps"] == loss["step"] - loss["restored_step"]
    assert len(loss["nodes"]) == len(loss["replaced_by"]) == document["lose"]
    return loss


@pytest.mark.timeout(600)
def test_a_lost_node_is_decoded_and_the_job_ends_equal(tmp_path: Path) -> None:
    demo = NodesDemo(tmp_path, "--nodes=4", "--lose=1", "--short", "--json")
    status, out, err = demo.end(580)
    assert (status, err) == (0, "")
    document = json.loads(out)
    loss = check_equal(document)
    assert loss["replaced_by"] == ["n5"]
    assert loss["decoded_ranks"] == [int(loss["nodes"][0][1:]) - 1]
    assert "memory" in loss["parity_levels"]
    assert loss["protected_step"] <= loss["restored_step"]
    assert loss["protected_again_s"] > loss["recovery_s"]
    # Whole units of 1 MiB, of which a node has twelve here: by the formula, but for their ends.
    assert 1 / 3 <= document["parity_share"] < 0.36
    assert document["parity_share_by_formula"] == 1 / 3
    assert document["round_sent_bytes_per_node"] >= document["shard_bytes_per_node"]
    assert demo.left_behind(5) == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_nodes_are_decoded_and_shown(tmp_path: Path) -> None:
    demo = NodesDemo(tmp_path, "--nodes=4", "--lose=2", "--parity=2", "--short", "--seed=3")
    status, out, err = demo.end(880)
    assert status == 0, err
    assert err.count("takes the place of") == 2
    assert "decoded from memory" in out
    assert out.count("yes, bit for bit") == 2
    assert demo.left_behind(6) == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_more_losses_than_parity_go_back_to_disk(tmp_path: Path) -> None:
    demo = NodesDemo(tmp_path, "--nodes=3", "--lose=2", "--parity=1", "--short", "--json")
    status, out, err = demo.end(880)
    assert status == 0, err
    loss = check_equal(json.loads(out))
    assert loss["restored_step"] == loss["disk_step"]
    assert loss["decoded_ranks"] == []
    assert demo.left_behind(5) == []


@pytest.mark.long
@pytest.mark.timeout(300)
def test_an_interrupted_demo_of_nodes_leaves_nothing(tmp_path: Path) -> None:
    demo = NodesDemo(tmp_path, "--nodes=3", "--short")
    diary = Follower(demo.home / "survived-0.jsonl")
    protected = "a protected step"
    eventually(lambda: any(entry.kind == "protected" for entry in diary.poll()), protected, 240)
    demo.process.send_signal(signal.SIGTERM)
    status, out, _ = demo.end(60)
    assert (status, out) == (130, "")
    assert demo.left_behind(3) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--nodes=1"],
        ["--nodes=9"],
        ["--steps=15", "--nodes=4"],
        ["--lose=4", "--nodes=4"],
        ["--lose=0", "--nodes=4"],
        ["--parity=4", "--nodes=4"],
        ["--lose=1"],
        ["--parity=1"],
    ],
)
def test_wrong_numbers_of_nodes_are_refused(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    with pytest.raises(SystemExit) as refusal:
        main()
    assert refusal.value.code == 2
    assert options[0].partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("steps", [16, 24, 120])
def test_losses_follow_from_the_seed(steps: int) -> None:
    def chosen(seed: int) -> tuple[list[int], int]:
        found = Losses(5, 2, 2, steps, seed, 2, 8).chosen()
        assert 8 <= found.after_step < steps - 2
        assert len(set(found.ranks)) == 2
        assert found.ranks == sorted(found.ranks)
        return found.ranks, found.after_step

    assert chosen(7) == chosen(7)
    assert {rank for seed in range(50) for rank in chosen(seed)[0]} == set(range(5))
    assert len({chosen(seed)[1] for seed in range(50)}) > 2


def run_of(losses: list[float], digest: str) -> Run:
    steps = [Entry("step", n / 10, {"step": n + 1, "loss": v}) for n, v in enumerate(losses)]
    return Run(
        [Entry("built", 0.0, {"parameters": 5}), *steps, Entry("ended", 9.0, {"digest": digest})]
    )


LOSSES = [3.0, 2.0, 1.0]


def outcome_of(survived: list[Run], **changes: Any) -> Outcome:
    facts: dict[str, Any] = {
        "lost": ["n2"],
        "replaced_by": ["n3"],
        "step": 2,
        "restored_step": 2,
        "levels": ["memory"],
        "decoded_ranks": [1],
        "parity_levels": ["memory"],
        "disk_step": 1,
        "protected_step": 2,
        "protected_again_s": 4.0,
        "parts": dict.fromkeys(PARTS, 0.5),
    }
    plan = Losses(2, changes.pop("lose", 1), 1, 3, 0, 1, 1)
    back = Return(**{**facts, **changes})
    reference = [run_of(LOSSES, "a"), run_of(LOSSES, "b")]
    return Outcome(plan, reference, survived, back, Held(12, 4, 12, 30), 1.0)


SAME = [run_of(LOSSES, "a"), run_of(LOSSES, "b")]


def test_the_document_says_what_was_measured() -> None:
    document = as_document(outcome_of(SAME))
    assert document["equal"]
    assert document["loss"]["recovery_s"] == 3.0
    assert document["parity_share"] == 4 / 12
    assert document["full_copies_share"] == 1.0


@pytest.mark.parametrize(
    ("survived", "first"),
    [
        ([SAME[0], run_of([3.0, math.nextafter(2.0, 3.0), 1.0], "b")], 2),
        ([SAME[0], run_of(LOSSES[:2], "b")], 3),
        ([run_of([4.0, 2.0, 1.0], "a"), SAME[1]], 1),
    ],
    ids=["last bit of one rank", "last step missing", "first rank"],
)
def test_one_bit_of_one_ranks_loss_is_a_difference(survived: list[Run], first: int) -> None:
    outcome = outcome_of(survived)
    assert outcome.first_difference == first
    assert not outcome.equal


def test_other_weights_of_one_rank_are_a_difference() -> None:
    outcome = outcome_of([SAME[0], run_of(LOSSES, "other")])
    assert outcome.losses_equal
    assert not outcome.equal


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"restored_step": 1}, False),
        ({"decoded_ranks": []}, False),
        ({"restored_step": 0, "protected_step": 0}, False),
        ({"lose": 2, "decoded_ranks": [], "restored_step": 1}, True),
        ({"lose": 2, "decoded_ranks": [], "restored_step": 0, "disk_step": 0}, False),
    ],
    ids=["decoded", "older than protected", "not decoded", "anew", "from disk", "anew, no disk"],
)
def test_going_back_further_than_promised_is_a_failure(changes: dict[str, Any], kept: bool) -> None:
    assert outcome_of(SAME, **changes).equal is kept


def test_a_plan_is_said_in_words() -> None:
    sources = [
        ShardSource(rank=0, node_id="n1", level="memory"),
        ShardSource(rank=1, level="memory"),
        ShardSource(rank=2, node_id="n3", level="nvme"),
        ShardSource(rank=3, node_id="n4", level="memory"),
    ]
    held = [("n1", "nvme"), ("n1", "memory"), ("n3", "nvme"), ("n4", "memory")]
    parities = [ParitySource(plan_id="a", node_id=node, level=level) for node, level in held]
    plan = SnapshotPlan(sources=sources, parities=parities)
    assert in_words(plan) == (
        "rank 0 and 3 from memory, rank 2 from nvme, "
        "rank 1 decoded with the parity in memory and nvme"
    )
    assert parity_levels(SnapshotPlan(parities=parities[:2])) == ["memory"]
