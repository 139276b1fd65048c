"""The demo's second story, as it happens: a job on several nodes, some of which are lost.

Owns when what is killed, wiped and replaced, and what is measured meanwhile. Promises that a loss
hits the ranks wherever they happen to be within a step, and that a lost node's memory is gone
before anything is restored.
"""

import itertools
import time
from pathlib import Path

from everstep.client.demo.diary import Follower
from everstep.client.demo.fleet import Fleet
from everstep.client.demo.losses import Held, Losses, Outcome, Return
from everstep.client.demo.nodes import Cluster, Node, recovery_plan
from everstep.client.demo.rank import JOB
from everstep.client.demo.scenario import LEFT_ALONE, Run, Watcher
from everstep.client.demo.words import listed
from everstep.proto.errors import Refused
from everstep.proto.peer_pb2 import SnapshotPlan

LOST = "nodes lost"
_MIB = 1 << 20
_NOTICE, _REPLACE = "notice_s", "replace_s"
_AFTERWARDS = {
    "start_s": "built",
    "connect_s": "connected",
    "restore_s": "restored",
    "first_step_s": "step",
}
"""Parts of the way back, and what a rank notes at the end of each."""


def play(plan: Losses, home: Path, watcher: Watcher) -> Outcome:
    """Run the whole story.

    Args:
        plan: What to do.
        home: The demo's own directory; nodes, diaries and logs are there.
        watcher: Told how far it is.

    Raises:
        EverstepError: If an agent or a trainer fails or is silent for too long.
    """
    begun = time.monotonic()
    reference = _left_alone(plan, home, watcher)
    with Cluster(home, plan.nodes, plan.parity) as cluster:
        story = _Story(plan, home, watcher, cluster)
        story.protect_and_lose()
        back = story.return_and_end()
    runs = [Run(follower.entries) for follower in story.followers]
    return Outcome(plan, reference, runs, back, story.held, time.monotonic() - begun)


def _options(plan: Losses, home: Path, name: str) -> dict[str, object]:
    return {"directory": home, "name": name, "steps": plan.steps, "seed": plan.seed}


def _left_alone(plan: Losses, home: Path, watcher: Watcher) -> list[Run]:
    watcher.say(f"A run of {plan.nodes} ranks that is left alone, without Everstep.")
    followers = [Follower(home / f"reference-{rank}.jsonl") for rank in range(plan.nodes)]
    environs = [{"EVERSTEP_HOME": str(home)} for _ in followers]
    fleet = Fleet(home, 0, _options(plan, home, "reference"), followers, environs)
    try:
        for rank, entry in fleet.entries():
            if rank == 0 and entry.kind == "step":
                watcher.step(LEFT_ALONE, entry.facts["step"])
    finally:
        fleet.close()
    return [Run(follower.entries) for follower in followers]


