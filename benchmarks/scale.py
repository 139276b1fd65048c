"""What a commit costs the coordinator, by the number of nodes.

Simulated agents, no network: each node's own decisions are `State`, the coordinator is a whole
`Node`, and only its calls are timed. Every node reports whenever something has changed on it, as
agents do; a commit ends when its parity round, in which all nodes take part, is over everywhere.
"""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from everstep.agent import actions, events
from everstep.agent.holdings import JobFact, Report, job_fact
from everstep.agent.members import MemberRules, Members
from everstep.agent.node import Node, SendOrders, Step
from everstep.agent.protection import ProtectionRules
from everstep.agent.state import Rules, State
from everstep.agent.view import Entry, View
from everstep.proto.ids import UNIT_BYTES

from .report import Report as Findings

JOB = "scale"
COMMITS = 3
"""Measured, after one that is not."""
SLOTS = 4
CPU_LIMIT_S = 1.0
GROWTH_LIMIT = 1.6
"""How much more CPU a node may cost among 4096 than among 512."""
_HEARTBEAT_S = 1.0

T = TypeVar("T")


@dataclass(slots=True)
class Member:
    """A node that does not coordinate."""

    node_id: str
    state: State
    sequence: int = 0
    term: int = 0
    reported: tuple[int, JobFact] | None = None
    due: bool = False


@dataclass(slots=True)
class Cluster:
    """All nodes, and what has been counted."""

    coordinator: Node
    members: dict[str, Member]
    view: View
    ranks_each: int
    cpu_s: float = 0.0
    messages: int = 0
    now_s: float = 100.0
    queue: list[Member] = field(default_factory=list)
    """Nodes with something to report."""
    encoding: list[tuple[str, str]] = field(default_factory=list)
    """Nodes that encode, and the plan."""

    def timed(self, call: Callable[[], T]) -> T:
        """Something that the coordinator's process does."""
        begun_s = time.process_time()
        result = call()
        self.cpu_s += time.process_time() - begun_s
        return result


def cluster(nodes: int, ranks_each: int) -> Cluster:
    """So many nodes that know each other, and a job on all of them."""
    ids = [f"n{index:05d}" for index in range(nodes)]
    view = View([Entry(node_id, 1, f"boot-{node_id}", address=f"{node_id}:1") for node_id in ids])
    first = MemberRules(node_id=ids[0], boot_id=f"boot-{ids[0]}", address=f"{ids[0]}:1")
    members = Members(first, [(ids[1], f"{ids[1]}:1")])
    members.learned(view, 100.0)
    made = Cluster(
        Node(_state(ids[0], nodes * ranks_each), members, ProtectionRules(retry_s=1e9)),
        {node_id: Member(node_id, _state(node_id, nodes * ranks_each)) for node_id in ids[1:]},
        view,
        ranks_each,
    )
    for index, node_id in enumerate(ids):
        for rank in range(index * ranks_each, (index + 1) * ranks_each):
            _feed(made, node_id, _attach(rank, nodes * ranks_each))
            _feed(made, node_id, events.ArenaReserved(JOB, rank, 1, UNIT_BYTES, SLOTS))
    _settle(made)
    return made


def _state(node_id: str, world: int) -> State:
    rules = Rules(clustered=True, node_id=node_id, nvme=False, max_ranks=world)
    return State(rules, lambda snapshots: [])


def _caller(rank: int, world: int) -> events.Caller:
    return events.Caller(JOB, rank, world, f"p{rank}", 1)


def _attach(rank: int, world: int) -> events.Attach:
    return events.Attach(_caller(rank, world), "launch", rank + 1, 0.0, False, decided=1)


def _feed(made: Cluster, node_id: str, event: events.Event) -> object:
    """Something happens on a node."""
    member = made.members.get(node_id)
    if member is None:
        step = made.timed(lambda: made.coordinator.handle(event, made.now_s))
        _follow(made, step)
        return step.reply
    outcome = member.state.handle(event, made.now_s)
    _perform(made, node_id, outcome.actions)
    _call(made, member)
    return outcome.reply


def _perform(made: Cluster, node_id: str, wanted: list[actions.Action]) -> None:
    for action in wanted:
        if isinstance(action, actions.PublishRecord):
            _feed(made, node_id, events.Recorded(JOB, action.snapshot, action.rank))
        elif isinstance(action, actions.Encode):
            made.encoding.append((node_id, action.plan.plan_id))


def _call(made: Cluster, member: Member) -> None:
    """The node will report."""
    if not member.due:
        member.due = True
        made.queue.append(member)


