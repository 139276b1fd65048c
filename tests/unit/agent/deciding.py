"""A state machine and the trainers that talk to it, for the tests of the agent's decisions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from everstep.agent import actions, events
from everstep.agent.actions import Place
from everstep.agent.job import Job, Stage
from everstep.agent.state import Rules, State
from everstep.proto.ids import SnapshotId
from everstep.snapshot.samples import GROUP_OF_ALL, Group, encode
from everstep.storage.retention import Rule, expired

JOB = "job"


def samples_of(leaves: bytes, plan: bytes = b"planplan", group_id: int = GROUP_OF_ALL) -> bytes:
    """What a shard says of its replicated leaves."""
    return encode([Group(group_id, plan, leaves)])


AGREED = samples_of(b"1" * 8 + b"2" * 8)
QUIET = Rules(nvme_interval_steps=None, flush_on_exit=False)
A = TypeVar("A")


class Node:
    """A state machine, and the trainers that talk to it: every rank has a current process."""

    def __init__(self, rules: Rules = QUIET, *, world: int = 2, keep: int = 2) -> None:
        self.world = world
        rule = Rule(keep, None)
        self.state = State(rules, lambda known: expired(known, rule, set()))
        self.now_s = 100.0
        self.done: list[actions.Action] = []
        self.callers: dict[int, events.Caller] = {}

    @property
    def job(self) -> Job:
        return self.state.jobs[JOB]

    def handle(self, event: events.Event) -> Any:
        """As the pipeline does, with a tmpfs that always has room."""
        outcome = self.state.handle(event, self.now_s)
        self.done.extend(outcome.actions)
        for action in outcome.actions:
            if isinstance(action, actions.PublishRecord):
                self.handle(events.Recorded(action.job, action.snapshot, action.rank))
        return outcome.reply

    def took(self, kind: type[A]) -> list[A]:
        """The actions of one kind since the last time, which are forgotten then."""
        found: list[A] = [action for action in self.done if isinstance(action, kind)]
        self.done = [action for action in self.done if not isinstance(action, kind)]
        return found

    def attach(
        self,
        rank: int,
        process: str = "first",
        *,
        incarnation: int = 0,
        world: int | None = None,
        launch: str = "",
        holder_alive: bool = False,
        in_flight: events.InFlight | tuple[events.InFlight, ...] | None = None,
        interval: int | None = None,
    ) -> int:
        caller = events.Caller(JOB, rank, world or self.world, f"{process}-{rank}", incarnation)
        copies = (in_flight,) if isinstance(in_flight, events.InFlight) else in_flight or ()
        answer: int = self.handle(
            events.Attach(
                caller=caller,
                launch_id=launch,
                pid=7,
                pid_started_s=1.0,
                holder_alive=holder_alive,
                nvme_interval_steps=interval,
                in_flight=copies,
            )
        )
        self.callers[rank] = replace(caller, incarnation=answer)
        return answer

    def launch(self, process: str = "first", *, slots: int = 2) -> "Node":
        """All ranks attach, and have an arena."""
        for rank in range(self.world):
            self.attach(rank, process)
            if rank not in self.job.arenas:
                self.reserve(rank, slots=slots)
        self.done.clear()
        return self

    def reserve(self, rank: int, generation: int = 1, *, slots: int = 2, size: int = 10) -> None:
        self.handle(events.ArenaReserved(JOB, rank, generation, size, slots))

    def offer(self, rank: int, step: int, captures: int = 1, *, copies: Sequence[int] = ()) -> Any:
        """A rank asks for a step, while it still copies others."""
        named = tuple(
            events.InFlight(older, self.job.snapshots[self.id(older)].granted[rank])
            for older in copies
        )
        caller = self.callers[rank]
        return self.handle(events.Offer(caller, step, captures_in_flight=captures, in_flight=named))

    def seal(
        self,
        rank: int,
        step: int,
        place: Place | None = None,
        *,
        samples: bytes = AGREED,
        size: int = 10,
    ) -> str | None:
        if place is None:
            place = self.job.snapshots[self.id(step)].granted[rank]
        answer: str | None = self.handle(
            events.Seal(
                caller=self.callers[rank],
                step=step,
                place=place,
                layout_id="layout",
                image_bytes=size,
                replica_samples=samples,
                captured_unix_s=5.0,
                envelope=b"%d/%d" % (rank, step),
            )
        )
        return answer

    def commit(self, step: int) -> SnapshotId:
        """All ranks capture a step."""
        for rank in range(self.world):
            assert isinstance(self.offer(rank, step), Place)
        for rank in range(self.world):
            assert self.seal(rank, step) is None
        return self.id(step)

    def id(self, step: int) -> SnapshotId:
        return SnapshotId(self.job.incarnation, step)

    def stage(self, step: int) -> Stage:
        return self.job.snapshots[self.id(step)].stage

    def committed(self) -> list[int]:
        stages = self.job.snapshots.values()
        return sorted(s.id.step for s in stages if s.stage is Stage.COMMITTED)

    def lose(self, rank: int) -> None:
        self.handle(events.SessionLost(JOB, rank, self.callers[rank].process_id))


def flushed(node: Node, steps: range, end_each: bool = True) -> list[int]:
    found = []
    for step in steps:
        node.commit(step)
        for action in node.took(actions.Flush):
            found.append(action.snapshot.step)
            if end_each:
                node.handle(events.FlushEnded(JOB, action.snapshot))
    return found


def shard(
    incarnation: int,
    step: int,
    rank: int,
    world: int = 2,
    *,
    slot: int = 0,
    samples: bytes = AGREED,
    generation: int = 1,
) -> events.AdoptedShard:
    return events.AdoptedShard(
        snapshot=SnapshotId(incarnation, step),
        rank=rank,
        world=world,
        place=Place(generation, slot),
        layout_id="layout",
        image_bytes=10,
        replica_samples=samples,
        captured_unix_s=5.0,
        envelope=b"%d/%d" % (rank, step),
    )


def adoption(
    *,
    incarnation: int = 1,
    world: int = 2,
    members: Sequence[int] = (),
    shards: Sequence[events.AdoptedShard] = (),
    durable: Sequence[tuple[SnapshotId, int]] = (),
    restored: SnapshotId | None = None,
    slots: int = 2,
) -> events.Adopt:
    return events.Adopt(
        job=JOB,
        incarnation=incarnation,
        world=world,
        launch_id="",
        members=[events.AdoptedMember(rank, f"first-{rank}", 7, 1.0) for rank in members],
        arenas=[events.ArenaReserved(JOB, rank, 1, 10, slots) for rank in range(world)],
        shards=shards,
        durable=durable,
        restored=restored,
        restore_decided=restored is not None,
    )
