"""Processes that stop, linger, collide or are asked to end: nobody waits for ever."""

import os
import signal
import socket
import time

import pytest
from harness import Node, Process, TrainerError, until

STALL_S = 1.0
"""More than `offer_s` twice over, far less than any wait on an agent that does not answer."""


def test_agent_stopped(node: Node) -> None:
    agent = node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(2))
    before = node.committed("memory")
    trainer.do("warned")
    agent.stop()
    lines = node.note(trainer.run(6, ""))
    assert len(lines) == 6
    assert sum(bool(line["skipped"]) for line in lines) >= 5
    assert max(line["stall_s"] for line in lines) < STALL_S
    assert len(trainer.do("warned")) == 1
    agent.proceed()
    lines = node.note(trainer.do("until_committed"))
    assert before[-1] < node.committed("memory")[-1]
    node.assert_all_intact()
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=lines[-1]["step"])


def test_agent_stopped_before_the_first_snapshot(node: Node) -> None:
    """Not even the arena is there yet: that setup is allowed to take long, silence is not."""
    agent = node.start_agent()
    trainer = node.trainer()
    agent.stop()
    lines = trainer.run(3, "")
    assert all(line["skipped"].startswith("agent") for line in lines), lines
    assert max(line["stall_s"] for line in lines) < STALL_S
    agent.proceed()
    node.note(trainer.do("until_committed"))


def test_agent_stopped_in_the_middle(node: Node) -> None:
    """It stops inside a call, so that what it goes on with later nobody waits for any more."""
    for point in ("agent.offer.decided", "agent.seal.before_record", "agent.seal.before_reply"):
        agent = node.start_agent(f"{point}=stop@3")
        trainer = node.trainer(limits={"seal_s": 1.0})
        trainer.do("restore")
        node.note(trainer.run(2))
        node.note(trainer.run(3, ""))
        agent.until_stopped()
        lines = node.note(trainer.run(3, ""))
        assert all(line["skipped"] or line["dropped"] for line in lines[1:]), (point, lines)
        agent.proceed()
        node.note(trainer.do("until_committed"))
        node.note(trainer.run(2))
        newest = node.committed("memory")[-1]
        node.assert_all_intact()
        trainer.kill()
        trainer = node.trainer()
        node.assert_restored(trainer.do("restore"), step=newest[1])
        trainer.kill()
        agent.kill()
        assert "Traceback" not in agent.text(), agent.text()


def test_trainer_stopped(node: Node) -> None:
    """Its session, its rank and its snapshots are as it left them."""
    node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(2))
    before = node.committed("memory")
    trainer.process.stop()
    # As long as the agent would need to notice the end of a process that died.
    for _ in range(20):
        assert node.job().ranks[0].attached
    assert node.committed("memory") == before
    trainer.process.proceed()
    assert [line["state"] for line in node.note(trainer.run(2))] == ["memory", "memory"]
    assert node.job().incarnation == 1


def test_trainer_stopped_while_it_copies(node: Node) -> None:
    node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(2))
    trainer.do("arm", failpoints="client.capture.block=stop@1")
    trainer.begin("run", steps=1, level="memory")
    trainer.process.until_stopped()
    assert node.committed("memory")[-1] == (1, 2)
    trainer.process.proceed()
    assert node.note(trainer.end())[0]["state"] == "memory"
    node.assert_all_intact()
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=3)


def test_rank_claimed_twice(node: Node) -> None:
    node.start_agent()
    first = node.trainer()
    node.note(first.run(2))
    second = node.start_trainer()
    with pytest.raises(TrainerError) as claimed:
        second.do("connect", address=node.address)
    assert claimed.value.kind == "RankClaimed"
    for fact in ("rank 0", "'job'", f"process {first.process.pid}", "end that process"):
        assert fact in claimed.value.message
    # Another rank, another job: no collision.
    second.do("connect", address=node.address, job="other")
    assert node.note(first.run(1))[0]["state"] == "memory"
    # A process that is stopped is alive too.
    first.process.stop()
    with pytest.raises(TrainerError, match=f"RankClaimed.*process {first.process.pid}"):
        node.start_trainer().do("connect", address=node.address)
    first.process.signal(signal.SIGKILL)
    first.process.proceed()
    first.dies()
    third = node.trainer()
    node.assert_restored(third.do("restore"), step=3)


