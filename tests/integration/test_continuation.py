"""A trainer is killed; the next one goes on as if nothing had happened, to the last bit."""

from collections.abc import Callable

from .conftest import AgentProcess, Trainer

CASES = ["adamw", "sgd", "lbfgs"]
StartTrainer = Callable[..., Trainer]


def test_killed_trainers_go_on_bit_for_bit(
    agent_process: AgentProcess, start_trainer: StartTrainer
) -> None:
    """Killed at step 11, four steps after the newest of two snapshots at odd moments."""
    alone = start_trainer(None, "--alone", "--cases", *CASES, "--until", "17")
    first = start_trainer(
        agent_process, "--linger", "--cases", *CASES, "--until", "11", "--snapshot-at", "3", "7"
    )
    before = first.facts(len(CASES))
    assert all(facts["committed"][-1] == 7 for facts in before.values()), before
    first.kill()
    expected = alone.facts(len(CASES))
    assert alone.ended() == 0

    second = start_trainer(
        agent_process, "--close", "--seed", "2", "--cases", *CASES, "--until", "17",
        "--snapshot-at", "8", "13",
    )  # fmt: skip
    after = second.facts(len(CASES))
    assert second.ended() == 0
    assert [after[case]["start"] for case in CASES] == [7, 7, 7]
    assert [after[case]["digest"] for case in CASES] == [expected[case]["digest"] for case in CASES]
    assert len({facts["digest"] for facts in expected.values()}) == len(CASES)
    # The first trainer's death flushed step 7 by itself; the second one closed in good order.
    for case in CASES:
        assert agent_process.steps_on_nvme(f"job-{case}") == [7, 13]
