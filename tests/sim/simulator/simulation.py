"""One seeded run: trainers, an agent, a launcher and a network, in an order that chance decides.

Owns the choice of what happens next. The same seed and profile give the same run. `run` is a
stormy time with faults followed by a calm one, in which a new snapshot must commit, and by the
death of everything, after which the newest promised snapshot must be restored.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from everstep.agent import events
from everstep.agent.job import Stage
from everstep.agent.recovery import Wanted
from everstep.agent.state import Rules
from everstep.proto.errors import EverstepError, Refused
from everstep.proto.ids import SnapshotId
from everstep.storage.retention import Rule

from .agent import Agent, AgentDied, Faults
from .files import JOB, ROTTEN, ArenaModel, MemoryFiles, NvmeFiles
from .promises import Promises, insist
from .trainer import NO_AGENT, TOO_LATE, Call, Habits, Process

CALM_LIMIT = 4000


@dataclass(frozen=True, slots=True)
class Profile:
    """How large and how stormy."""

    steps: int = 350
    max_world: int = 4
    trace: bool = False


class Simulation:
    """One run."""

    def __init__(self, seed: int, profile: Profile | None = None) -> None:
        self.profile = profile or Profile()
        self.chance = random.Random(seed)
        self.habits = Habits.chosen(self.chance)
        self.captures = (1, 2, 1, 3)[seed % 4]
        self.slots = self.chance.choice((2, 2, 3)) + (self.captures - 1 if seed % 8 < 6 else 0)
        self.memory = MemoryFiles()
        self.nvme = NvmeFiles()
        self.promises = Promises(self.memory, self.nvme)
        self.agent = self._make_agent()
        self.world = self.chance.randint(1, self.profile.max_world)
        self.launches = 0
        self.names_launches = self.chance.random() < 0.5
        self.pids = 0
        self.processes: list[Process] = []
        self.network: list[Call] = []
        self.lost_sessions: list[events.SessionLost] = []
        self.happened: list[str] = []
        self.at = 0
        self.fault_rate = self.chance.choice((0.01, 0.03, 0.06, 0.12))
        self.faults, self.weights = self._choose_faults()

    def _choose_faults(self) -> tuple[list[Callable[[], None]], list[float]]:
        """Each run has faults of its own: what is rare among all of them is common among few."""
        usual = self.all_faults()
        chosen = [fault for fault in usual if self.chance.random() < 0.6] or list(usual)
        weights = [weight * self.chance.choice((0.3, 1.0, 3.0)) for _, weight in chosen]
        return [fault for fault, _ in chosen], weights

    def all_faults(self) -> tuple[tuple[Callable[[], None], float], ...]:
        """What can go wrong, and how often beside each other."""
        return (
            (self._kill_trainer, 2),
            (self._relaunch, 2),
            (self._replace_one, 2),
            (self._glitch, 1),
            (self._kill_agent, 2),
            (self._arm_agent, 4),
            (self._rewind, 1),
            (self._persist, 1),
            (self._scrub, 1),
            (self._rot, 0.3),
            (self._remove, 0.3),
            (self._detach, 0.5),
            (self._change_world, 0.5),
            (self._lose_power, 0.3),
            (self._empty_memory, 0.3),
        )

    def _make_agent(self) -> Agent:
        rules = Rules(
            nvme=self.chance.random() < 0.8,
            nvme_interval_steps=self.chance.choice((None, 1, 3)),
            nvme_interval_s=self.chance.choice((None, 40.0)),
            flush_on_exit=self.chance.random() < 0.5,
        )
        keep = Rule(self.chance.randint(1, 2), self.chance.choice((None, 5)))
        faults = Faults.chosen(self.chance)
        return Agent(self.memory, self.nvme, self.promises, rules, keep, faults, self.chance)

    def run(self) -> None:
        """The storm, the calm, and the last restore."""
        self.begin()
        for _ in range(self.profile.steps):
            if self.chance.random() < self.fault_rate:
                self.fault(self.chance.choices(self.faults, self.weights)[0])
            else:
                self._step()
        self.calm()
        self.restore_all()

    def _try(self, move: Callable[[], None]) -> None:
        """Do something during which the agent may die."""
        self.agent.now_s += 1.0
        self.at += 1
        try:
            move()
        except AgentDied:
            self._agent_died()

    def begin(self) -> None:
        """The agent starts, and the first launch."""
        if self.profile.trace:
            self.agent.trace = self.happened.append
        self.agent.start()
        self._launch()

    def move(self, pick: int) -> None:
        """Let one of the things happen that can happen now, and look at what came of it."""
        moves = self._moves()
        if moves:
            move, argument = moves[pick % len(moves)]
            if self.profile.trace:
                self.happened.append(f"{move.__name__.strip('_')} {argument}")
            self._try(lambda: move(argument))
        self.promises.look(self.agent.state)

    def fault(self, fault: Callable[[], None]) -> None:
        """Let something go wrong, and look at what came of it."""
        if self.profile.trace:
            self.happened.append(f"fault {fault.__name__.strip('_')}")
        self._try(fault)
        self.promises.look(self.agent.state)

    def _step(self) -> None:
        self.move(self.chance.getrandbits(16))

    def _moves(self) -> list[tuple[Callable[[Any], None], Any]]:
        moves: list[tuple[Callable[[Any], None], Any]] = []
        agent_up = self.agent.state is not None
        for process in self.processes:
            moves.extend((self._resume, (process, name)) for name in process.runnable())
            if agent_up and process.alive and not process.attached and not process.ended:
                moves.append((self._attach, process))
        if agent_up:
            arriving = (call for call in self.network if call.stuck_until <= self.at)
            moves.extend((self._deliver, call) for call in arriving)
            moves.extend((self.agent.advance, index) for index in range(len(self.agent.tasks)))
            moves.extend((self._deliver_loss, lost) for lost in self.lost_sessions)
        else:
            moves.append((self._start_agent, None))
        return moves

    def _resume(self, which: tuple[Process, str]) -> None:
        process, name = which
        process.resume(name)
        if not process.alive:
            self._session_ends(process)

    def _attach(self, process: Process) -> None:
        process.reattach()
        if process.attached and self.agent.job is not None:
            self.promises.told_newest(self.agent.job)

    def _deliver(self, call: Call) -> None:
        if not call.settled and call.kind != "Restore" and self.chance.random() < 0.03:
            # The caller waits no longer; the call arrives now, later, or never.
            call.fail(TOO_LATE)
            self._delay(call)
            return
        try:
            reply = call.perform()
        except EverstepError as error:
            self.network.remove(call)
            call.fail(error)
            return
        if reply is None and call.kind in ("Restore", "Declare"):
            return
        self.network.remove(call)
        call.reply = reply
        call.settled = True

    def _delay(self, call: Call) -> None:
        if self.chance.random() < 0.3:
            self.network.remove(call)
        elif self.chance.random() < 0.5:
            call.stuck_until = self.at + self.chance.randint(1, 80)

    def _deliver_loss(self, lost: events.SessionLost) -> None:
        self.lost_sessions.remove(lost)
        self.agent.submit(lost)

    def _start_agent(self, _: None) -> None:
        self.agent.start()

    # What the processes see.

    def send(self, call: Call) -> None:
        """A call leaves its process."""
        if self.agent.state is None:
            call.fail(NO_AGENT)
        else:
            self.network.append(call)

    def submit(self, event: events.Event) -> Any:
        """A call arrives."""
        if isinstance(event, events.Offer):
            self.agent.check_arena(event.caller.rank)
        reply = self.agent.submit(event)
        if isinstance(event, events.Offer) and not isinstance(reply, str):
            caller = event.caller
            self.promises.granted(SnapshotId(caller.incarnation, event.step), caller.rank, reply)
            for other in self.processes:
                reads = other.alive and other.incarnation == caller.incarnation
                insist(
                    not reads or other.reading != (caller.rank, reply),
                    f"rank {caller.rank}, {reply} granted while {other} restores from it",
                )
        return reply if reply is not None else True

    def ask_restore(self, incarnation: int, wanted: Wanted) -> Any:
        """Restore arrives, or is looked after again."""
        return self.agent.ask_restore(incarnation, wanted)

    def reserve(self, caller: events.Caller, units: int) -> ArenaModel | None:
        """Declare arrives, or is looked after again."""
        found = self.agent.reserve(caller, units, self.slots)
        if isinstance(found, ArenaModel):
            return found
        # Asked again before the first is done, it starts a second one, as a retried call would.
        self.agent.tasks.append(found)
        return None

    def holder_alive(self, rank: int, process_id: str, pid: int) -> bool:
        """As `Service._attach` looks it up."""
        job = self.agent.job
        holder = job.members.get(rank) if job is not None else None
        if holder is None or holder.process_id == process_id or holder.pid == pid:
            return False
        return any(process.alive and process.pid == holder.pid for process in self.processes)

    def arena_locked(self, process: Process) -> bool:
        """Whether another living process has this rank's arena mapped."""
        return any(
            other.alive and other.rank == process.rank and other.arena is not None
            for other in self.processes
            if other is not process
        )

    def members(self) -> set[int]:
        """The ranks that the agent counts among the present incarnation."""
        return set(self.agent.job.members) if self.agent.job is not None else set()

    def may_step(self, process: Process) -> bool:
        """Collectives keep the ranks together: nobody is two steps ahead of another."""
        peers = [
            other.step
            for other in self.processes
            if other.alive and other.ready and other.incarnation == process.incarnation
        ]
        return len(peers) >= process.world and process.step <= min(peers)

    def durable_unit(self, snapshot: SnapshotId, rank: int, unit: int) -> Any:
        """Read from NVMe; None if the file is gone."""
        durable = self.nvme.get(snapshot)
        return durable.shards[rank][unit] if durable is not None else None

    def present_incarnation(self) -> int | None:
        """What incarnation the job is in; None if nobody knows."""
        job = self.agent.job
        return job.incarnation if job is not None else None

    # What goes wrong.

    def _launch(self) -> None:
        self.launches += 1
        launch_id = f"launch-{self.launches}" if self.names_launches else ""
        for rank in range(self.world):
            self._start_process(rank, launch_id)

    def _start_process(self, rank: int, launch_id: str) -> None:
        self.pids += 1
        units = 2 + self.chance.randint(0, 1)
        self.processes.append(Process(self, rank, self.world, launch_id, self.pids, units))

    def _kill(self, process: Process) -> None:
        process.alive = False
        for call in [call for call in process.waits.values() if call in self.network]:
            assert call is not None
            self._delay(call)
        self._session_ends(process)

    def _session_ends(self, process: Process) -> None:
        if process.attached and self.agent.state is not None:
            self.lost_sessions.append(events.SessionLost(JOB, process.rank, process.process_id))
        process.attached = False
        self.processes = [known for known in self.processes if known.alive]

    def _kill_trainer(self) -> None:
        if self.processes:
            self._kill(self.chance.choice(self.processes))

    def _relaunch(self) -> None:
        stragglers = self.chance.random() < 0.2
        for process in list(self.processes):
            if not stragglers or self.chance.random() < 0.7:
                self._kill(process)
        self._launch()

    def _replace_one(self) -> None:
        ranks = {process.rank for process in self.processes}
        for rank in range(self.world):
            if rank not in ranks:
                launch_id = f"launch-{self.launches}" if self.names_launches else ""
                self._start_process(rank, launch_id)

    def _change_world(self) -> None:
        self.world = self.chance.randint(1, self.profile.max_world)
        self._relaunch()

    def _glitch(self) -> None:
        attached = [process for process in self.processes if process.attached]
        if attached and self.agent.state is not None:
            process = self.chance.choice(attached)
            process.attached = False
            self.agent.submit(events.SessionLost(JOB, process.rank, process.process_id))

    def _kill_agent(self) -> None:
        if self.agent.state is not None:
            raise AgentDied

    def _arm_agent(self) -> None:
        if self.agent.state is not None:
            self.agent.dies_in_actions = self.chance.randint(0, 8)

    def _lose_power(self) -> None:
        for process in list(self.processes):
            self._kill(process)
        self.memory.clear()
        self.promises.power_lost()
        self._agent_died()

    def _empty_memory(self) -> None:
        """Somebody cleans up where the arenas lie, while everything runs."""
        if any(getattr(task, "__name__", "") == "_reserve" for task in self.agent.tasks):
            # Then one file could be made twice under one number, which only digests would tell.
            return
        for held in self.memory.held.values():
            self.promises.rot(held.record.snapshot)
        self.memory.clear()
        self.promises.memory_emptied()

    def _agent_died(self) -> None:
        self.agent.die()
        self.lost_sessions.clear()
        for call in self.network:
            if not call.settled:
                call.fail(NO_AGENT)
        self.network.clear()
        for process in self.processes:
            process.attached = False

    def _rewind(self) -> None:
        steps = sorted({snapshot.step for snapshot in self._committed()})
        to_step = self.chance.choice([None, None, *steps])
        for process in self.processes:
            if process.ready and process.attached:
                process.rewinds = Wanted(to_step, frozenset({"memory"}))

    def _persist(self) -> None:
        if self.agent.state is not None:
            self.agent.submit(events.PersistWanted(JOB))

    def _committed(self) -> list[SnapshotId]:
        job = self.agent.job
        if job is None:
            return []
        return sorted(s.id for s in job.snapshots.values() if s.stage is Stage.COMMITTED)

    def _scrub(self) -> None:
        committed = self._committed()
        if committed:
            self.agent.tasks.append(self.agent.scrub(self.chance.choice(committed)))

    def _rot(self) -> None:
        if self.chance.random() < 0.3 and self.memory.held:
            held = self.chance.choice(list(self.memory.held.values()))
            content = self.memory.arena_files[held.rank, held.generation].slots[held.slot]
            content[self.chance.randrange(held.record.image_bytes)] = ROTTEN
            self.promises.rot(held.record.snapshot)
            if self.agent.state is not None:
                self.agent.tasks.append(self.agent.scrub(held.record.snapshot))

    def _remove(self) -> None:
        if self.agent.state is None or self.agent.tasks or self.chance.random() < 0.5:
            return
        try:
            self.agent.submit(events.Removed(JOB))
        except Refused:
            return
        for process in list(self.processes):
            self._kill(process)
        self.memory.clear()
        self.nvme.by_step.clear()
        self.promises.forget()
        self.agent.decisions.clear()
        self.agent.asked.clear()

    def _detach(self) -> None:
        attached = [process for process in self.processes if process.attached]
        if attached and self.agent.state is not None and self.chance.random() < 0.5:
            process = self.chance.choice(attached)
            try:
                self.agent.submit(events.Detach(process.caller))
            except Refused:
                return
            self._kill(process)

    # How it ends.

    def calm(self) -> None:
        """Nothing goes wrong any more: a new snapshot must commit in the end."""
        self.agent.faults = Faults()
        self.habits = Habits()
        self.agent.dies_in_actions = None
        healthy = self._healthy()
        before = self.promises.commits
        for step in range(CALM_LIMIT):
            if not healthy:
                for process in list(self.processes):
                    self._kill(process)
                self._launch()
            self._step()
            if self.promises.commits >= before + 2:
                self._persist_newest()
                return
            healthy = step % 50 != 49 or self._healthy()
        raise AssertionError(f"nothing commits in {CALM_LIMIT} calm steps: {self._why()}")

    def _persist_newest(self) -> None:
        """In calm times, somebody who waits for NVMe gets what he waits for."""
        if not self.agent.rules.nvme or self.agent.state is None:
            return
        wanted = self.agent.submit(events.PersistWanted(JOB))
        for _ in range(CALM_LIMIT):
            durable = self.promises.newest_durable
            if durable is not None and durable >= wanted:
                return
            self._step()
        insist(False, f"{wanted} never came to be on NVMe: {self._why()}")

    def _healthy(self) -> bool:
        """Whether a launcher would see nothing to do: every rank's process runs."""
        running = [process for process in self.processes if not process.ended]
        same = len({process.incarnation for process in running if process.incarnation}) <= 1
        same = same and all(process.world == self.world for process in running)
        return (
            same
            and len(running) == len(self.processes) == self.world
            and {process.rank for process in running} == set(range(self.world))
        )

    def _why(self) -> str:
        job = self.agent.job
        return f"{job}, {self.processes}"

    def restore_all(self) -> None:
        """Everything dies; the next launch must restore what was promised."""
        promised = self.promises.newest
        for process in list(self.processes):
            self._kill(process)
        self._agent_died()
        self._launch()
        for _ in range(CALM_LIMIT):
            self._step()
            if len(self.processes) == self.world and all(p.ready for p in self.processes):
                break
        steps = {process.step for process in self.processes}
        insist(promised is not None, "nothing is promised after the calm")
        assert promised is not None
        restored = self.promises.decided[self.present_incarnation() or 0]
        insist(restored is not None and restored >= promised, f"{restored} instead of {promised}")
        insist(all(step - promised.step in (0, 1, 2, 3) for step in steps), f"steps {steps}")
