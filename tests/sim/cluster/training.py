"""The trainers of one job on many nodes, and the launcher that starts them again.

Owns a model of what the trainers' side does: join an incarnation, restore, take the same steps
together, seal them, end together. What the coordinator's join and recovery do is modelled as the
design has it: one number for a launch, and the newest snapshot that the planner finds.
"""

import random

from everstep.agent import events
from everstep.agent.actions import Place
from everstep.agent.inventory import NodeInventory
from everstep.agent.planning import plan_snapshots
from everstep.agent.sources import Decoded, Held, SnapshotPlan
from everstep.proto.errors import EverstepError, Fenced, Refused, StaleIncarnation
from everstep.proto.ids import SnapshotId

from .files import JOB, LAYOUT, Record, Token, adopted_shard, held_tokens, inventory, token_of
from .host import Agent, Host, World
from .ledger import insist
from .trainers import Copy, Launch, Trainer

PATIENCE_S = 8.0
TURN_S = 0.25


def newest_recoverable(inventories: list[NodeInventory]) -> SnapshotPlan | None:
    """What `plan_snapshots` puts first of what is whole; it need not plan the rest."""
    held = {one.snapshot for inventory in inventories for one in inventory.snapshots}
    for snapshot in sorted(held, reverse=True):
        for plan in plan_snapshots(inventories, to_step=snapshot.step):
            if plan.snapshot == snapshot and plan.recoverable:
                return plan
    return None


