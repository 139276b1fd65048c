"""Damaged bytes at rest: found, named, and another copy taken. Never a wrong byte, never silence.

Each case damages the files of a job whose agent and trainer are gone, starts both again, and says
which step must come back; None for an error that names the damage, since a silent start from
nothing would be the worst answer of all.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Node, TrainerError, Zygote

PAGE = 4096


@pytest.fixture(scope="module")
def begun(zygotes: dict[str, Zygote]) -> Iterator[Node]:
    """Two jobs of one form: steps 1 to 3 on NVMe, 2 and 3 also in memory."""
    node = Node(zygotes)
    node.options["nvme"]["keep_newest"] = 3
    agent = node.start_agent()
    for job, seed in (("job", 1), ("other", 2)):
        trainer = node.trainer(job=job, seed=seed)
        for _ in range(3):
            lines = trainer.run(1, "nvme")
            assert lines[0]["state"] == "nvme"
            if job == "job":
                node.note(lines)
        trainer.kill()
    agent.kill()
    yield node
    node.close()


@pytest.fixture
def again(node: Node, begun: Node) -> Node:
    node.adopt_files(begun.memory, begun.nvme)
    node.digests = begun.digests
    node.options["nvme"] |= {"keep_newest": 3, "flush_on_exit": False}
    return node


def flip(path: Path, at: int = -1, count: int = 1) -> None:
    """Invert bits of `count` bytes in a row."""
    data = bytearray(path.read_bytes())
    at = len(data) // 2 if at < 0 else at
    for index in range(at, at + count):
        data[index] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path, bytes_off: int = PAGE) -> None:
    os.truncate(path, path.stat().st_size - bytes_off)


def zero_page(path: Path, at: int = 2 * PAGE) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(PAGE))


def swap(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def step(node: Node, number: int, job: str = "job") -> Path:
    return node.nvme / job / f"step-{number:012d}"


def shard(node: Node, number: int = 3, job: str = "job") -> Path:
    return step(node, number, job) / "rank-00000.safetensors"


def record(node: Node, number: int = 3, job: str = "job") -> Path:
    return step(node, number, job) / "rank-00000.record"


def commit(node: Node, number: int = 3, job: str = "job") -> Path:
    return step(node, number, job) / "commit"


def layouts(root: Path) -> list[Path]:
    found = list(root.glob("job/layouts/*"))
    assert found
    return found


def from_the_future(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4:6] = (9).to_bytes(2, "little")
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


Damage = Callable[[Node], object]
ON_NVME: dict[str, tuple[Damage, int | None, str]] = {
    "shard truncated": (lambda n: truncate(shard(n)), 2, "bytes"),
    "shard truncated to nothing": (lambda n: os.truncate(shard(n), 0), 2, "bytes"),
    "shard longer": (lambda n: os.truncate(shard(n), shard(n).stat().st_size + PAGE), 2, "bytes"),
    "shard page zero": (lambda n: zero_page(shard(n)), 2, "digest"),
    "shard bit": (lambda n: flip(shard(n)), 2, "digest"),
    "shard last byte": (lambda n: flip(shard(n), shard(n).stat().st_size - 1), 2, "digest"),
    "shard header bit": (lambda n: flip(shard(n), 20), 2, "digest"),
    "shards of two steps swapped": (lambda n: swap(shard(n), shard(n, 2)), 1, "digest"),
    "shards of two jobs swapped": (lambda n: swap(shard(n), shard(n, 3, "other")), 2, "digest"),
    "shard missing": (lambda n: shard(n).unlink(), 2, "cannot be read"),
    "shard a link": (lambda n: replace_by_link(shard(n)), 2, ""),
    "shard a directory": (lambda n: (shard(n).unlink(), shard(n).mkdir()), 2, ""),
    "shard a pipe": (lambda n: (shard(n).unlink(), os.mkfifo(shard(n))), 2, ""),
    "record repairable": (lambda n: flip(record(n), count=3), 3, ""),
    "record rotten": (lambda n: flip(record(n), 10, 900), 2, "record"),
    "record truncated": (lambda n: truncate(record(n), 40), 2, "record"),
    "record empty": (lambda n: os.truncate(record(n), 0), 2, "record"),
    "record missing": (lambda n: record(n).unlink(), 2, "record"),
    "record a pipe": (lambda n: (record(n).unlink(), os.mkfifo(record(n))), 2, "record"),
    "records of two steps swapped": (lambda n: swap(record(n), record(n, 2)), 1, "step 2"),
    "records of two jobs swapped": (lambda n: swap(record(n), record(n, 3, "other")), 2, "other"),
    "record from the future": (lambda n: from_the_future(record(n)), 3, ""),
    "record a commit": (lambda n: shutil.copy(commit(n), record(n)), 2, "commit"),
    "shard and record swapped": (
        lambda n: (swap(record(n), record(n, 2)), swap(shard(n), shard(n, 2))),
        1,
        "step 2",
    ),
    "commit repairable": (lambda n: flip(commit(n), count=3), 3, ""),
    "commit rotten": (lambda n: flip(commit(n), 10, 60), 2, "commit"),
    "commit truncated": (lambda n: truncate(commit(n), 20), 2, "commit"),
    "commit empty": (lambda n: os.truncate(commit(n), 0), 2, "commit"),
    "commit a directory": (lambda n: (commit(n).unlink(), commit(n).mkdir()), 2, "commit"),
    "commits of two steps swapped": (lambda n: swap(commit(n), commit(n, 2)), 1, "step 2"),
    "commits of two jobs swapped": (lambda n: swap(commit(n), commit(n, 3, "other")), 2, "other"),
    "step under another number": (lambda n: step(n, 3).rename(step(n, 7)), 2, "step 3"),
    "steps swapped": (lambda n: swap(step(n, 3), step(n, 2)), 1, "step 2"),
    "step gone": (lambda n: shutil.rmtree(step(n, 3)), 2, ""),
    "layout repairable": (lambda n: [flip(p, count=3) for p in layouts(n.nvme)], 3, ""),
    "layout rotten": (lambda n: [flip(p, 8, 200) for p in layouts(n.nvme)], None, "layout"),
    "layout gone": (lambda n: [p.unlink() for p in layouts(n.nvme)], None, "layout"),
    "every commit rotten": (
        lambda n: [flip(commit(n, number), 10, 60) for number in (1, 2, 3)],
        None,
        "commit",
    ),
    "every shard rotten": (
        lambda n: [flip(shard(n, number)) for number in (1, 2, 3)],
        None,
        "digest",
    ),
}


def arena(node: Node) -> Path:
    (found,) = node.memory.glob("job/*.arena")
    return found


def slot_of(node: Node, number: int) -> int:
    """The slot that holds a step: slots are taken in turn, from the first."""
    return (number - 1) % 2


def in_slot(node: Node, number: int) -> int:
    """A place within a step's image in the arena."""
    return slot_of(node, number) * (arena(node).stat().st_size // 2) + 100_000


def slot_record(node: Node, number: int, job: str = "job") -> Path:
    (found,) = node.memory.glob(f"{job}/*-slot-{slot_of(node, number)}.record")
    return found


def move_slot(node: Node, source: int, target: int) -> None:
    """A write that went astray: one step's bytes where another's should be."""
    data, half = arena(node).read_bytes(), arena(node).stat().st_size // 2
    begin = slot_of(node, source) * half
    with arena(node).open("r+b") as file:
        file.seek(slot_of(node, target) * half)
        file.write(data[begin : begin + half])


def flip_in_place(path: Path, at: int) -> None:
    """As a bit flip in memory: the file stays the same."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def membership(node: Node, job: str = "job") -> Path:
    return node.memory / job / "membership"


IN_MEMORY: dict[str, tuple[Damage, int | None, str]] = {
    "nothing": (lambda n: None, 3, ""),
    "newest bit": (lambda n: flip_in_place(arena(n), in_slot(n, 3)), 2, "digest"),
    "older bit": (lambda n: flip_in_place(arena(n), in_slot(n, 2)), 3, "digest"),
    "newest page zero": (lambda n: zero_page(arena(n), in_slot(n, 3)), 2, "digest"),
    "both bits": (
        lambda n: [flip_in_place(arena(n), in_slot(n, number)) for number in (2, 3)],
        None,
        "digest",
    ),
    "slot astray": (lambda n: move_slot(n, 2, 3), 2, "digest"),
    "newest record bit": (lambda n: flip(slot_record(n, 3)), 2, "record"),
    "newest record truncated": (lambda n: truncate(slot_record(n, 3), 30), 2, "record"),
    "newest record gone": (lambda n: slot_record(n, 3).unlink(), 2, ""),
    "newest record of another job": (
        lambda n: shutil.copy(slot_record(n, 3, "other"), slot_record(n, 3)),
        2,
        "other",
    ),
    "records swapped": (lambda n: swap(slot_record(n, 3), slot_record(n, 2)), None, "digest"),
    "record twice": (
        lambda n: shutil.copy(slot_record(n, 3), slot_record(n, 2)),
        None,
        "digest",
    ),
    "every record rotten": (
        lambda n: [flip(slot_record(n, number)) for number in (2, 3)],
        None,
        "record",
    ),
    "arena truncated": (lambda n: truncate(arena(n)), None, "slots"),
    "arena gone": (lambda n: arena(n).unlink(), None, "arena"),
    "layout bit": (lambda n: [flip(p) for p in layouts(n.memory)], None, "layout"),
    "membership bit": (lambda n: flip(membership(n)), 3, "membership"),
    "membership truncated": (lambda n: truncate(membership(n), 10), 3, "membership"),
    "membership gone": (lambda n: membership(n).unlink(), 3, ""),
    "membership of another job": (
        lambda n: shutil.copy(membership(n, "other"), membership(n)),
        3,
        "other",
    ),
    "membership from the future": (lambda n: from_the_future(membership(n)), 3, "format"),
}


def check(node: Node, expected: int | None, reason: str) -> None:
    """Restore after the damage, and train on."""
    agent = node.start_agent()
    trainer = node.trainer()
    if expected is None:
        for _ in range(2):  # the second time must not be a silent start from nothing either
            with pytest.raises(TrainerError) as refusal:
                trainer.do("restore")
            assert refusal.value.kind == "NothingRecoverable", refusal.value
            said = refusal.value.message
        assert "gc" in said, said
        rejected = [said]
    else:
        answer = trainer.do("restore")
        node.assert_restored(answer, step=expected)
        rejected = answer["rejected"]
        assert {line["state"] for line in trainer.run(2)} == {"memory"}
    told = "\n".join([*rejected, agent.text()])
    assert reason in told, told
    assert "Traceback" not in told, told
    assert agent.alive


@pytest.mark.parametrize("case", ON_NVME)
def test_on_nvme(again: Node, case: str) -> None:
    damage, expected, reason = ON_NVME[case]
    again.wipe_memory()
    damage(again)
    check(again, expected, reason)


@pytest.mark.parametrize("case", IN_MEMORY)
def test_in_memory(again: Node, case: str) -> None:
    damage, expected, reason = IN_MEMORY[case]
    shutil.rmtree(again.nvme)
    damage(again)
    check(again, expected, reason)


@pytest.mark.parametrize(
    "case", [case for case, (_, expected, _) in IN_MEMORY.items() if expected != 3]
)
def test_in_memory_with_nvme_behind_it(again: Node, case: str) -> None:
    damage, _, reason = IN_MEMORY[case]
    damage(again)
    check(again, 3, reason)


def test_under_a_running_agent(again: Node) -> None:
    """Bits flip between two checks: the agent's own and the trainer's."""
    again.options["memory"] = {"slots": 3}
    shutil.rmtree(again.nvme)
    again.wipe_memory()
    agent = again.start_agent()
    trainer = again.trainer()
    again.note(trainer.run(3))
    trainer.kill()
    third = arena(again).stat().st_size // 3
    for flipped, expected in ((2, 2), (1, 1)):
        flip_in_place(arena(again), flipped * third + 200_000)
        trainer = again.trainer()
        answer = trainer.do("restore")
        again.assert_restored(answer, step=expected)
        assert any("digest" in line for line in [*answer["rejected"], agent.text()])
        trainer.kill()
    flip_in_place(arena(again), 200_000)
    for _ in range(2):
        trainer = again.trainer()
        with pytest.raises(TrainerError, match="NothingRecoverable"):
            trainer.do("restore")
        trainer.kill()
    assert agent.alive
