"""Several ranks on one node, as torchrun starts them: one commit, one copy of what is equal."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.snapshot.layout import decode

from .conftest import DEADLINE_S, AgentProcess, eventually

Facts = list[dict[str, Any]]
Launch = Callable[..., subprocess.Popen[bytes]]
PARAMETERS = 2 * (200 * 200 + 200) + 2 * 200
REPLICATED_BYTES = 3 * 4 * PARAMETERS  # weights and two moments


@pytest.fixture
def launch(agent_process: AgentProcess, tmp_path: Path) -> Iterator[Launch]:
    """Starts torchrun with the script ranks.py; all of it ends with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def launched(world: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(world), "--max-restarts", str(restarts)]
        command += [str(Path(__file__).parent / "ranks.py"), "--out", str(tmp_path), *arguments]
        environ = {"EVERSTEP_AGENT": agent_process.address, "OMP_NUM_THREADS": "1"}
        with (tmp_path / "torchrun.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONWARNINGS": "ignore", **environ},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield launched
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(DEADLINE_S)


def facts(out: Path, phase: str, world: int, running: subprocess.Popen[bytes]) -> Facts:
    """What each rank has written of a phase."""
    paths = [out / f"{phase}-{rank}.json" for rank in range(world)]

    def written() -> bool:
        there = all(path.exists() for path in paths)
        assert there or running.poll() is None, (out / "torchrun.log").read_text()[-4000:]
        return there

    eventually(written, f"phase {phase}")
    return [json.loads(path.read_text()) for path in paths]


def test_two_ranks_are_killed_and_go_on(
    agent_process: AgentProcess, launch: Launch, tmp_path: Path
) -> None:
    running = launch(2, "drift", "first", "--linger")
    check_drift(facts(tmp_path, "drift", 2, running))
    first = facts(tmp_path, "first", 2, running)
    assert [rank["start"] for rank in first] == [None, None]
    assert all(rank["committed 3"] and rank["committed 7"] for rank in first)
    # What DDP keeps equal is, and the rest is each rank's own: else nothing below would count.
    for name in ("weights", "optimizer"):
        assert first[0]["at 7"][name] == first[1]["at 7"][name]
    for name in ("buffers", "residual", "generator", "own_rank"):
        assert first[0]["at 7"][name] != first[1]["at 7"][name]
    # Rank 1 never captured step 9, so it never was a snapshot.
    assert first[0]["alone at 9"] == ["sealed", ["other ranks or the agent"]]
    check_replicas_are_stored_once(agent_process)

    for rank in first:
        os.kill(rank["pid"], signal.SIGKILL)
    assert running.wait(DEADLINE_S) != 0
    eventually(lambda: agent_process.steps_on_nvme("ranks") == [7], "the flush after the death")

    running = launch(2, "second", "alone")
    second = facts(tmp_path, "second", 2, running)
    alone = facts(tmp_path, "alone", 2, running)
    assert running.wait(DEADLINE_S) == 0
    assert [rank["start"] for rank in second] == [7, 7]
    assert {rank["incarnation"] for rank in second} == {first[0]["incarnation"] + 1}
    assert [rank["restored"] for rank in second] == [rank["at 7"] for rank in first]
    assert all(rank["committed"] for rank in second)
    for rank in (0, 1):
        assert second[rank]["end"] == {k: v for k, v in alone[rank].items() if k != "pid"}
    assert agent_process.steps_on_nvme("ranks") == [7, 12]


def check_drift(ranks: Facts) -> None:
    for rank in ranks:
        assert rank["before"]
        committed, reason = rank["drifted"]
        assert not committed
        assert "model/2.weight" in reason
        assert "model/0.weight" not in reason
        assert rank["after"]
        assert rank["rewound to"] == 3
        assert rank["same again"]
        assert rank["on again"]
    assert ranks[0]["own weights"] != ranks[1]["own weights"]


def check_replicas_are_stored_once(agent: AgentProcess) -> None:
    held = [one for one in agent.memory.records("ranks") if one.snapshot.step == 7]
    assert sorted(one.rank for one in held) == [0, 1]
    for one in held:
        layout = decode(agent.memory.layout("ranks", one.record.layout_id), "layout")
        replicated = [leaf for leaf in layout.leaves if leaf.replicated]
        held_bytes = sum(leaf.held_bytes for leaf in replicated)
        whole_bytes = sum(leaf.whole_bytes for leaf in replicated)
        assert whole_bytes >= REPLICATED_BYTES
        assert abs(held_bytes - whole_bytes / 2) <= 64 * 1024
        own = {leaf.name for leaf in layout.leaves if not leaf.replicated}
        assert {"model/1.running_mean", "own/residual"} <= own
        # One digest for each replicated leaf and one for their names, after the group and its size.
        assert len(one.record.replica_samples) == 8 * (2 + len(replicated))


@pytest.mark.long
def test_three_ranks_restarted_by_torchrun(launch: Launch, tmp_path: Path) -> None:
    """One of them dies; torchrun starts all again; each gets its own back."""
    running = launch(3, "restarted", "alone", "--until", "8", restarts=1)
    ranks = facts(tmp_path, "restarted", 3, running)
    alone = facts(tmp_path, "alone", 3, running)
    assert running.wait(DEADLINE_S) == 0
    assert [rank["start"] for rank in ranks] == [4, 4, 4]
    assert len({rank["restored"]["generator"] for rank in ranks}) == 3
    assert [rank["restored"]["own_rank"] for rank in ranks] == [0, 1, 2]
    for rank in range(3):
        assert ranks[rank]["end"] == {k: v for k, v in alone[rank].items() if k != "pid"}
