"""Full and failing devices: refused early or failed as a whole, with the older snapshots untouched.

A device that cannot take a snapshot costs that snapshot, a counter and one warning; never an older
snapshot, never a step of training; and once it is mended, everything goes on by itself.
"""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import Node, Shim, until

from everstep.proto import agent_pb2 as wire

MB = 1_000_000
LARGE = 1300
"""Makes 40 MB of state: one slot fits into 64 MB, two do not."""


def fill(directory: Path, leave_bytes: int) -> Path:
    """Take all space but so much."""
    filler = directory / "filler"
    status = os.statvfs(directory)
    filler.touch()
    with filler.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave_bytes)
    return filler


def used_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def warned_once(messages: list[str], *facts: str) -> str:
    """The one message that has the first fact; it must have the others too."""
    found = [message for message in messages if facts[0] in message]
    assert len(found) == 1, messages
    assert all(fact in found[0] for fact in facts), found
    return found[0]


def test_memory_too_small(node: Node, small_tmpfs: Path) -> None:
    node.memory.rmdir()
    node.memory = small_tmpfs
    node.options["memory"] = {"keep_free_bytes": 0}
    agent = node.start_agent()
    trainer = node.trainer(size=LARGE)
    before = used_bytes(small_tmpfs)
    lines = trainer.run(4)
    assert all("MB more" in line["skipped"] for line in lines), lines
    # Nothing was written but the layout and who attached.
    assert used_bytes(small_tmpfs) - before < 100_000
    assert not node.arenas()
    warned_once(trainer.do("warned"), "MB more", "and has", "larger /dev/shm", "Training goes on")
    assert trainer.do("stats")["taken"] == 0
    assert agent.alive
    command = ["mount", "-o", "remount,size=160m", str(small_tmpfs)]
    subprocess.run(command, check=True)
    node.note(trainer.do("until_committed"))
    step = node.committed("memory")[-1][1]
    trainer.kill()
    node.assert_restored(node.trainer(size=LARGE).do("restore"), step=step)


def test_memory_fills_up_later(node: Node, small_tmpfs: Path) -> None:
    """The arena is there, whole; not even a word about who attached fits beside it any more."""
    node.memory.rmdir()
    node.memory = small_tmpfs
    node.options["memory"] = {"keep_free_bytes": 0}
    agent = node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(2))
    filler = fill(small_tmpfs, 0)
    agent.kill()
    agent = node.start_agent()
    assert node.committed("memory")[-1] == (1, 2)
    lines = trainer.do("until_refused", fact="MB more")
    assert "Snapshots already committed are untouched" in lines[-1]["skipped"]
    node.assert_all_intact()
    filler.unlink()
    lines = node.note(trainer.do("until_committed"))
    assert node.committed("memory")[-1] == (1, lines[-1]["step"])
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=lines[-1]["step"])


def test_no_room_for_a_record(node: Node, shim: Shim) -> None:
    """A shard whose record cannot be written is no snapshot, and costs none."""
    agent = node.start_agent(preload=shim.library, environ=shim.environ)
    trainer = node.trainer()
    node.note(trainer.run(2))
    for number, fact in ((errno.ENOSPC, "MB more"), (errno.EIO, "Input/output error")):
        before = node.committed("memory")[-1]
        shim.fail("write", number, 0, "-slot-")
        lines = trainer.run(4)
        assert all(fact in line["dropped"] for line in lines), lines
        assert node.committed("memory")[-1] == before
        node.assert_all_intact()
        # Nor would it be there after the agent's death.
        agent.kill()
        shim.heal()
        agent = node.start_agent(preload=shim.library, environ=shim.environ)
        assert node.committed("memory") == [before]
        node.assert_all_intact()
        node.note(trainer.do("until_committed"))
    warned_once(trainer.do("warned"), "was dropped", "already committed are untouched")
    step = node.committed("memory")[-1][1]
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=step)