def test_zombie_of_an_earlier_launch(node: Node) -> None:
    """It was stopped, and everybody who knew of it is gone: only its lock on the arena is left."""
    agent = node.start_agent()
    zombie = node.trainer()
    node.note(zombie.run(2))
    zombie.process.stop()
    agent.kill()
    (node.memory / "job" / "membership").unlink()
    agent = node.start_agent()
    trainer = node.trainer()
    node.assert_restored(trainer.do("restore"), step=2)
    lines = trainer.run(3)
    assert all(f"process {zombie.process.pid}" in line["skipped"] for line in lines), lines
    assert len(trainer.do("warned")) == 1
    assert node.committed("memory")[-1] == (1, 2)
    # It goes on, and finds that its time is over; nothing it does reaches the arena's records.
    zombie.process.proceed()
    until(lambda: "ended" in str(zombie.do("warned")) or zombie.do("ended"), "its end")
    assert all(line["skipped"] for line in zombie.run(2))
    node.assert_all_intact()
    zombie.kill()
    lines = node.note(trainer.do("until_committed"))
    assert node.committed("memory")[-1] == (2, lines[-1]["step"])
    assert agent.alive


def test_zombie_wakes_after_its_successor_took_over(node: Node) -> None:
    """Its rank was claimed when the agent could not tell that it lives: it stays out."""
    agent = node.start_agent()
    zombie = node.trainer()
    node.note(zombie.run(2))
    zombie.process.stop()
    agent.kill()
    node.wipe_memory()
    node.start_agent()
    trainer = node.trainer()
    trainer.do("restore")
    node.note(trainer.run(3, "memory"))
    before = node.committed("memory")
    zombie.process.proceed()
    until(lambda: zombie.do("ended"), "its end")
    lines = zombie.run(3)
    assert all("incarnation" in line["skipped"] or "held by" in line["skipped"] for line in lines)
    assert node.committed("memory") == before
    node.assert_all_intact()
    assert node.note(trainer.run(1))[0]["state"] == "memory"


def test_stale_socket(node: Node) -> None:
    """Files of a killed agent: the socket, its lock, the private socket behind it."""
    agent = node.start_agent()
    agent.kill()
    assert node.socket.is_socket()
    trainer = node.start_trainer()
    with pytest.raises(TrainerError) as refused:
        trainer.do("connect", address=node.address, limits={"agent_start_s": 0.5})
    assert refused.value.kind == "AgentUnavailable"
    for fact in (str(node.socket), "everstep status"):
        assert fact in refused.value.message
    node.start_agent()
    trainer.do("connect", address=node.address)
    assert node.note(trainer.run(1))[0]["state"] == "memory"


def refused_start(node: Node, **options: object) -> str:
    agent = node.start_agent(ready=False, **options)
    assert agent.ended() not in (0, -9)
    return agent.text()


def test_two_agents(node: Node) -> None:
    first = node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(1))
    text = refused_start(node)
    assert "another agent" in text, text
    assert str(node.base) in text, text
    # Another socket does not help: it would fight over the same arenas.
    text = refused_start(node, socket_path=node.base / "second.sock")
    assert "another agent" in text, text
    assert str(node.memory) in text, text
    memory, node.memory = node.memory, node.ram / "second"
    text = refused_start(node, socket_path=node.base / "third.sock")
    assert "another agent" in text, text
    assert str(node.nvme) in text, text
    node.memory = memory
    assert first.alive
    assert [line["state"] for line in node.note(trainer.run(2))] == ["memory"] * 2


def test_socket_path_taken_by_a_file(node: Node) -> None:
    node.socket.write_text("precious")
    text = refused_start(node)
    assert "not a socket" in text
    assert str(node.socket) in text
    assert node.socket.read_text() == "precious"


