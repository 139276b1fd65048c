"""What the demo's second story is to do, and what it came to: a job that loses some of its nodes.

Owns the plan and the verdict. Promises that the losses follow from the seed, and that the
comparison leaves nothing out: every loss that any rank of either run noted, a digest of each
rank's weights and optimizer state, and how far back the job had to go. What happens is `losing`.
"""

import random
from dataclasses import dataclass

from everstep.client.demo.scenario import Run, first_difference


@dataclass(frozen=True, slots=True)
class Losses:
    """What the demo is to do."""

    nodes: int
    lose: int
    parity: int
    steps: int
    seed: int
    interval: int
    """Steps between snapshots."""
    nvme_interval: int
    """Steps between those that go to disk as well."""

    @property
    def decodable(self) -> bool:
        """Whether what the others hold in memory makes up for the loss."""
        return self.lose <= self.parity

    @property
    def parity_share(self) -> float:
        """Parity beside a snapshot, as a fraction of it."""
        return self.parity / (self.nodes - self.parity)

    def chosen(self) -> "Chosen":
        """Which ranks' nodes are lost, and when."""
        chance = random.Random(self.seed)
        ranks = sorted(chance.sample(range(self.nodes), self.lose))
        after_step = chance.randint(self.steps * 55 // 100, self.steps * 75 // 100)
        return Chosen(ranks, after_step, chance.random())


@dataclass(frozen=True, slots=True)
class Chosen:
    """A loss some way into the step that follows `after_step`."""

    ranks: list[int]
    after_step: int
    into_step: float
    """As a fraction of a step's duration."""


@dataclass(slots=True)
class Held:
    """What the protection costs, as measured; bytes are sums over all nodes."""

    shard_bytes: int = 0
    """One snapshot."""
    parity_bytes: int = 0
    """What the nodes hold beside it, for each other."""
    round_sent_bytes: int = 0
    """What they sent each other to make it."""
    recovery_sent_bytes: int = 0
    """What the others sent to bring back what was lost, the new parity included."""


@dataclass(frozen=True, slots=True)
class Return:
    """The loss and the way back; times are seconds, one after the other."""

    lost: list[str]
    replaced_by: list[str]
    step: int
    """The last step that was done."""
    restored_step: int
    levels: list[str]
    """Of the copies that the trainers read; what was decoded lies in memory by then."""
    decoded_ranks: list[int]
    parity_levels: list[str]
    """Where the parity was that they were decoded with."""
    disk_step: int
    """The newest step that was on the disks of all nodes; 0: none."""
    protected_step: int
    """The newest step that the first rank had heard to be protected."""
    protected_again_s: float | None
    """From the kill until a new step was protected as the first were; None: the run was over."""
    parts: dict[str, float]
    """Each until the last node or rank was done with it."""

    @property
    def lost_steps(self) -> int:
        """Steps that had to be done again."""
        return self.step - self.restored_step

    @property
    def total_s(self) -> float:
        """From the kill to the first new step of all ranks."""
        return sum(self.parts.values())


@dataclass(slots=True)
class Outcome:
    """All that the demo has to show."""

    plan: Losses
    reference: list[Run]
    """Of each rank."""
    survived: list[Run]
    back: Return
    held: Held
    duration_s: float

    @property
    def first_difference(self) -> int | None:
        """The first step at which any rank's losses differ."""
        pairs = zip(self.reference, self.survived, strict=True)
        found = [first_difference(alone, other, self.plan.steps) for alone, other in pairs]
        return min((step for step in found if step is not None), default=None)

    @property
    def losses_equal(self) -> bool:
        """Whether every loss of every rank is the same, bit for bit."""
        return self.first_difference is None

    @property
    def weights_equal(self) -> bool:
        """Whether each rank's weights and optimizer state are, in the end."""
        return [run.digest for run in self.reference] == [run.digest for run in self.survived]

    @property
    def as_promised(self) -> bool:
        """Whether the loss was made up for from where it should have been."""
        back = self.back
        if self.plan.decodable:
            decoded = len(back.decoded_ranks) == self.plan.lose
            return decoded and back.restored_step >= max(1, back.protected_step)
        return back.restored_step == back.disk_step > 0

    @property
    def equal(self) -> bool:
        """Whether everything is."""
        return self.losses_equal and self.weights_equal and self.as_promised

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return int(self.reference[0].of_kind("built")[0].facts["parameters"])