def test_nvme_full(node: Node, small_tmpfs: Path) -> None:
    node.nvme = small_tmpfs
    node.options["nvme"]["interval"] = "1 steps"
    agent = node.start_agent()
    trainer = node.trainer()
    for _ in range(2):
        assert node.note(trainer.run(1, "nvme"))[0]["state"] == "nvme"
    filler = fill(small_tmpfs, 2 * MB)
    before = node.committed("nvme")
    (line,) = node.note(trainer.run(1, "nvme", patient=True))
    assert line["state"] == "memory"
    for fact in ("MB more", "and has", "Free space there"):
        assert fact in line["error"], line
    assert node.committed("nvme") == before
    assert node.committed("memory")[-1] == (1, 3)
    assert node.job().counters["flushes_failed"] >= 1
    assert str(small_tmpfs) in node.job().last_error
    node.assert_all_intact()
    # It fails again and again, at each interval, and leaves nothing behind.
    taken = used_bytes(small_tmpfs)
    node.note(trainer.run(3))
    until(lambda: used_bytes(small_tmpfs) - taken < 50_000, "the failed files going")
    filler.unlink()
    lines = node.note(trainer.do("until_committed", level="nvme"))
    assert lines[-1]["state"] == "nvme"
    assert agent.alive
    assert "Traceback" not in agent.text()
    trainer.kill()
    node.wipe_memory()
    agent.kill()
    node.start_agent()
    node.assert_restored(node.trainer().do("restore"), step=lines[-1]["step"])


def test_nvme_full_with_two_ranks(node: Node, small_tmpfs: Path) -> None:
    """The first rank's shard fits, the second's does not: the first must not stay for ever."""
    node.nvme = small_tmpfs
    node.options["nvme"]["keep_newest"] = 1
    node.start_agent()
    trainers = [node.trainer(rank=rank, world=2) for rank in (0, 1)]
    for trainer in trainers:
        trainer.begin("run", level="memory")
    assert [trainer.end()[0]["state"] for trainer in trainers] == ["memory"] * 2
    fill(small_tmpfs, 5 * MB)
    taken = used_bytes(small_tmpfs)
    for _ in range(3):
        reply = node.ask("Persist", wire.PersistRequest(job="job", timeout_s=10.0))
        assert not reply.durable
        assert "MB more" in reply.reason, reply
        for trainer in trainers:
            trainer.begin("run", level="memory")
        assert [trainer.end()[0]["state"] for trainer in trainers] == ["memory"] * 2
    assert used_bytes(small_tmpfs) - taken < 100_000, list(small_tmpfs.rglob("*"))


CASES = [
    ("pwrite", errno.EIO, "safetensors"),
    ("fsync", errno.EIO, "safetensors"),
    ("fallocate", errno.EIO, "safetensors"),
    ("rename", errno.EIO, "safetensors"),
    ("fsync", errno.EIO, "rank-00000.record"),
    ("write", errno.EIO, "rank-00000.record"),
    ("fsync", errno.EIO, ".commit"),
    ("rename", errno.EIO, "commit"),
    ("pwrite", errno.ENOSPC, "safetensors"),
    ("fsync", errno.EDQUOT, "safetensors"),
    ("fsync", errno.EROFS, "/step-"),
]