class Training:
    """The job, from launch to launch."""

    def __init__(
        self, world: World, ranks: int, slots: int, interval: int, captures: int = 1
    ) -> None:
        self.world = world
        self.ranks = ranks
        self.slots = slots
        self.interval = interval
        self.captures = captures
        self.launches = 0
        self.launch: Launch | None = None
        self.zombies: list[Trainer] = []
        self.step_s = 0.7
        self.sealed = 0
        self.candidates: list[Host] = []
        self.resizing: random.Random | None = None
        """Chooses the sizes of launches, if they change."""

    @property
    def now_s(self) -> float:
        """The launcher's time."""
        return self.world.clock.now_s

    def turn(self) -> None:
        """What the launcher and the ranks do next."""
        launch = self.launch
        for trainer in launch.trainers if launch is not None else ():
            agent = trainer.host.agent  # attached or not: a fenced one answers neither
            if agent is not None and agent.node.members.fenced_by:
                self.kill(trainer)  # its agent says that it takes no snapshots any more
        if launch is None or any(not t.alive for t in launch.trainers) or self._stuck(launch):
            self._relaunch()
        elif launch.stage == "joining":
            self._join(launch)
        elif launch.stage == "restoring":
            self._restore(launch)
        elif launch.stage == "telling":
            self._tell(launch)
        else:
            self._go_on(launch)
        delay_s = TURN_S
        if self.launch is not None and self.launch.stage == "running":
            delay_s = self.step_s
        self.world.clock.later(delay_s, self.turn)

    def _stuck(self, launch: Launch) -> bool:
        return launch.stage != "running" and self.now_s - launch.began_s > 3 * PATIENCE_S

    def _relaunch(self) -> None:
        self.candidates = [
            h
            for h in self.world.hosts.values()
            if not h.lost and h.runs and h.agent.node.members.joined
        ]  # type: ignore[union-attr]
        for trainer in self.launch.trainers if self.launch is not None else ():
            self.kill(trainer)
        self.launch = None
        if not self.candidates:
            return
        self.launches += 1
        if self.resizing is not None and self.resizing.random() < 0.5:
            self.ranks = self.resizing.randint(1, 2 * len(self.candidates))
        count = self.world.chance.randint(1, min(self.ranks, len(self.candidates)))
        if self.world.chance.random() < 0.7:
            count = min(self.ranks, len(self.candidates))
        places = sorted(self.world.chance.sample(self.candidates, count), key=lambda h: h.node_id)
        trainers = [
            Trainer(
                self.launches, rank, places[rank * count // self.ranks], f"p{self.launches}-{rank}"
            )
            for rank in range(self.ranks)
        ]
        self.launch = Launch(self.launches, self.ranks, trainers, self.now_s)
        self.world.seen["launch"] += 1

    def kill(self, trainer: Trainer) -> None:
        """A rank's process ends."""
        if not trainer.alive:
            return
        trainer.alive = False
        agent = trainer.session
        if agent is not None and agent.here:
            self.world.clock.later(
                self.world.chance.uniform(0, 0.5), self._session_lost, agent, trainer
            )

    def _session_lost(self, agent: Agent, trainer: Trainer) -> None:
        if agent.here and agent.host.runs:
            agent.feed(events.SessionLost(JOB, trainer.rank, trainer.process_id))

    # Joining.

    def _join(self, launch: Launch) -> None:
        for trainer in launch.trainers:
            if trainer.agent is None and trainer.alive:
                self._attach(launch, trainer)
        if any(not trainer.alive or trainer.agent is None for trainer in launch.trainers):
            return
        if not launch.incarnation:
            self.kill(launch.trainers[0])  # ranks of two incarnations: it cannot go on
            return
        launch.stage, launch.stage_s = "restoring", self.now_s

    def coordinator_of(self, agent: Agent) -> Agent | None:
        """The coordinator that an agent can ask, if it is one and knows enough."""
        node_id = agent.node.members.coordinator(agent.now_s)
        host = self.world.hosts.get(node_id)
        if host is None or host.agent is None or not host.runs:
            return None
        there = host.agent
        if not self.world.network.call(agent.host.address, host.address):
            return None
        return there if there.node.ready(there.now_s) else None

    def _attach(self, launch: Launch, trainer: Trainer) -> None:
        agent = trainer.host.agent
        if agent is None or not trainer.host.runs or not agent.node.members.joined:
            return
        coordinator = self.coordinator_of(agent)
        if coordinator is None:
            return
        try:
            number = self._number(launch, trainer, coordinator)
            if self._taken_before(launch, agent, number):
                self.kill(trainer)
                return
            caller = events.Caller(
                JOB, trainer.rank, launch.world, trainer.process_id, trainer.incarnation
            )
            trainer.incarnation = agent.feed(
                events.Attach(
                    caller=caller,
                    launch_id=launch.launch_id,
                    pid=launch.number * 1000 + trainer.rank,
                    pid_started_s=0.0,
                    holder_alive=self._holder_alive(agent, trainer),
                    in_flight=trainer.in_flight(),
                    decided=number,
                )
            )
        except StaleIncarnation:
            self.kill(trainer)
            return
        except Refused:
            return
        if not agent.here:
            return
        trainer.session = agent
        job = agent.job
        assert job is not None
        if trainer.rank not in job.arenas:
            self._reserve(agent, trainer.rank)
            trainer.copies.clear()

    def _number(self, launch: Launch, trainer: Trainer, coordinator: Agent) -> int:
        coordination = coordinator.node.coordination
        table = coordination.jobs.get(JOB)
        present = table.incarnation if table is not None else 0
        if trainer.incarnation:
            if trainer.incarnation < present:
                raise StaleIncarnation(JOB, trainer.incarnation, present)
            return trainer.incarnation
        if table is not None and table.launch_id == launch.launch_id:
            return present
        known = [fact.newest_incarnation for fact in table.facts.values()] if table else []
        number = max([0, present, *known]) + 1
        coordination.begun(JOB, number, launch.world, launch.launch_id)
        return number

    def _taken_before(self, launch: Launch, agent: Agent, number: int) -> bool:
        """Whether a node holds something of another launch under this number: after all agents have
        restarted, a coordinator may for a while know of itself alone, and give a number again.

        Nothing in the agents checks this: what such a launch commits is refused at its restore, as
        two snapshots of one name.
        """
        tokens = held_tokens(agent.host)
        return any(t.incarnation == number and t.launch != launch.number for t in tokens)

    def _holder_alive(self, agent: Agent, trainer: Trainer) -> bool:
        job = agent.job
        holder = job.members.get(trainer.rank) if job is not None else None
        if holder is None or holder.process_id == trainer.process_id:
            return False
        return any(z.alive and z.process_id == holder.process_id for z in self.zombies)

    def _reserve(self, agent: Agent, rank: int) -> None:
        job = agent.job
        assert job is not None
        generation = job.next_generation(rank)
        memory = agent.host.memory
        memory.arenas[rank, generation] = self.slots
        agent.feed(events.ArenaReserved(JOB, rank, generation, self.world.image_bytes, self.slots))

    # Restoring.

    def _restore(self, launch: Launch) -> None:
        agent = launch.trainers[0].agent
        coordinator = self.coordinator_of(agent) if agent is not None else None
        if coordinator is None:
            return
        members = coordinator.node.members
        now_s = coordinator.now_s
        if members.suspected(now_s) and self.now_s - launch.stage_s < PATIENCE_S / 2:
            return  # somebody may come back
        hosts = [self.world.hosts[node_id] for node_id in members.live(now_s)]
        network = self.world.network
        if not all(h.runs and network.call(coordinator.host.address, h.address) for h in hosts):
            return
        there = [inventory(h.node_id, h.memory, h.disk) for h in hosts]
        # What may be freed before it is brought to where it is needed is the last resort.
        revocable = coordinator.node.coordination.revocable(JOB, coordinator.node.cluster(now_s))
        lasting = newest_recoverable([held.without(revocable) for held in there])
        chosen = lasting or newest_recoverable(there)
        tokens = []
        for source in chosen.sources if chosen is not None else ():
            token = self._token(chosen.snapshot, source)
            if token is None:
                return
            tokens.append(token)
        asked = {host.node_id for host in hosts}
        launch.restored = chosen.snapshot if chosen is not None else None
        coordinator.node.coordination.restored(JOB, launch.incarnation, launch.restored)
        self.world.ledger.restored(launch.incarnation, launch.restored, tokens, asked)
        self.world.seen["restored" if chosen is not None else "fresh start"] += 1
        if chosen is not None and chosen.decoded:
            self.world.seen["decoded"] += 1
        if self.world.trace:
            self.world.trace(f"  restore {launch.incarnation} from {launch.restored} by {asked}")
        if chosen is not None and chosen.world != launch.world:
            self.world.seen["resized"] += 1
        launch.as_saved = chosen is not None and chosen.world == launch.world
        launch.digests = {token.rank: token.digest for token in tokens}
        launch.step = launch.restored.step if launch.restored is not None else 0
        launch.untold = sorted(asked | {t.host.node_id for t in launch.trainers})
        launch.stage = "telling"

    def _token(self, snapshot: SnapshotId, source: Held | Decoded) -> Token | None:
        if isinstance(source, Decoded):
            shards = source.plan.members[source.member].shards
            return next(token_of(s.record_digest) for s in shards if s.rank == source.rank)
        host = self.world.hosts[source.node_id]
        if source.level == "nvme":
            return host.disk.steps[snapshot].records[source.rank].token
        for slot, record in host.memory.records.items():
            if slot[0] == source.rank and record.token.snapshot == snapshot:
                if host.memory.slots[slot] == record.token:
                    return record.token
        return None

    def _tell(self, launch: Launch) -> None:
        """Bring the shards to where the ranks are, and say what was decided."""
        restored = launch.restored
        for trainer in launch.trainers:
            agent = trainer.agent
            if agent is None:
                self.kill(trainer)
                return
            if restored is None or not launch.as_saved:
                continue  # units are gathered for a launch of another size, and held nowhere
            if agent.host.memory.sound(trainer.rank, launch.digests[trainer.rank]):
                continue
            if not self._install(launch, trainer, agent, restored):
                self.kill(trainer)
                return
        for node_id in list(launch.untold):
            host = self.world.hosts[node_id]
            agent = host.agent
            needed = any(t.host is host for t in launch.trainers)
            if agent is not None and host.runs and self.world.chance.random() < 0.8:
                agent.feed(events.RestoreDecided(JOB, launch.incarnation, restored))
                if agent.here:
                    launch.untold.remove(node_id)
            elif not needed:
                launch.untold.remove(node_id)
        if not launch.untold:
            launch.stage = "running"
            self.world.seen["running"] += 1

    def _install(
        self, launch: Launch, trainer: Trainer, agent: Agent, snapshot: SnapshotId
    ) -> bool:
        there = [
            inventory(h.node_id, h.memory, h.disk)
            for h in self.world.hosts.values()
            if not h.lost and h.runs and self.world.network.call(agent.host.address, h.address)
        ]
        plans = plan_snapshots(there, to_step=snapshot.step)
        plans = [plan for plan in plans if plan.snapshot == snapshot]
        source = next((s for p in plans for s in p.sources if s.rank == trainer.rank), None)
        if source is None:
            return False
        token = self._token(snapshot, source)
        if token is None or token.digest != launch.digests[trainer.rank]:
            return False
        job = agent.job
        assert job is not None
        if trainer.rank not in job.arenas:
            self._reserve(agent, trainer.rank)
        place = job.free_place(trainer.rank)
        held = job.snapshots.get(snapshot)
        if held is not None and trainer.rank in held.granted:
            return False  # damaged, or only just given up: it is not written over
        if place is None:
            generation = job.next_generation(trainer.rank)
            agent.host.memory.arenas[trainer.rank, generation] = self.slots
            place = Place(generation, 0)
        memory = agent.host.memory
        record = Record(token, launch.world, self.world.image_bytes, token.digest)
        memory.slots[trainer.rank, place] = token
        memory.records[trainer.rank, place] = record
        arena = events.ArenaReserved(
            JOB, trainer.rank, place.generation, self.world.image_bytes, self.slots
        )
        agent.feed(events.Installed(JOB, arena, adopted_shard(record, trainer.rank, place)))
        self.world.seen["installed"] += 1
        return agent.here

    # Running.

    def _go_on(self, launch: Launch) -> None:
        for trainer in launch.trainers:
            if trainer.agent is None:
                self._attach(launch, trainer)
            self._seal(launch, trainer)
        if not all(t.alive and self.now_s >= t.host.stopped_until_s for t in launch.trainers):
            return
        launch.step += 1
        if launch.step % self.interval:
            return
        for trainer in launch.trainers:
            delay_s = self.world.chance.uniform(0, 0.1)
            self.world.clock.later(delay_s, self._offer, launch, trainer, launch.step)

    def _offer(self, launch: Launch, trainer: Trainer, step: int) -> None:
        agent = trainer.agent
        if agent is None or not trainer.alive:
            return
        if len(trainer.copies) == self.captures:
            if not trainer.copies[0].copied:
                return  # it copies no more at a time
            del trainer.copies[0]
        caller, in_flight = self._caller(launch, trainer), trainer.in_flight()
        try:
            place = agent.feed(
                events.Offer(caller, step, captures_in_flight=self.captures, in_flight=in_flight)
            )
        except StaleIncarnation:
            self.kill(trainer)
            return
        except Fenced:
            self.world.seen["fenced"] += 1
            return
        except EverstepError:
            return
        if not agent.here:
            return
        if not isinstance(place, Place):
            self.world.seen["skipped"] += 1
            return
        insist(not agent.node.members.fenced_by, "a fenced agent grants a slot")
        memory = trainer.host.memory
        slot = trainer.rank, place
        insist(slot not in memory.records, f"{slot} is granted while its record claims it")
        memory.slots[slot] = None
        self.world.ledger.dirty = True
        copy = Copy(step, place)
        trainer.copies.append(copy)
        if len(trainer.copies) > 1:
            self.world.seen["several copies"] += 1
        delay_s = self.world.chance.uniform(0.05, 0.5 if self.captures == 1 else 1.5)
        self.world.clock.later(delay_s, self._copied, launch, trainer, copy)

    def _caller(self, launch: Launch, trainer: Trainer) -> events.Caller:
        return events.Caller(
            JOB, trainer.rank, launch.world, trainer.process_id, trainer.incarnation
        )

    def _copied(self, launch: Launch, trainer: Trainer, copy: Copy) -> None:
        if not trainer.alive or copy not in trainer.copies:
            return
        token = Token(trainer.incarnation, copy.step, trainer.rank, launch.number)
        trainer.host.memory.slots[trainer.rank, copy.place] = token
        copy.copied = True
        self._seal(launch, trainer)

    def _seal(self, launch: Launch, trainer: Trainer) -> None:
        """What is copied, oldest first; a newer one waits for those before it, as a rule."""
        for copy in list(trainer.copies):
            if copy.copied and copy in trainer.copies:
                self._seal_one(launch, trainer, copy)
            elif self.world.chance.random() < 0.9:
                return

    def _seal_one(self, launch: Launch, trainer: Trainer, copy: Copy) -> None:
        agent = trainer.agent
        if agent is None or not trainer.alive:
            return
        step, place = copy.step, copy.place
        token = Token(trainer.incarnation, step, trainer.rank, launch.number)
        try:
            refusal = agent.feed(
                events.Seal(
                    caller=self._caller(launch, trainer),
                    step=step,
                    place=place,
                    layout_id=LAYOUT,
                    image_bytes=self.world.image_bytes,
                    replica_samples=b"",
                    captured_unix_s=0.0,
                    envelope=token.digest,
                    record_digest=token.digest,
                )
            )
        except StaleIncarnation:
            self.kill(trainer)
            return
        except Fenced:
            self.world.seen["fenced"] += 1
            return
        if not agent.here:
            return
        trainer.copies.remove(copy)
        if refusal is None:
            self.sealed += 1