def _report_all(made: Cluster, members: list[Member]) -> None:
    """Reports arrive together: timed as one, because to look at the clock costs as much as one."""
    due = []
    for member in members:
        fact = job_fact(member.state.jobs[JOB])
        if (member.term, fact) != member.reported:
            member.reported = (member.term, fact)
            member.sequence += 1
            report = Report(member.sequence, member.term, (fact,))
            due.append((member, f"boot-{member.node_id}", report))
    node = made.coordinator
    answers = made.timed(
        lambda: [
            node.reported(member.node_id, boot_id, node.members.view, report, made.now_s)
            for member, boot_id, report in due
        ]
    )
    made.messages += 2 * len(due)
    for (member, _, _), (orders, step) in zip(due, answers, strict=True):
        _obey(made, member, orders.term, orders.orders)
        _follow(made, step)


def _obey(made: Cluster, member: Member, term: int, orders: tuple[events.Event, ...]) -> None:
    member.term = term
    for order in orders:
        _perform(made, member.node_id, member.state.handle(order, made.now_s).actions)
    if orders:
        _call(made, member)


def _follow(made: Cluster, step: Step) -> None:
    """Do what the coordinator asks for, here and elsewhere."""
    for send in step.sends:
        if isinstance(send, SendOrders):
            made.messages += 1
            member = made.members[send.node_id]
            _obey(made, member, send.orders.term, send.orders.orders)
    _perform(made, made.coordinator.node_id, step.actions)


def _settle(made: Cluster) -> None:
    """Until nobody has anything to say any more."""
    while True:
        while made.queue or made.encoding:
            due, made.queue = made.queue, []
            for member in due:
                member.due = False
            _report_all(made, due)
            if not made.queue:
                done, made.encoding = made.encoding, []
                for node_id, plan_id in done:
                    _feed(made, node_id, events.Encoded(JOB, plan_id))
        made.now_s += _HEARTBEAT_S / 4
        _follow(made, made.timed(lambda: made.coordinator.tick(made.now_s)))
        if not made.queue:
            return


def commit(made: Cluster, step: int) -> None:
    """All ranks take a snapshot, and it is committed and protected."""
    world = made.ranks_each * (len(made.members) + 1)
    for index, node_id in enumerate([made.coordinator.node_id, *made.members]):
        for rank in range(index * made.ranks_each, (index + 1) * made.ranks_each):
            caller = _caller(rank, world)
            place = _feed(made, node_id, events.Offer(caller, step))
            assert isinstance(place, actions.Place), place
            digest = step.to_bytes(8, "big") + rank.to_bytes(8, "big")
            seal = events.Seal(caller, step, place, "layout", UNIT_BYTES, b"", 0.0, digest, digest)
            _feed(made, node_id, seal)
    _settle(made)
    for state in [made.coordinator.state, *(member.state for member in made.members.values())]:
        protected = state.jobs[JOB].protected()
        assert protected is not None
        assert protected.step == step


def measure(findings: Findings, nodes: int, ranks_each: int) -> tuple[float, float]:
    """CPU seconds and messages of a commit."""
    made = cluster(nodes, ranks_each)
    commit(made, 1)
    gc.collect()
    gc.freeze()  # all these nodes are not in the coordinator's process
    made.cpu_s, made.messages = 0.0, 0
    for step in range(2, 2 + COMMITS):
        commit(made, step)
    cpu_s, messages = made.cpu_s / COMMITS, made.messages / COMMITS
    name = f"{nodes} nodes, {ranks_each} rank{'s' * (ranks_each > 1)} each"
    text = f"{cpu_s * 1e3:9.1f} ms CPU   {messages:9.0f} messages   {messages / nodes:5.2f} a node"
    findings.add(name, cpu_s, text, f"cpu_{nodes}x{ranks_each}_s")
    gc.unfreeze()
    findings.figures[f"messages_{nodes}x{ranks_each}"] = messages
    return cpu_s, messages


def main() -> None:
    """All sizes."""
    findings = Findings("scale: the coordinator's part of a commit with parity")
    measure(findings, 64, 1)
    few = measure(findings, 512, 1)
    many = measure(findings, 4096, 1)
    measure(findings, 512, 8)
    findings.target("CPU seconds a commit, 4096 nodes", many[0], CPU_LIMIT_S)
    findings.target("CPU a node, 4096 / 512 nodes", many[0] / few[0] / 8, GROWTH_LIMIT)
    findings.target("messages a node, 4096 / 512 nodes", many[1] / few[1] / 8, 1.05)
    findings.print()
    sys.exit(any(not target.met for target in findings.targets))


if __name__ == "__main__":
    main()
