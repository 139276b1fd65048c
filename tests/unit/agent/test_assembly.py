"""Which process belongs to which incarnation, over several nodes: the coordinator's rule.

The rule is the one of `agent.state`, which a seeded run of both compares it with.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from everstep.agent import events
from everstep.agent.assembly import Assembly, RankHeld
from everstep.agent.coordination import Coordination
from everstep.agent.holdings import JobFact, MemberFact, Report, ShardFact, SnapshotFact, job_fact
from everstep.agent.protection import ProtectionRules
from everstep.agent.state import Rules, State
from everstep.proto.errors import RankClaimed, Refused, StaleIncarnation
from everstep.proto.ids import SnapshotId

JOB = "gpt"
ALL = frozenset({"n1", "n2", "n3"})
LEAVES = ("a", "b", "c")


class World:
    """A coordinator and what its nodes have reported, at most one rank of a world of 3 on each."""

    def __init__(self) -> None:
        self.coordination = Coordination(ProtectionRules())
        self.coordination.take_over(1)
        self.assembly = Assembly(self.coordination)
        self.given: dict[str, int] = {}
        """The incarnation that each process was given."""

    def join(
        self,
        node_id: str,
        process: str,
        *,
        rank: int | None = None,
        incarnation: int = 0,
        world: int = 3,
        launch: str = "",
        live: frozenset[str] = ALL,
        joins: bool = False,
        silent: frozenset[str] = frozenset(),
    ) -> int:
        rank = int(node_id[1:]) - 1 if rank is None else rank
        caller = events.Caller(JOB, rank, world, process, incarnation)
        given = self.assembly.join(node_id, caller, launch, live, joins_live=joins, silent=silent)
        self.given[process] = given
        return given

    def joined(self, process: str, rank: int) -> bool:
        caller = events.Caller(JOB, rank, 3, process, self.given[process])
        return self.assembly.has_joined(caller)

    def report(
        self,
        node_id: str,
        incarnation: int,
        members: Sequence[tuple[str, bool]],
        *,
        steps: Sequence[int] = (),
    ) -> None:
        """What a node says: processes of its rank, and the steps that all ranks have committed."""
        rank = int(node_id[1:]) - 1
        shard = ShardFact(rank, "layout", 10, b"%d" % rank, b"")
        fact = JobFact(
            JOB,
            incarnation,
            3,
            newest_incarnation=incarnation,
            members=tuple(MemberFact(rank, process, attached) for process, attached in members),
            snapshots=tuple(
                SnapshotFact(SnapshotId(incarnation, step), 3, "committed", (shard,))
                for step in steps
            ),
        )
        self.say(node_id, fact)

    def say(self, node_id: str, *facts: JobFact) -> None:
        sequence = self.coordination.reported.get(node_id, 0) + 1
        self.coordination.report(node_id, Report(sequence, 1, facts))

    def running(self, *, steps: Sequence[int] = ()) -> "World":
        """Incarnation 1, all ranks attached."""
        for _ in range(3):
            for node_id in sorted(ALL):
                self.say(node_id)
        for node_id in sorted(ALL):
            assert self.join(node_id, f"first-{node_id}") == 1
        for node_id in sorted(ALL):
            self.report(node_id, 1, [(f"first-{node_id}", True)], steps=steps)
        return self


def test_the_ranks_of_one_launch_share_an_incarnation_wherever_they_are() -> None:
    world = World()
    assert [world.join(node_id, f"p-{node_id}", launch="a") for node_id in sorted(ALL)] == [1] * 3
    assert world.assembly.launch_id(JOB) == "a"


def test_a_new_process_of_a_rank_begins_an_incarnation_for_all() -> None:
    world = World().running()
    world.report("n3", 1, [("first-n3", False)])
    assert world.join("n3", "second") == 2
    assert world.join("n1", "second-n1", live=frozenset({"n2", "n3"})) == 2
    with pytest.raises(StaleIncarnation):
        world.join("n2", "first-n2", incarnation=1)


@pytest.mark.parametrize("attached", [False, True])
def test_the_first_of_the_next_launch_may_be_of_a_rank_that_nobody_remembers(
    attached: bool,
) -> None:
    """Its node was lost with its memory; the others' processes are gone, or are dying."""
    world = World().running(steps=(5,))
    world.coordination.forget("n1")
    world.say("n1")
    for node_id in ("n2", "n3"):
        world.report(node_id, 1, [(f"first-{node_id}", attached)], steps=(5,))
    world.coordination.take_over(2)
    for node_id in ("n2", "n3"):
        world.report(node_id, 1, [(f"first-{node_id}", attached)], steps=(5,))
    assert world.join("n1", "second-n1") == 2
    for node_id in ("n2", "n3"):
        world.report(node_id, 1, [(f"first-{node_id}", False)], steps=(5,))
        assert world.join(node_id, f"second-{node_id}") == 2
    assert world.join("n1", "second-n1", incarnation=2) == 2, "nobody has ended it"


