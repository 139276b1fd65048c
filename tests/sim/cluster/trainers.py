"""The processes of a job: what each knows of itself, and what one launch knows of all.

Owns plain data; what they do is in `training`.
"""

from dataclasses import dataclass, field

from everstep.agent import events
from everstep.agent.actions import Place
from everstep.proto.ids import SnapshotId

from .host import Agent, Host


@dataclass(eq=False, slots=True)
class Copy:
    """A step that is being copied, or whose seal nobody has taken yet."""

    step: int
    place: Place
    copied: bool = False


@dataclass(eq=False, slots=True)
class Trainer:
    """One rank's process."""

    launch: int
    rank: int
    host: Host
    process_id: str
    alive: bool = True
    incarnation: int = 0
    session: Agent | None = None
    """The agent process that it is attached to."""
    copies: list[Copy] = field(default_factory=list)
    """Oldest first."""

    @property
    def agent(self) -> Agent | None:
        """The agent that answers now."""
        agent = self.host.agent
        return agent if agent is not None and self.host.runs and self.session is agent else None

    def in_flight(self) -> tuple[events.InFlight, ...]:
        """As its agent is told of the copies."""
        return tuple(events.InFlight(copy.step, copy.place) for copy in self.copies)


@dataclass(slots=True)
class Launch:
    """One start of all ranks."""

    number: int
    world: int
    trainers: list[Trainer]
    began_s: float
    stage: str = "joining"
    stage_s: float = 0.0
    restored: SnapshotId | None = None
    as_saved: bool = False
    """Whether as many ranks saved what it has restored."""
    digests: dict[int, bytes] = field(default_factory=dict)
    step: int = 0
    untold: list[str] = field(default_factory=list)

    @property
    def launch_id(self) -> str:
        """As the trainers say it."""
        return f"launch-{self.number}"

    @property
    def incarnation(self) -> int:
        """The ranks' if it is one."""
        found = {trainer.incarnation for trainer in self.trainers}
        return found.pop() if len(found) == 1 else 0
