"""SIGKILL at every named point: the old snapshot or the new one, bit for bit, and training goes on.

The points are read from the source, so a new one is killed at without a change here. The life that
passes them all: a job comes back to an older step, repeats steps, and outgrows its arena, with a
flush of every step and retention behind it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from harness import Node, Trainer, TrainerDied, Zygote, failpoints_in_source, until

SEVERAL_NODES = (
    "agent.encode.",
    "agent.gather.",
    "agent.join.",
    "agent.mend.",
    "agent.rebuild.",
    "storage.grow.",
    "storage.manifest.",
    "storage.parity.",
    "storage.unparity.",
    "storage.unused.",
    "storage.withdraw.",
)
"""Passed only where there are other agents: see test_nodes_lost.py, and for storage's own writes
tests/unit/storage/test_storage_crash.py."""
AGENT_POINTS = [
    point
    for point in failpoints_in_source("agent.", "storage.")
    if not point.startswith(SEVERAL_NODES)
]
CLIENT_POINTS = failpoints_in_source("client.")
RARE = [
    point
    for point in AGENT_POINTS
    if point.startswith(
        (
            "agent.declare.",
            "agent.restore.",
            "storage.begin.after_aside",
            "storage.begin.before_aside",
            "storage.begin.before_clear",
            "storage.layout.",
            "storage.membership.",
            "storage.release.",
            "storage.reserve.",
            "storage.supersede.",
        )
    )
]
"""Passed at certain times of a job's life; all others at each step."""
# Points whose second passage is at another such time than the first.
TWICE = ["storage.layout.after_rename@2", "storage.membership.before_rename@2"]
STEADY = [point for point in AGENT_POINTS if point not in RARE]
CHAINS = [STEADY[first::5] for first in range(5)]


@pytest.fixture(scope="module")
def begun(zygotes: dict[str, Zygote]) -> Iterator[Node]:
    """Three steps on NVMe, two of them also in memory, and nobody there any more."""
    node = Node(zygotes)
    node.options["nvme"]["keep_newest"] = 3
    agent = node.start_agent()
    trainer = node.trainer()
    assert trainer.do("restore")["step"] is None
    for line in [node.note(trainer.run(1, "nvme"))[0] for _ in range(3)]:
        assert line["state"] == "nvme"
    trainer.kill()
    agent.kill()
    yield node
    node.close()


def again(node: Node, begun: Node) -> None:
    """Go on from where `begun` left off."""
    node.adopt_files(begun.memory, begun.nvme)
    node.options["nvme"]["interval"] = "1 steps"
    node.digests = {step: set(digests) for step, digests in begun.digests.items()}


