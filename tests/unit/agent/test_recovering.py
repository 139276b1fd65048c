"""`everstep recover`: what is shown of a plan, its progress and its outcome."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from everstep.agent import display, recovering
from everstep.agent.display import Advance
from everstep.agent.exits import FAILED, FINE
from everstep.agent.planning import SnapshotPlan, plan_snapshots
from everstep.agent.rebuilding import Movement, expected_s, movements
from everstep.agent.recovering import Outcome, Report
from everstep.proto.errors import NothingRecoverable
from everstep.proto.ids import SnapshotId
from everstep.proto.peer_pb2 import MendProgress

from .protected import all_nodes, even

BYTES_S = 1e6


def plans() -> list[SnapshotPlan]:
    """Step 50 is lost, step 40 takes decoding."""
    plan = even(4, 1, ranks=2)
    newer = replace(plan, snapshot=SnapshotId(2, 50), plan_id="newer")
    older, newest = all_nodes(plan)[1:], all_nodes(newer)[2:]
    both = [
        replace(node, snapshots=node.snapshots + other.snapshots)
        for node, other in zip(older[1:], newest, strict=True)
    ]
    return plan_snapshots([older[0], *both])


def report(*, moved: list[Movement] | None = None) -> Report:
    found = plans()
    chosen = recovering.choose("gpt", found)
    travels = movements(chosen, {0: "n9", 1: "n9"}) if moved is None else moved
    return recovering.recover_report(
        "gpt",
        found,
        chosen,
        travels,
        expected_s=expected_s(travels, BYTES_S),
        bytes_s=BYTES_S,
        problems=["n1 does not answer"],
    )


def test_the_first_that_is_recoverable_is_chosen_and_else_each_says_why_not() -> None:
    found = plans()
    assert [plan.recoverable for plan in found] == [False, True]
    assert recovering.choose("gpt", found) is found[1]
    with pytest.raises(NothingRecoverable, match="ranks 0-1: last held by n1") as caught:
        recovering.choose("gpt", found, to_step=50)
    assert len(caught.value.rejected) == 2
    assert all(reason.startswith("step 50 (incarnation 2)") for reason in caught.value.rejected)
    with pytest.raises(NothingRecoverable, match="hold nothing of step 60"):
        recovering.choose("gpt", found, to_step=60)
    with pytest.raises(NothingRecoverable, match="hold no snapshot"):
        recovering.choose("gpt", [])


def test_the_document_has_it_all_in_plain_json() -> None:
    told = json.loads(json.dumps(report()))
    lost, found = told["snapshots"]
    assert (lost["step"], lost["recoverable"], lost["further_losses"]) == (50, False, None)
    assert lost["missing"][0].startswith("ranks 0-1: last held by n1")
    assert (found["step"], found["recoverable"], found["missing"]) == (40, True, [])
    assert found["decoded_ranks"] == [0, 1] and found["levels"] == ["memory"]
    assert (found["further_losses"], found["memory_losses"]) == (0, 0)
    assert told["chosen"]["step"] == 40
    first, second = told["chosen"]["sources"][0], told["chosen"]["sources"][2]
    assert (first["node_id"], first["plan_id"]) == (None, "plan")
    assert (second["node_id"], second["level"], second["plan_id"]) == ("n2", "memory", None)
    assert told["bytes"] == sum(one["bytes"] for one in told["movements"]) > 0
    assert {one["to"] for one in told["movements"]} == {"n9", "n2", "n3", "n4"}
    assert told["expected_s"] > 0 and told["problems"] == ["n1 does not answer"]
    assert recovering.exit_status(told) == FINE


def test_people_see_the_table_the_movements_and_the_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recovering.show_recover(report())
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    (lost,) = (line for line in lines if line.split()[:1] == ["50"])
    (found,) = (line for line in lines if line.split()[:2] == ["40", "2"])
    assert "ranks 0-1: last held by n1" in lost
    assert found.split() == "40 2 memory ok ranks 0-1 0 nodes 0 nodes".split()
    assert "to be recovered: step 40, incarnation 2" in shown.out
    assert "symbols to decode rank 0" in shown.out and "decoded" in shown.out
    assert "in all; about 6 s if each node sends and receives 976.6 KiB a second" in shown.out
    assert shown.err == "warning: n1 does not answer\n"


def test_where_nothing_travels_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    recovering.show_recover(report(moved=[]))
    assert "nothing has to travel" in capsys.readouterr().out


def test_many_movements_are_cut_but_not_in_the_document(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = report(moved=[Movement(f"n{index}", "n9", 1, "") for index in range(50)])
    recovering.show_recover(told)
    assert "and 10 more: see --json" in capsys.readouterr().out
    assert len(told["movements"]) == 50


def test_where_nothing_can_be_recovered_the_status_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = recovering.recover_report("gpt", plans()[:1], None, [], expected_s=0, bytes_s=1)
    recovering.show_recover(told)
    assert "nothing can be recovered" in capsys.readouterr().err
    assert recovering.exit_status(told) == FAILED


def test_control_characters_from_other_nodes_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    evil = replace(plans()[0], missing=("\x1b[2J gone",))
    told = recovering.recover_report("gpt", [evil], None, [], expected_s=0, bytes_s=1)
    recovering.show_recover({**told, "problems": ["\x1b[2J"]})
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "gone" in shown.out


class Meter:
    """What progress was shown."""

    def __init__(self) -> None:
        self.total = self.shown = 0

    @contextmanager
    def __call__(self, title: str, total_bytes: int) -> Iterator[Advance]:
        self.total = total_bytes

        def advance(more_bytes: int) -> None:
            assert more_bytes > 0
            self.shown += more_bytes

        yield advance


def progress(what: str, done: int, *, ended: bool = False, problem: str = "") -> MendProgress:
    return MendProgress(what=what, done_bytes=done, ended=ended, problem=problem)


def test_progress_of_all_nodes_is_one_and_never_goes_back() -> None:
    meter = Meter()
    told = [
        ("n1", progress("rank 0", 10)),
        ("n2", progress("rank 1", 5)),
        ("n1", progress("rank 0", 8)),
        ("n1", progress("rank 0", 30)),
        ("n1", progress("rank 2", 30)),
        ("n2", progress("rank 1", 40)),
        ("n1", progress("", 0, ended=True)),
        ("n2", progress("", 0, ended=True)),
    ]
    outcomes = recovering.follow(told, {"n1": 60, "n2": 40}, meter)
    assert (meter.total, meter.shown) == (100, 100)
    assert outcomes == (Outcome("n1", 60, ""), Outcome("n2", 40, ""))


def test_a_node_that_does_not_say_that_it_is_done_has_failed() -> None:
    told = [
        ("n1", progress("rank 0", 60)),
        ("n2", progress("rank 1", 5, problem="no memory", ended=True)),
        ("n2", progress("", 0, problem="later trouble")),
    ]
    outcomes = recovering.follow(told, {"n1": 60, "n2": 40, "n3": 1}, display.silent)
    assert outcomes == (
        Outcome("n1", 60, "it stopped before it said that it was done"),
        Outcome("n2", 5, "no memory"),
        Outcome("n3", 0, "it stopped before it said that it was done"),
    )


@pytest.mark.parametrize(("problem", "status"), [("", FINE), ("no memory", FAILED)])
def test_the_outcome_is_said_and_is_the_status(
    capsys: pytest.CaptureFixture[str], problem: str, status: int
) -> None:
    outcomes = [Outcome("n1", 2048, ""), Outcome("n2", 1024, problem)]
    told = recovering.outcome_report(report(), outcomes)
    recovering.show_outcome(told)
    shown = capsys.readouterr()
    assert recovering.exit_status(told) == status
    assert told["recovered"] == (status == FINE)
    if status == FINE:
        assert "recovered step 40 of job gpt: 3.0 KiB are again in memory (n1, n2)" in shown.out
        assert shown.err == ""
    else:
        assert "failed at n2: no memory" in shown.err and "run it again" in shown.err
        assert shown.out == ""