def test_a_number_that_any_live_node_remembers_is_not_used_again() -> None:
    world = World()
    world.say("n2", JobFact(JOB, 4, 3, newest_incarnation=9))
    assert world.join("n1", "p") == 10


def test_a_rank_is_held_while_its_process_is_attached_on_a_live_node() -> None:
    world = World().running()
    for joins in (False, True):
        with pytest.raises(RankHeld, match="held by a process on n3") as caught:
            world.join("n3", "second", joins=joins)
        assert (caught.value.rank, caught.value.node_id) == (2, "n3")
    assert world.join("n1", "first-n1", incarnation=1) == 1, "nothing was changed"


def test_a_silent_node_holds_no_rank_of_the_next_incarnation() -> None:
    world = World().running()
    live = ALL - {"n3"}
    assert world.join("n2", "second", rank=2, live=live, silent=frozenset({"n3"})) == 2


def test_a_process_that_comes_again_keeps_its_rank() -> None:
    world = World().running()
    # The answer to a first attach may have been lost: it comes again without an incarnation.
    assert world.join("n2", "first-n2") == 1
    assert world.join("n2", "first-n2", incarnation=1) == 1
    assert not world.joined("first-n2", 1)


def test_a_report_from_before_a_decision_does_not_undo_it() -> None:
    world = World().running()
    world.report("n3", 1, [("first-n3", False)])
    assert world.join("n3", "second", joins=True) == 1
    world.report("n3", 1, [("first-n3", False)])
    with pytest.raises(RankHeld):
        world.join("n3", "third", joins=True)
    with pytest.raises(StaleIncarnation):
        world.join("n3", "first-n3", incarnation=1)


def test_a_node_that_remembers_nothing_holds_no_rank() -> None:
    world = World().running()
    world.coordination.forget("n3")
    with pytest.raises(RankHeld):
        world.join("n3", "second", joins=True)  # it has not reported: it may remember
    world.say("n3")
    assert world.join("n3", "second", joins=True) == 1


def test_a_job_that_nobody_remembers_holds_no_rank() -> None:
    world = World().running()
    for node_id in sorted(ALL):
        world.coordination.forget(node_id)
        world.say(node_id)
    assert world.join("n3", "second") == 2


def test_the_next_term_knows_what_the_nodes_report() -> None:
    world = World().running()
    world.coordination.take_over(2)
    world.report("n1", 1, [("first-n1", True)])
    world.report("n3", 1, [("first-n3", False)])
    assert world.join("n3", "second", joins=True) == 1
    assert world.joined("second", 2)
    with pytest.raises(RankHeld):
        world.join("n1", "second-n1")


@dataclass(frozen=True)
class Case:
    """A live join of rank 2, and what becomes of it."""

    name: str
    holder: str = "gone"
    """The last process: ``attached``, ``gone``, or ``never`` there as far as is known."""
    others: str = "attached"
    silent: bool = False
    """Whether n3, where it ran, does not answer; the new process is on n2 then."""
    world: int = 3
    committed: bool = True
    launch: str = ""
    incarnation: int = 1
    joined: bool = True
    error: type[Exception] | None = None