class Life:
    """A job's life on a node whose agent dies at some time: what it was told, it must find."""

    def __init__(self, node: Node, trainer: Trainer) -> None:
        self.node = node
        self.trainer = trainer
        self.told: dict[str, tuple[int, int]] = {"memory": (1, 3), "nvme": (1, 3)}
        self.deaths = 0
        self.point = ""
        self.points: list[str] = []

    def do(self, command: str, **options: Any) -> Any:
        """A command that waits for the agent: whoever supervises it starts it again."""
        assert self.node.agent is not None
        self.trainer.begin(command, **options)
        until(lambda: self.trainer.answered or not self.node.agent.alive, command)
        self.revive()
        return self.trainer.end()

    def revive(self) -> None:
        """Start the agent again if it died; it may be armed to die again."""
        agent = self.node.agent
        assert agent is not None
        if agent.alive:
            return
        assert agent.ended() == -9
        self.deaths += 1
        self.node.assert_kept(self.told)
        self.point = self.points.pop(0) if self.points else ""
        agent = self.node.start_agent(f"{self.point}=kill@1" if self.point else "")
        self.node.assert_nothing_left_over()
        if not self.point:
            self.node.assert_all_intact()
            assert "Traceback" not in agent.text(), agent.text()

    def train(self, steps: int) -> None:
        """Steps, each flushed; while the agent is dead, training goes on without it."""
        for _ in range(steps):
            (line,) = self.hear(self.trainer.run(1, "nvme"))
            if line["state"] == "nvme" and self.node.agent.alive:
                continue
            try:
                assert self.node.agent.ended(6) == -9, line
            except TimeoutError:
                # A busy machine let the offer's deadline pass: the step was skipped, and is
                # tried again after the client's pause.
                assert line["skipped"], line
                continue
            for lost in self.hear(self.trainer.run(2)):
                assert lost["skipped"] or lost["dropped"], lost
            self.revive()
            if self.point:
                self.hear(self.trainer.do("until_attached", within_s=1.0))
            else:
                lines = self.hear(self.trainer.do("until_committed", level="nvme"))
                assert lines[-1]["state"] == "nvme"

    def assert_kept(self, **options: Any) -> None:
        """New trainers get, from each level, the step that the last one was told of."""
        warnings = self.trainer.do("warned")
        assert len(warnings) <= 3, warnings
        self.trainer.kill()
        for level, (_, step) in self.told.items():
            trainer = self.node.trainer(**options)
            self.node.assert_restored(trainer.do("restore", levels=[level]), step=step)
            trainer.kill()

    def hear(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for line in self.node.note(lines):
            for level in {"memory": ["memory"], "nvme": ["memory", "nvme"]}.get(line["state"], []):
                self.told[level] = (line["incarnation"], line["step"])
        return lines


@pytest.mark.parametrize("point", [*RARE, *TWICE])
def test_agent_killed(node: Node, begun: Node, point: str) -> None:
    again(node, begun)
    name, _, nth = point.partition("@")
    first = node.start_agent(f"{name}=kill@{nth or 1}")
    # As a flush leaves it that failed before its commit.
    (node.nvme / "job" / "step-000000000004").mkdir()
    life = Life(node, node.start_trainer())
    life.do("connect", address=node.address)
    node.assert_restored(life.do("restore", to=1), step=1)
    life.trainer.do("diverge", seed=2)
    life.train(3)
    life.trainer.do("grow")
    life.train(2)
    assert first.code == -9, f"{point} was never passed: let `Life` do what passes it"
    assert life.deaths == 1
    life.assert_kept(grown=True)


@pytest.mark.parametrize("points", CHAINS, ids=range(len(CHAINS)))
def test_agent_killed_again_and_again(node: Node, begun: Node, points: list[str]) -> None:
    again(node, begun)
    life = Life(node, node.start_trainer())
    life.point, *life.points = points
    node.start_agent(f"{life.point}=kill@1")
    life.do("connect", address=node.address)
    node.assert_restored(life.do("restore"), step=3)
    for deaths, point in enumerate(points, 1):
        for _ in range(3):
            if life.deaths < deaths:
                life.train(1)
        assert life.deaths == deaths, f"{point} is not passed at each step: it belongs to RARE"
    life.train(1)
    life.assert_kept()


def assert_goes_on(node: Node, told: tuple[int, int], **options: Any) -> Trainer:
    """A new trainer finds what the one before it was told, or one step more, and trains on."""
    trainer = node.trainer(**options)
    answer = trainer.do("restore")
    node.assert_restored(answer)
    assert answer["step"] in (told[1], told[1] + 1)
    assert told <= node.committed("memory")[-1]
    node.assert_all_intact()
    for _ in range(2):
        # On a busy machine an offer's deadline may pass, or a slot be read yet; nothing else.
        *skipped, line = node.note(trainer.do("until_committed", level="nvme"))
        assert line["state"] == "nvme", line
        assert all(one["skipped"].startswith(("agent:", "busy:")) for one in skipped), skipped
    return trainer


@pytest.mark.parametrize("point", CLIENT_POINTS)
def test_trainer_killed(node: Node, point: str) -> None:
    node.start_agent()
    trainer = node.trainer()
    last = [node.note(trainer.run(1, "nvme"))[0] for _ in range(3)][-1]
    assert last["state"] == "nvme"
    # What would have come next, to compare with what comes after the restart.
    trainer.do("arm", failpoints=armed(node, point))
    with pytest.raises(TrainerDied):
        live(trainer, "rewind" if point.startswith("client.restore") else "stats")
    assert trainer.dies() == -9
    node.digests.setdefault(4, set())
    node.digests[4] |= {line["digest"] for line in reference(node)}
    assert_goes_on(node, (last["incarnation"], last["step"]))
    assert len(node.arenas()) == 1
    assert node.agent.alive


def live(trainer: Trainer, command: str) -> None:
    """Train without waiting for anything, with a command after each step."""
    for _ in range(5):
        trainer.do("run", level="")
        trainer.do(command)


def armed(node: Node, point: str) -> str:
    """The failpoints that kill a trainer at this one."""
    if point == "client.fence.begun":
        # There is a fence only while something is being copied.
        return f"client.capture.block=hold:{node.base}/block@1;{point}=kill"
    return f"{point}=kill"


def reference(node: Node, steps: int = 4) -> list[dict[str, Any]]:
    """The same training without any snapshot: every step must come out the same."""
    trainer = node.trainer(job="reference")
    lines = trainer.run(steps, "", snapshot=False)
    trainer.kill()
    assert {line["digest"] for line in lines[:3]} <= set().union(*node.digests.values())
    return lines[3:4]


@pytest.mark.parametrize(
    "point",
    [
        "agent.offer.decided",
        "agent.seal.before_record",
        "agent.seal.after_record",
        "storage.publish.before_rename",
        "storage.shard.before_chunk",
        "storage.commit.before_rename",
    ],
)
def test_both_killed(node: Node, begun: Node, point: str) -> None:
    again(node, begun)
    agent = node.start_agent(f"{point}=hold:{node.base}/held@1")
    trainer = node.trainer()
    node.assert_restored(trainer.do("restore"), step=3)
    trainer.begin("run", steps=2, level="nvme")
    until((node.base / "held.reached").exists, point)
    trainer.process.signal(9)
    agent.kill()
    trainer.dies()
    node.start_agent()
    node.assert_nothing_left_over()
    node.digests[4] = {line["digest"] for line in reference(node)}
    assert_goes_on(node, (1, 3))


def test_torn_write(node: Node, begun: Node, shim: Any) -> None:
    """Half a chunk reaches the disk, then the agent is gone, with all memory: power loss."""
    again(node, begun)
    agent = node.start_agent(preload=shim.library, environ=shim.environ)
    shim.fail("pwrite", 0, 1, "rank-00000.safetensors")
    trainer = node.trainer()
    node.assert_restored(trainer.do("restore"), step=3)
    (line,) = trainer.run(1, "nvme")
    assert line["state"] == "memory", line
    assert agent.ended() == -9
    assert all(line["skipped"] for line in trainer.run(2))
    trainer.kill()
    (torn,) = node.nvme.glob("job/step-000000000004/.rank-00000*.partial")
    assert torn.stat().st_size > 0
    node.wipe_memory()
    node.start_agent()
    node.assert_nothing_left_over()
    trainer = node.trainer()
    node.assert_restored(trainer.do("restore"), step=3)
    assert node.note(trainer.run(1, "nvme"))[0]["state"] == "nvme"


def test_killed_while_a_job_was_removed(node: Node, begun: Node) -> None:
    """Its directories had their hidden names already: the memory comes back all the same."""
    again(node, begun)
    for root in (node.memory, node.nvme):
        (root / "job").rename(root / ".removed-job")
    node.start_agent()
    node.assert_nothing_left_over()
    assert not node.arenas() and not list(node.nvme.glob("[!.]*"))
    assert node.trainer().do("restore")["step"] is None
