"""The demo's story: a run left alone, and the same run killed twice.

Owns when what is killed, and what is measured meanwhile. Promises that the kills follow from the
seed but hit the trainer wherever it happens to be within a step, and that the comparison leaves
nothing out: every loss that either run noted, also of the steps that were lost and done again,
and a digest of all weights and optimizer state.
"""

import itertools
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from everstep.client.demo.diary import Entry, Follower
from everstep.client.demo.processes import Trainer, agent_of, wait_for_end
from everstep.proto.errors import Refused

LEFT_ALONE = "left alone"
KILLED = "killed twice"


class Watcher(Protocol):
    """Whoever is told how far the demo is."""

    def step(self, run: str, step: int) -> None:
        """A run has done so many steps."""

    def say(self, text: str) -> None:
        """Something else has happened."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the demo is to do."""

    steps: int
    seed: int
    interval: int
    """Steps between snapshots."""

    def kills(self) -> list["PlannedKill"]:
        """One of the trainer, later one of trainer and agent."""
        chance = random.Random(self.seed)
        early = chance.randint(self.steps * 25 // 100, self.steps * 45 // 100)
        late = chance.randint(self.steps * 60 // 100, self.steps * 80 // 100)
        return [
            PlannedKill(early, chance.random(), with_agent=False),
            PlannedKill(late, chance.random(), with_agent=True),
        ]


@dataclass(frozen=True, slots=True)
class PlannedKill:
    """A SIGKILL some way into the step that follows `after_step`."""

    after_step: int
    into_step: float
    """As a fraction of a step's duration."""
    with_agent: bool


@dataclass(frozen=True, slots=True)
class Recovery:
    """One kill and the way back; times are seconds."""

    killed: str
    step: int
    """The last step that the killed process had done."""
    restored_step: int
    level: str
    start_s: float
    """From the kill until a new trainer had imported torch and built its model."""
    connect_s: float
    """Until an agent had answered; it may have to be started, and to look at what it finds."""
    restore_s: float
    """Until the state was loaded, its digests verified."""
    first_step_s: float
    """Until one step was done."""

    @property
    def lost_steps(self) -> int:
        """Steps that had to be done again."""
        return self.step - self.restored_step

    @property
    def total_s(self) -> float:
        """From the kill to the first new step."""
        return self.start_s + self.connect_s + self.restore_s + self.first_step_s


@dataclass(slots=True)
class Run:
    """What one of the two runs came to."""

    entries: list[Entry] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Entry]:
        """The entries of a kind, in order."""
        return [entry for entry in self.entries if entry.kind == kind]

    def losses(self) -> list[tuple[int, float]]:
        """Step and loss in the order of doing, with steps that were done twice in it twice."""
        return [(entry.facts["step"], entry.facts["loss"]) for entry in self.of_kind("step")]

    @property
    def digest(self) -> str:
        """Of the weights and optimizer state in the end."""
        return str(self.of_kind("ended")[-1].facts["digest"])

    @property
    def step_s(self) -> float:
        """The median duration of a step, with whatever a snapshot added to it."""
        steps = self.of_kind("step")
        return statistics.median(
            late.at_s - early.at_s
            for early, late in itertools.pairwise(steps)
            if late.facts["step"] == early.facts["step"] + 1
        )


def first_difference(reference: Run, other: Run, steps: int) -> int | None:
    """The first step whose losses differ, or which one of the runs has not done."""
    expected = dict(reference.losses())
    done = other.losses()
    wrong = [step for step, loss in done if expected.get(step) != loss]
    wrong += set(range(1, steps + 1)) - ({step for step, _ in done} & set(expected))
    return min(wrong, default=None)


@dataclass(slots=True)
class Outcome:
    """All that the demo has to show."""

    plan: Plan
    reference: Run
    killed: Run
    recoveries: list[Recovery]
    duration_s: float

    @property
    def first_difference(self) -> int | None:
        """The first step whose losses differ, or which one of the runs has not done."""
        return first_difference(self.reference, self.killed, self.plan.steps)

    @property
    def losses_equal(self) -> bool:
        """Whether every loss is the same, bit for bit."""
        return self.first_difference is None

    @property
    def weights_equal(self) -> bool:
        """Whether the weights and the optimizer's state are, in the end."""
        return self.reference.digest == self.killed.digest

    @property
    def equal(self) -> bool:
        """Whether everything is."""
        return self.losses_equal and self.weights_equal

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return int(self.killed.of_kind("built")[0].facts["parameters"])

    @property
    def stalls_s(self) -> list[float]:
        """What each snapshot kept training waiting for."""
        return [entry.facts["stall_s"] for entry in self.killed.of_kind("stall")]


def play(plan: Plan, home: Path, watcher: Watcher) -> Outcome:
    """Run the whole story.

    Args:
        plan: What to do.
        home: The demo's own EVERSTEP_HOME; diaries and logs are kept there too.
        watcher: Told how far it is.

    Raises:
        EverstepError: If a trainer fails or is silent for too long.
    """
    begun = time.monotonic()
    reference = _left_alone(plan, home, watcher)
    killed, recoveries = _killed(plan, home, watcher)
    return Outcome(plan, reference, killed, recoveries, time.monotonic() - begun)


def _options(plan: Plan, home: Path, name: str, interval: int) -> dict[str, object]:
    return {
        "directory": home,
        "name": name,
        "steps": plan.steps,
        "seed": plan.seed,
        "interval": interval,
    }


def _left_alone(plan: Plan, home: Path, watcher: Watcher) -> Run:
    watcher.say("A run that is left alone, without Everstep.")
    follower = Follower(home / "reference.jsonl")
    trainer = Trainer(home, _options(plan, home, "reference", 0), follower)
    try:
        for entry in trainer.entries():
            if entry.kind == "step":
                watcher.step(LEFT_ALONE, entry.facts["step"])
    finally:
        trainer.kill()
        trainer.wait()
    return Run(follower.entries)


def _killed(plan: Plan, home: Path, watcher: Watcher) -> tuple[Run, list[Recovery]]:
    watcher.say(f"The same run with a snapshot every {plan.interval} steps, killed twice.")
    follower = Follower(home / "killed.jsonl")
    options = _options(plan, home, "killed", plan.interval)
    run = Run(follower.entries)
    deaths: list[_Death] = []
    for kill in [*plan.kills(), None]:
        trainer = Trainer(home, options, follower)
        try:
            _follow(trainer, kill, run, watcher)
            if kill is not None:
                deaths.append(_carry_out(kill, trainer, run, home))
                watcher.say(f"kill -9 {deaths[-1].whom} after step {deaths[-1].step}.")
        finally:
            trainer.kill()
            trainer.wait()
    return run, [_recovery(death, run) for death in deaths]


def _follow(trainer: Trainer, kill: PlannedKill | None, run: Run, watcher: Watcher) -> None:
    """Watch a trainer until it is to be killed, or to its end."""
    for entry in trainer.entries():
        if entry.kind == "restored" and entry.facts["step"] is not None:
            watcher.say(f"Restored step {entry.facts['step']}.")
        if entry.kind != "step":
            continue
        watcher.step(KILLED, entry.facts["step"])
        if kill is not None and entry.facts["step"] >= kill.after_step:
            time.sleep(kill.into_step * run.step_s)
            return


@dataclass(frozen=True, slots=True)
class _Death:
    whom: str
    at_s: float
    step: int
    entries: int
    """How many entries there were until then."""


def _carry_out(kill: PlannedKill, trainer: Trainer, run: Run, home: Path) -> _Death:
    agent = agent_of(home) if kill.with_agent else None
    at_s = time.monotonic()
    trainer.kill()
    if agent is not None:
        agent.kill()
        wait_for_end(agent)
    if not trainer.wait():
        raise Refused("the trainer had ended before it was killed. Give the demo more --steps.")
    whom = "trainer and agent" if agent is not None else "trainer"
    return _Death(whom, at_s, run.losses()[-1][0], len(run.entries))


def _recovery(death: _Death, run: Run) -> Recovery:
    after = Run(run.entries[death.entries :])
    moments_s = [death.at_s]
    moments_s += [after.of_kind(k)[0].at_s for k in ("built", "connected", "restored", "step")]
    restored = after.of_kind("restored")[0].facts
    durations_s = [late - early for early, late in itertools.pairwise(moments_s)]
    level = ", ".join(restored["levels"]) or "none"
    return Recovery(death.whom, death.step, restored["step"] or 0, level, *durations_s)