def test_full_descriptor_table(node: Node) -> None:
    """Whoever comes too late is refused; whoever is attached keeps every snapshot and flush."""
    agent = node.start_agent(nofile=160)
    trainer = node.trainer()
    node.note(trainer.run(1, "nvme"))
    crowd: list[socket.socket] = []

    def more_come() -> None:
        for _ in range(200):
            crowd.append(socket.socket(socket.AF_UNIX))
            crowd[-1].connect(str(node.socket))

    try:
        more_come()
        until(lambda: "connections are taken" in agent.text(), "the refusal")
        lines = []
        for _ in range(3):
            more_come()
            lines += node.note(trainer.run(1, "nvme"))
        assert "Too many open files" not in agent.text()
        reasons = [line["skipped"] or line["dropped"] for line in lines]
        assert [line["state"] for line in lines] == ["nvme"] * 3, reasons
        late = node.start_trainer()
        with pytest.raises(TrainerError, match="AgentUnavailable"):
            late.do("connect", address=node.address, job="late", limits={"agent_start_s": 0.5})
    finally:
        for visitor in crowd:
            visitor.close()
    late.do("connect", address=node.address, job="late")
    assert late.run(1)[0]["state"] == "memory"
    assert agent.alive
    assert len(os.listdir(f"/proc/{agent.pid}/fd")) < 100


def ended_in_order(agent: Process, within_s: float) -> None:
    begun = time.monotonic()
    agent.signal(signal.SIGTERM)
    assert agent.ended(within_s + 10.0) == 0, agent.text()
    assert time.monotonic() - begun < within_s, agent.text()


def test_sigterm_flushes(node: Node) -> None:
    """Preemption: what was only in memory is on disk when the process has ended."""
    agent = node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(3))
    assert node.committed("nvme") == []
    ended_in_order(agent, 10.0)
    lines = trainer.run(2)
    assert all(line["skipped"].startswith("agent") for line in lines), lines
    assert not node.socket.exists()
    trainer.kill()
    node.wipe_memory()
    node.start_agent()
    node.assert_restored(node.trainer().do("restore"), step=3)


def test_sigterm_with_a_disk_that_hangs(node: Node) -> None:
    """The grace is a promise: a supervisor's SIGKILL would come next."""
    node.options["agent"] = {"shutdown_timeout_s": 1.0}
    agent = node.start_agent(f"storage.shard.before_chunk=hold:{node.base}/held")
    trainer = node.trainer()
    node.note(trainer.run(2))
    ended_in_order(agent, 6.0)
    assert "shutdown_timeout_s" in agent.text()
    trainer.kill()
    node.start_agent()
    node.assert_nothing_left_over()
    node.assert_restored(node.trainer().do("restore"), step=2)


def test_sigterm_with_a_full_disk(node: Node) -> None:
    agent = node.start_agent("storage.shard.before_write=error:ENOSPC")
    trainer = node.trainer()
    node.note(trainer.run(2))
    ended_in_order(agent, 10.0)
    assert "MB more" in agent.text()
    trainer.kill()
    node.start_agent()
    node.assert_restored(node.trainer().do("restore"), step=2)


def test_close_without_an_agent(node: Node) -> None:
    """A script that ends in order ends, whatever has become of the agent."""
    for fate in (Process.kill, Process.stop):
        agent = node.start_agent()
        trainer = node.trainer(limits={"close_s": 1.0, "agent_start_s": 1.0, "seal_s": 1.0})
        trainer.do("restore")
        trainer.run(1)
        fate(agent)
        trainer.run(1, "")
        begun = time.monotonic()
        trainer.do("close")
        assert time.monotonic() - begun < 8.0
        assert trainer.run(1, "")[0]["skipped"] == "the client is closed"
        trainer.kill()
        agent.proceed()
        agent.kill()