class _Story:
    """The run that loses nodes, in the order in which things happen."""

    def __init__(self, plan: Losses, home: Path, watcher: Watcher, cluster: Cluster) -> None:
        self.held = Held()
        self.followers = [Follower(home / f"survived-{n}.jsonl") for n in range(plan.nodes)]
        self._plan = plan
        self._home = home
        self._watcher = watcher
        self._cluster = cluster
        self._chosen = plan.chosen()
        self._lost: list[Node] = []
        self._killed_s = 0.0
        self._disk_step = 0
        self._moments: dict[str, float] = {}
        self._entries_before: list[int] = []
        self._wanted: SnapshotPlan = SnapshotPlan()

    def protect_and_lose(self) -> None:
        """From the first agent to the last moment of the nodes that are lost."""
        plan, say = self._plan, self._watcher.say
        say(f"{plan.nodes} agents start, one a node, and look for each other.")
        self._cluster.start()
        names = ", ".join(node.node_id for node in self._cluster.nodes)
        say(
            f"{names} have met. The same job, one rank a node, a snapshot every {plan.interval} "
            f"steps; any {plan.parity} of the nodes may be lost."
        )
        fleet = self._launch(1)
        try:
            self._train_until_loss(fleet)
            self._lose(fleet)
        finally:
            fleet.close()
        self._entries_before = [len(follower.entries) for follower in self.followers]
        names = listed([node.node_id for node in self._lost])
        what = "memory and disk" if plan.decodable else "memory"
        say(f"kill -9 agent and trainer of {names} after step {self._step()}; their {what} wiped.")

    def _launch(self, number: int) -> Fleet:
        plan = self._plan
        options = {
            **_options(plan, self._home, "survived"),
            "interval": plan.interval,
            "nvme_interval": plan.nvme_interval,
        }
        environs = [
            {"EVERSTEP_HOME": str(node.home), "EVERSTEP_AGENT": node.address}
            for node in self._cluster.nodes
        ]
        return Fleet(self._home, number, options, self.followers, environs)

    def _train_until_loss(self, fleet: Fleet) -> None:
        """Watch until the nodes are to be lost, and there is what should survive it."""
        for rank, entry in fleet.entries():
            if rank:
                continue
            if entry.kind == "step":
                self._watcher.step(LOST, entry.facts["step"])
            if entry.kind == "protected" and not self.held.parity_bytes:
                self._measure(entry.facts["step"])
            due = entry.kind == "step" and entry.facts["step"] >= self._chosen.after_step
            if due and self._protected():
                time.sleep(self._chosen.into_step * Run(self.followers[0].entries).step_s)
                return

    def _protected(self) -> bool:
        protected = Run(self.followers[0].entries).of_kind("protected")
        return bool(protected) and (self._plan.decodable or self._cluster.newest_on_disk() > 0)

    def _measure(self, step: int) -> None:
        """What the first round took, while it is the only one that there was."""
        nodes, held = self._cluster.nodes, self.held
        held.round_sent_bytes = self._cluster.bytes_sent()
        held.shard_bytes = self._cluster.shard_bytes()
        held.parity_bytes = sum(node.parity_bytes(JOB) for node in nodes)
        each = len(nodes) * _MIB
        self._watcher.say(
            f"Step {step} is protected: each node holds {held.shard_bytes / each:.1f} MiB of its "
            f"own and {held.parity_bytes / each:.1f} MiB of parity for the others, "
            f"{held.parity_bytes / held.shard_bytes:.0%} more. Full copies elsewhere would take "
            f"{self._plan.parity:.0%}."
        )

    def _lose(self, fleet: Fleet) -> None:
        plan, ranks = self._plan, self._chosen.ranks
        self._lost = [self._cluster.nodes[rank] for rank in ranks]
        self._disk_step = self._cluster.newest_on_disk()
        self._killed_s = time.monotonic()
        killed = fleet.kill(ranks)
        for node in self._lost:
            node.kill()
            node.wipe(disk=plan.decodable)
        if not killed:
            raise Refused("a trainer had ended before it was killed. Give the demo more --steps.")

    def return_and_end(self) -> Return:
        """From the loss to the end of the run."""
        self._notice()
        self._show_plan()
        self._replace()
        fleet = self._launch(2)
        try:
            self._follow_to_the_end(fleet)
        finally:
            fleet.close()
        return self._returned()

    def _survivors(self) -> list[Node]:
        return [node for node in self._cluster.nodes if node not in self._lost]

    def _notice(self) -> None:
        lost = {node.node_id for node in self._lost}
        survivors = self._survivors()
        if survivors:
            self._cluster.await_live(
                survivors, lambda seen: bool(seen) and not seen & lost, "the loss to be noticed"
            )
        self._moments[_NOTICE] = time.monotonic()

    def _show_plan(self) -> None:
        """What the survivors could bring back, as they say themselves."""
        survivors = self._survivors()
        if not survivors:
            return
        reply = recovery_plan(survivors[0], JOB)
        wanted = next((plan for plan in reply.plans if plan.recoverable), None)
        if wanted is None:
            missing = "; ".join(reply.plans[0].missing) if reply.plans else "they hold nothing"
            self._watcher.say(f"The others cannot bring anything back by themselves: {missing}.")
            self._watcher.say("An older step is whole on disk, once the lost disks are back.")
            return
        self._wanted = wanted
        self._watcher.say(f"The others can bring back step {wanted.step}: {in_words(wanted)}.")

    def _replace(self) -> None:
        plan = self._plan
        new = [self._cluster.replace(rank, disk=not plan.decodable) for rank in self._chosen.ranks]
        names = {node.node_id for node in self._cluster.nodes}
        for node, lost in zip(new, self._lost, strict=True):
            self._watcher.say(f"{node.node_id} takes the place of {lost.node_id}.")
        self._cluster.await_live(self._cluster.nodes, lambda seen: seen == names, "replacements")
        self._moments[_REPLACE] = time.monotonic()
        self.held.recovery_sent_bytes = -self._cluster.bytes_sent()

    def _follow_to_the_end(self, fleet: Fleet) -> None:
        restored = stepped = 0
        for rank, entry in fleet.entries():
            restored += entry.kind == "restored"
            stepped += entry.kind == "step"
            if entry.kind == "restored" and restored == self._plan.nodes:
                self.held.recovery_sent_bytes += self._cluster.bytes_sent()
                self._watcher.say(f"All ranks have restored step {entry.facts['step']}.")
            if entry.kind == "step" and rank == 0:
                self._watcher.step(LOST, entry.facts["step"])

    def _returned(self) -> Return:
        after = [
            Run(follower.entries[count:])
            for follower, count in zip(self.followers, self._entries_before, strict=True)
        ]
        moments = dict(self._moments)
        for part, kind in _AFTERWARDS.items():
            moments[part] = max(run.of_kind(kind)[0].at_s for run in after)
        restored = [run.of_kind("restored")[0].facts for run in after]
        steps = {facts["step"] for facts in restored}
        if len(steps) != 1:
            raise Refused(f"the ranks restored different steps, {steps}: that must not happen.")
        wanted = self._wanted
        return Return(
            lost=[node.node_id for node in self._lost],
            replaced_by=[self._cluster.nodes[rank].node_id for rank in self._chosen.ranks],
            step=self._step(),
            restored_step=steps.pop() or 0,
            levels=sorted({level for facts in restored for level in facts["levels"]}),
            decoded_ranks=[source.rank for source in wanted.sources if not source.node_id],
            parity_levels=parity_levels(wanted),
            disk_step=self._disk_step,
            protected_step=self._protected_step(),
            protected_again_s=min(
                (one.at_s - self._killed_s for one in after[0].of_kind("protected")), default=None
            ),
            parts=_durations(self._killed_s, moments),
        )

    def _before(self) -> list[Run]:
        """What each rank noted before the loss."""
        return [
            Run(follower.entries[:count])
            for follower, count in zip(self.followers, self._entries_before, strict=True)
        ]

    def _step(self) -> int:
        """The last step that any rank had done before the loss."""
        return max(run.losses()[-1][0] for run in self._before())

    def _protected_step(self) -> int:
        return max(int(one.facts["step"]) for one in self._before()[0].of_kind("protected"))