def test_nvme_failing(node: Node, shim: Shim) -> None:
    """Each call of a flush fails in turn; no file that failed is ever believed."""
    agent = node.start_agent(preload=shim.library, environ=shim.environ)
    trainer = node.trainer()
    assert node.note(trainer.run(1, "nvme"))[0]["state"] == "nvme"
    for call, number, marker in CASES:
        before = node.committed("nvme")
        shim.fail(call, number, 1, marker)
        (line,) = node.note(trainer.run(1, "memory"))
        assert line["state"] == "memory"
        reply = node.ask("Persist", wire.PersistRequest(job="job", timeout_s=10.0))
        case = (call, errno.errorcode[number], marker, reply)
        assert not reply.durable, case
        space = number in (errno.ENOSPC, errno.EDQUOT)
        for fact in ("MB more",) if space else (os.strerror(number), "older", "Check the device"):
            assert fact in reply.reason, case
        assert str(node.nvme) in reply.reason, case
        assert node.committed("nvme") == before, case
        failed = node.nvme / "job" / f"step-{line['step']:012d}"
        assert not (failed / "commit").exists(), case
        inodes = {path.stat().st_ino for path in failed.rglob("*")} if failed.exists() else set()
        # The device is well again: the same snapshot, in new files.
        reply = node.ask("Persist", wire.PersistRequest(job="job", timeout_s=10.0))
        assert reply.durable, case
        assert node.committed("nvme")[-1] == (1, line["step"]), case
        (image,) = failed.glob("*.safetensors")
        assert image.stat().st_ino not in inodes, case
        node.assert_all_intact()
        shim.heal()
    assert "Traceback" not in agent.text()
    trainer.kill()
    agent.kill()
    node.wipe_memory()
    node.start_agent()
    node.assert_nothing_left_over()
    node.assert_restored(node.trainer().do("restore"), step=line["step"])


def test_short_writes(node: Node, shim: Shim) -> None:
    """A device that takes half of what it is given, each time, is asked again."""
    node.start_agent(preload=shim.library, environ=shim.environ)
    trainer = node.trainer()
    for call, marker in (("pwrite", "safetensors"), ("write", "rank-"), ("write", "commit")):
        shim.fail(call, -2, 0, marker)
        (line,) = node.note(trainer.run(1, "nvme"))
        assert line["state"] == "nvme", (call, marker, line)
        node.assert_all_intact()
    trainer.kill()
    node.wipe_memory()
    node.agent.kill()
    node.start_agent()
    node.assert_restored(node.trainer().do("restore"), step=3)


def test_nvme_gone_at_the_start(node: Node) -> None:
    """A disk that is no directory any more does not take the memory level with it."""
    agent = node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(2))
    agent.signal(9)
    agent.ended()
    shutil.rmtree(node.nvme)
    node.nvme.write_text("not a directory")
    agent = node.start_agent(ready=False)
    assert agent.ended() not in (0, -9)
    assert "not a directory" in agent.text() or "is a file" in agent.text()
    assert str(node.nvme) in agent.text()
    node.nvme.unlink()
    node.start_agent()
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=2)


def test_memory_emptied_under_everyone(node: Node) -> None:
    """Somebody cleans /dev/shm while agent and trainer run."""
    agent = node.start_agent()
    trainer = node.trainer()
    node.note(trainer.run(2))
    assert node.ask("Persist", wire.PersistRequest(job="job", timeout_s=10.0)).durable
    trainer.do("warned")
    node.wipe_memory()
    lines = node.note(trainer.do("until_committed"))
    assert len(lines) < 200
    told = [line for line in trainer.do("warned") if "gone" in line or "missing" in line]
    assert told, "nobody was told"
    node.assert_all_intact()
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=lines[-1]["step"])
    assert agent.alive


@pytest.mark.parametrize("wiped", [True, False])
def test_memory_emptied_while_the_agent_is_away(node: Node, wiped: bool) -> None:
    """The trainer still maps the old arena; what it writes there must not be believed."""
    agent = node.start_agent()
    trainer = node.trainer()
    for _ in range(2):
        assert node.note(trainer.run(1, "nvme"))[0]["state"] == "nvme"
    agent.kill()
    if wiped:
        node.wipe_memory()
    agent = node.start_agent()
    lines = node.note(trainer.do("until_committed"))
    assert node.committed("memory")[-1] == (1, lines[-1]["step"])
    node.assert_all_intact()
    trainer.kill()
    node.assert_restored(node.trainer().do("restore"), step=lines[-1]["step"])
    assert "Traceback" not in agent.text()