def test_agent_restarted_while_ranks_copy(node: Node) -> None:
    """One of two ranks dies in the middle: the step never commits, and the job starts again."""
    node.start_agent()
    ranks = [node.trainer(rank=rank, world=2, seed=rank) for rank in (0, 1)]
    for rank in ranks:
        rank.begin("run", steps=1, level="memory")
    first = [rank.end()[0] for rank in ranks]
    assert {line["state"] for line in first} == {"memory"}
    ranks[1].do("arm", failpoints="client.seal.before=kill")
    for rank in ranks:
        rank.begin("run", steps=1, level="memory")
    assert ranks[1].dies() == -9
    (line,) = ranks[0].end()
    assert line["state"] == "dropped", line
    assert "rank 1" in line["dropped"], line
    assert node.committed("memory")[-1] == (1, 1)
    ranks[0].kill()
    ranks = [node.trainer(rank=rank, world=2, seed=7) for rank in (0, 1)]
    for rank, before in zip(ranks, first, strict=True):
        answer = rank.do("restore")
        assert (answer["step"], answer["digest"]) == (1, before["digest"])
    for rank in ranks:
        rank.begin("run", steps=1, level="memory")
    assert {rank.end()[0]["state"] for rank in ranks} == {"memory"}


def test_update_behind_the_optimizers_back(node: Node) -> None:
    """A weight is changed while it is copied: that snapshot is dropped and the leaf named."""
    node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(2))
    trainer.do("arm", failpoints=f"client.capture.block=hold:{node.base}/block@1")
    trainer.begin("torn_step", mark=str(node.base / "changed"))
    until((node.base / "changed").exists, "the change")
    (node.base / "block.go").touch()
    line = trainer.end()
    assert line["state"] == "dropped", line
    assert "model/0.weight" in line["dropped"], line
    assert "between snapshot() and the optimizer's step" in line["dropped"]
    assert node.committed("memory")[-1] == (1, 2)
    # That weight is copied at once from now on.
    assert node.note(trainer.run(1))[0]["state"] == "memory"
    node.assert_all_intact()
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=4)


def test_replaced_tensors(node: Node) -> None:
    """New memory under an old name: a pointer that was kept would save the old state for ever."""
    node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(1))
    trainer.do("replace")
    node.note(trainer.run(2))
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=3)


def test_forked_workers(node: Node) -> None:
    """DataLoader workers inherit the client; they neither hang nor disturb its session."""
    node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(1))
    for _ in range(2):
        items = trainer.do("loader")
        assert items["workers"] == 2
        assert not items["own"]
        assert node.note(trainer.run(1))[0]["state"] == "memory"
    assert node.job().incarnation == 1
    assert node.job().ranks[0].attached
    newest = node.committed("memory")[-1]
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=newest[1])


def test_no_descriptor_per_snapshot(node: Node) -> None:
    """Neither side's table fills up however long a run is."""
    agent = node.start_agent()
    trainer = node.trainer()
    trainer.run(3, "nvme")

    def counted() -> tuple[int, int]:
        return trainer.do("descriptors"), len(os.listdir(f"/proc/{agent.pid}/fd"))

    trainer.run(1, "nvme")
    before = counted()
    trainer.run(15, "nvme")

    def as_few() -> bool:
        # What was flushed is let go of after it was told.
        after = counted()
        return after[0] <= before[0] + 2 and after[1] <= before[1] + 2

    until(as_few, f"no more descriptors than {before}")


def test_save_that_fails_never_ends_training(node: Node) -> None:
    """Every call to the agent fails in turn, at its worst; all that a step sees is a reason."""
    node.start_agent(
        "storage.reserve.before_allocate=error:EIO@1;storage.layout.before_write="
        "error:EIO@1;storage.publish.before_write=error:EIO@2;"
        "storage.drop.before_unlink=error:EIO@1;storage.membership.after_write="
        "error:EIO@2;storage.commit.before_write=error:EIO@1"
    )
    trainer = node.trainer()
    lines = node.note(trainer.run(12, "nvme", timeout=1.0))
    assert [line["step"] for line in lines] == list(range(1, 13))
    lines = node.note(trainer.do("until_committed", level="nvme"))
    node.assert_all_intact()
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=lines[-1]["step"])