def in_words(plan: SnapshotPlan) -> str:
    """Where each rank's part of a snapshot would come from."""
    held = [source for source in plan.sources if source.node_id]
    decoded = [source for source in plan.sources if not source.node_id]
    words = []
    for level in sorted({source.level for source in held}):
        ranks = [source.rank for source in held if source.level == level]
        words.append(f"rank {listed(ranks)} from {level}")
    if decoded:
        ranks = [source.rank for source in decoded]
        where = listed(parity_levels(plan))
        words.append(f"rank {listed(ranks)} decoded with the parity in {where}")
    return ", ".join(words)


def parity_levels(plan: SnapshotPlan) -> list[str]:
    """Where the parity is that is decoded with; who has it in memory need not read its disk."""
    best: dict[tuple[str, str], str] = {}
    for parity in plan.parities:
        place = parity.plan_id, parity.node_id
        best[place] = min(parity.level, best.get(place, parity.level))
    return sorted(set(best.values()))


def _durations(begun_s: float, moments: dict[str, float]) -> dict[str, float]:
    """From moments to parts that add up; nothing ends before what is listed before it."""
    ends = itertools.accumulate(moments.values(), max, initial=begun_s)
    return dict(
        zip(moments, (late - early for early, late in itertools.pairwise(ends)), strict=True)
    )