CASES = (
    Case("its process is gone"),
    Case("whatever the launcher calls it", launch="another"),
    Case("before anything was committed", committed=False),
    Case("nobody knows who it was", holder="never"),
    Case("it is the first of its rank", holder="never", committed=False, joined=False),
    Case("nobody is there to be joined", others="gone", incarnation=2, joined=False),
    Case("another size", world=4, error=Refused),
    Case("another size, nobody there", others="gone", world=4, incarnation=2, joined=False),
    Case("its process lives", holder="attached", error=RankHeld),
    Case("it may live on a silent node", holder="attached", silent=True, error=RankHeld),
    Case("anybody may live on a silent node", holder="never", silent=True, error=RankHeld),
    Case("it was gone before its node was", silent=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_live_join(case: Case) -> None:
    world = World()
    steps = (5,) if case.committed else ()
    for node_id in ("n1", "n2", *(("n3",) if case.holder != "never" else ())):
        world.join(node_id, f"first-{node_id}")
    for node_id in ("n1", "n2"):
        world.report(node_id, 1, [(f"first-{node_id}", case.others == "attached")], steps=steps)
    members = [] if case.holder == "never" else [("first-n3", case.holder == "attached")]
    world.report("n3", 1, members, steps=steps)
    silent = frozenset({"n3"}) if case.silent else frozenset()

    def join() -> int:
        return world.join(
            "n2" if case.silent else "n3",
            "second",
            rank=2,
            world=case.world,
            launch=case.launch,
            live=ALL - silent,
            joins=True,
            silent=silent,
        )

    if case.error is not None:
        with pytest.raises(case.error):
            join()
        assert world.join("n1", "first-n1", incarnation=1) == 1, "the others go on"
        return
    assert join() == case.incarnation
    assert world.joined("second", 2) == case.joined


def declare(world: World, rank: int, process: str, number: int, digests: str) -> object:
    caller = events.Caller(JOB, rank, 3, process, world.given[process])
    return world.assembly.declare(declaration(caller, number, digests))


def declaration(
    caller: events.Caller, number: int, digests: str, *participants: int
) -> events.Declare:
    return events.Declare(
        caller, number, LEAVES, tuple(d.encode() for d in digests), tuple(participants)
    )


def test_replicas_are_agreed_on_once_all_ranks_have_declared() -> None:
    world = World().running()
    assert declare(world, 0, "first-n1", 1, "xyz") is None
    assert declare(world, 1, "first-n2", 1, "xqz") is None
    last = events.Caller(JOB, 2, 3, "first-n3", world.given["first-n3"])
    assert world.assembly.undeclared(declaration(last, 1, "xyz")) == (2,)
    assert world.assembly.undeclared(replace(declaration(last, 1, "xyz"), participants=(0, 2))) == (
        0,
        2,
    )
    assert declare(world, 2, "first-n3", 1, "xyz") == (0, 2)


def test_a_group_agrees_without_the_other_ranks() -> None:
    world = World().running()
    first, _, third = (
        events.Caller(JOB, rank, 3, f"first-n{rank + 1}", world.given[f"first-n{rank + 1}"])
        for rank in range(3)
    )
    assert world.assembly.declare(declaration(first, 1, "xyz", 0, 2)) is None
    assert world.assembly.undeclared(declaration(first, 1, "xyz", 0, 2)) == (2,)
    assert world.assembly.declare(declaration(third, 1, "xyq", 0, 2)) == (0, 1)
    assert world.assembly.agreed(first, (0, 2)) == ("a", "b")
    assert world.assembly.agreed(first) is None


def test_one_that_joins_hears_what_the_others_have_agreed_on() -> None:
    world = World().running()
    asks = events.Caller(JOB, 2, 3, "second", 1)
    assert world.assembly.agreed(asks) is None
    for rank in range(3):
        declare(world, rank, f"first-n{rank + 1}", 1, "xyz" if rank else "xqz")
    world.report("n3", 1, [("first-n3", False)])
    world.join("n3", "second", joins=True)
    assert world.assembly.agreed(asks) == ("a", "c")
    with pytest.raises(StaleIncarnation):
        world.assembly.agreed(replace(asks, incarnation=0))


def test_an_older_round_is_answered_nothing_and_costs_the_newer_one_nothing() -> None:
    world = World().running()
    assert declare(world, 0, "first-n1", 7, "xyz") is None
    assert declare(world, 1, "first-n2", 3, "xyz") is None
    assert declare(world, 1, "first-n2", 7, "xyz") is None
    assert declare(world, 2, "first-n3", 7, "xyz") == (0, 1, 2)


def alone() -> State:
    return State(Rules(nvme_interval_steps=None, flush_on_exit=False), lambda known: [])


class Both:
    """The same processes at an agent that stands alone, and at the coordinator of one node."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.alone = alone()
        self.member = State(replace(alone().rules, clustered=True, node_id="n1"), lambda known: [])
        self.world = World()
        self.processes = 0
        self.known: dict[int, list[events.Caller]] = {rank: [] for rank in range(3)}
        """By rank, processes that were given an incarnation, the last one last."""
        self.launch = "a"

    def act(self) -> tuple[object, object]:
        """Do something; what the two rules say of it."""
        if self.random.random() < 0.1:
            self.launch = self.random.choice("abc")
        if self.random.random() < 0.4:
            self._lose(self.random.randrange(3))
        if self.random.random() < 0.7:
            self._report()
        return self._attach(self.random.randrange(3))

    def _lose(self, rank: int) -> None:
        if self.known[rank]:
            lost = events.SessionLost(JOB, rank, self.known[rank][-1].process_id)
            for state in (self.alone, self.member):
                state.handle(lost, 1.0)
            self._report()  # it matters to the next decision, as the death does to the agent

    def _report(self) -> None:
        job = self.member.jobs.get(JOB)
        self.world.say("n1", *([job_fact(job)] if job is not None else []))

    def _attach(self, rank: int) -> tuple[object, object]:
        joins = self.random.random() < 0.5
        caller = self._caller(rank)
        said = self._alone(caller, joins), self._together(caller, joins)
        if said[0] == said[1] and isinstance(said[0], tuple):
            self.known[rank].append(replace(caller, incarnation=said[0][0]))
        return said

    def _caller(self, rank: int) -> events.Caller:
        kind = self.random.random()
        if self.known[rank] and kind < 0.3:
            return self.random.choice(self.known[rank])  # comes back, maybe too late
        if self.known[rank] and kind < 0.4:
            return replace(self.known[rank][-1], incarnation=0)
        self.processes += 1
        world = 2 if rank < 2 and self.random.random() < 0.05 else 3
        return events.Caller(JOB, rank, world, f"p{self.processes}", 0)

    def _event(self, caller: events.Caller, state: State) -> events.Attach:
        job = state.jobs.get(JOB)
        holder = job.members.get(caller.rank) if job is not None else None
        other = holder is not None and holder.process_id != caller.process_id
        alive = other and holder is not None and holder.attached
        return events.Attach(caller, self.launch, 7, 1.0, holder_alive=alive)

    def _alone(self, caller: events.Caller, joins: bool) -> object:
        event = replace(self._event(caller, self.alone), live=joins)
        try:
            given = self.alone.handle(event, 1.0).reply
        except (RankClaimed, StaleIncarnation, Refused) as error:
            return RankHeld if isinstance(error, RankClaimed) else type(error)
        return given, self._is_new(caller) and caller.rank in self.alone.jobs[JOB].joining

    def _is_new(self, caller: events.Caller) -> bool:
        """Of one that comes again the coordinator may remember more, which changes nothing."""
        return caller.process_id not in {known.process_id for known in self.known[caller.rank]}

    def _together(self, caller: events.Caller, joins: bool) -> object:
        assembly = self.world.assembly
        try:
            given = assembly.join("n1", caller, self.launch, frozenset({"n1"}), joins_live=joins)
        except Refused as error:
            return type(error)
        joined = joins and not caller.incarnation and assembly.has_joined(caller)
        event = replace(self._event(caller, self.member), decided=given, live=joined)
        event = replace(event, launch_id=assembly.launch_id(JOB))
        assert self.member.handle(event, 1.0).reply == given
        return given, self._is_new(caller) and caller.rank in self.member.jobs[JOB].joining


@pytest.mark.parametrize("seed", range(60))
def test_the_rule_is_that_of_an_agent_that_stands_alone(seed: int) -> None:
    both = Both(seed)
    for turn in range(60):
        alone_says, together_say = both.act()
        assert alone_says == together_say, f"seed {seed}, turn {turn}"
