"""What parity costs: time to its commit, bytes sent, memory held, the trainers' step time.

``python -m benchmarks.parity [--rounds N] [--parameters P] [--nodes N] [--parities M]``. Real
agents on loopback, one trainer with its own state on each. First, with the trainers idle: snapshot
by snapshot, from the commit in memory to the commit of parity; bytes that the agents' bulk planes
sent and memory that parity takes, beside what erasure/rows.py says of those shards. Then steps with
a snapshot each time: clusters with parity and without take turns. All agents and trainers share
this machine's cores, so the step times are those of nodes with a fraction of a core each.
"""

import argparse
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.workload import Training, agent, scratch
from everstep.agent.asking import Agent
from everstep.erasure.rows import Rows
from everstep.proto.ids import UNIT_BYTES
from everstep.storage.arena import MemoryLevel
from everstep.storage.parity_memory import ParityMemory

JOB = "bench"
PARAMETERS = 8_000_000
STEPS = 6
WARM = 2
_DEADLINE_S = 120.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Node:
    """One agent of a cluster."""

    node_id: str
    address: str
    memory_dir: Path


@contextlib.contextmanager
def cluster(count: int, parities: int) -> Iterator[list[Node]]:
    """Agents that know each other; without parities they take no part in parity."""
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(scratch("/tmp"))
        memory = stack.enter_context(scratch("/dev/shm"))
        endpoints = {f"n{number}": _free_endpoint() for number in range(1, count + 1)}
        config = home / "everstep.toml"
        peers = ", ".join(f'"{node}={endpoint}"' for node, endpoint in endpoints.items())
        config.write_text(f"[cluster]\npeers = [{peers}]\n\n[parity]\nparities = {parities}\n")
        nodes = []
        for node_id, endpoint in endpoints.items():
            memory_dir = memory / node_id
            memory_dir.mkdir(mode=0o700)
            options = {"node-id": node_id, "listen": endpoint, "config": str(config)}
            address = stack.enter_context(agent(**options, **{"memory-dir": str(memory_dir)}))
            nodes.append(Node(node_id, address, memory_dir))
        for node in nodes:
            _await_members(node, count)
        yield nodes


def _free_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _await_members(node: Node, count: int) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while True:
        with Agent(node.address) as asked:
            members = asked.status().cluster.members
        if sum(member.state == "live" for member in members) == count:
            return
        assert time.monotonic() < deadline, f"{node.node_id} does not see {count} members"
        time.sleep(_POLL_S)


class Trainer:
    """A rank as a process; it does what it is told, line by line."""

    def __init__(self, node: Node, rank: int, world: int, parameters: int) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.parity", "--role", "train"]
        command += ["--agent", node.address, "--parameters", str(parameters)]
        environ = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )

    def tell(self, what: str, **arguments: int) -> None:
        """Begin something."""
        assert self.process.stdin is not None
        print(json.dumps({"what": what, **arguments}), file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        """What came of it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "a trainer died"
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@contextlib.contextmanager
def training(nodes: list[Node], parameters: int) -> Iterator[list[Trainer]]:
    """A trainer on each node, attached, with a first snapshot behind it."""
    trainers = [Trainer(n, rank, len(nodes), parameters) for rank, n in enumerate(nodes)]
    try:
        for trainer in trainers:
            trainer.answer()
        yield trainers
    finally:
        for trainer in trainers:
            trainer.close()


def train(address: str, parameters: int) -> None:
    """As a process: one rank."""
    import torch

    import everstep

    torch.set_num_threads(1)
    state = Training.start(parameters)
    client = everstep.connect(JOB, agent=address, interval=1, on_busy="wait", nvme_interval=10**9)
    client.attach(per_rank={"model": state.model, "optimizer": state.optimizer})
    step = 1
    assert client.snapshot(step).wait(timeout=_DEADLINE_S)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        level, count = "parity" if told["parity"] else "memory", told["count"]
        times = []
        for _ in range(count):
            step += 1
            if told["what"] == "protect":
                handle = client.snapshot(step)
                assert handle.wait("memory", timeout=_DEADLINE_S), handle
                begun = time.perf_counter()
                assert handle.wait(level, timeout=_DEADLINE_S), handle
                times.append(time.perf_counter() - begun)
            else:
                handle = client.snapshot(step)
                times.append(state.steps(STEPS) / STEPS)
                assert handle.wait(level, timeout=_DEADLINE_S), handle
        print(json.dumps(times), flush=True)
    client.close(timeout=0)


def told(trainers: list[Trainer], what: str, count: int, parity: bool) -> list[list[float]]:
    """Have all trainers do something; what each of them measured."""
    for trainer in trainers:
        trainer.tell(what, count=count, parity=int(parity))
    return [trainer.answer() for trainer in trainers]


def bytes_sent(nodes: list[Node]) -> int:
    """By the bulk planes of all agents, since their start."""
    total = 0
    for node in nodes:
        with Agent(node.address) as asked:
            total += asked.status().cluster.bulk_counters["bytes_sent"]
    return total


def held(nodes: list[Node]) -> tuple[list[int], int, int]:
    """Units of each node's newest shard; bytes of parity of the newest; bytes of all parity files.

    By directories alone, whatever the agents say.
    """
    units, newest_bytes, files_bytes = [], 0, 0
    for node in nodes:
        records = MemoryLevel(node.memory_dir, keep_free_bytes=0).records(JOB)
        newest = max(records, key=lambda one: one.snapshot)
        units.append(-(-newest.record.image_bytes // UNIT_BYTES))
        store = ParityMemory(node.memory_dir, keep_free_bytes=0)
        with store.open(JOB, store.manifests(JOB)[-1].plan.plan_id) as parity:
            newest_bytes += parity.image.nbytes
        files = (node.memory_dir / JOB / "parity").glob("*.parity")
        files_bytes += sum(file.stat().st_blocks * 512 for file in files)
    return units, newest_bytes, files_bytes


def protection(report: Report, count: int, parities: int, rounds: int, parameters: int) -> None:
    """With idle trainers: time, bytes, memory."""
    with cluster(count, parities) as nodes, training(nodes, parameters) as trainers:
        told(trainers, "protect", WARM, True)
        before = bytes_sent(nodes)
        times = told(trainers, "protect", rounds, True)
        sent = (bytes_sent(nodes) - before) / rounds
        units, newest_bytes, files_bytes = held(nodes)
    rows = Rows(tuple(units), parities)
    sent_units = sum(rows.sent_units(member) for member in range(count))
    held_units = sum(rows.parity_file_units(member) for member in range(count))
    state_bytes = sum(units) * UNIT_BYTES
    report.add("state, all nodes", state_bytes, _megabytes(state_bytes), "state_bytes")
    slowest = [max(ranks) for ranks in zip(*times, strict=True)]
    taken = report.seconds("commit in memory to commit of parity", slowest, "parity_commit")
    rate = sent / taken
    report.add("bytes sent a round", sent, f"{_megabytes(sent)}   {rate / 1e9:.2f} GB/s", "sent")
    report.add("parity of one round", newest_bytes, _megabytes(newest_bytes), "parity_bytes")
    report.add("parity files, all", files_bytes, _megabytes(files_bytes), "parity_files_bytes")
    report.target("bytes sent over the formula", sent / (sent_units * UNIT_BYTES), 1.05)
    held_ratio = newest_bytes / (held_units * UNIT_BYTES)
    report.target("memory of a round over the formula", held_ratio, 1.05)


def steps(report: Report, count: int, parities: int, rounds: int, parameters: int) -> None:
    """Step times with parity and without, in turns."""
    samples: dict[bool, list[float]] = {False: [], True: []}
    with contextlib.ExitStack() as stack:
        teams = {}
        for parity in (False, True):
            nodes = stack.enter_context(cluster(count, parities if parity else 0))
            teams[parity] = stack.enter_context(training(nodes, parameters))
            told(teams[parity], "steps", 1, parity)
        for _ in range(rounds):
            for parity, trainers in teams.items():
                for times in told(trainers, "steps", 1, parity):
                    samples[parity] += times
    without = report.seconds("a step, snapshots in memory only", samples[False], "step_memory")
    protected = report.seconds("a step, each snapshot under parity", samples[True], "step_parity")
    ratio = protected / without
    report.add("step time, parity over memory only", ratio, f"{ratio:9.3f}", "step_ratio")


def _megabytes(size: float) -> str:
    return f"{size / 1e6:9.1f} MB"


def run(count: int, parities: int, rounds: int, parameters: int) -> Report:
    """Measure; the table's rows are medians over the rounds."""
    report = Report("parity")
    protection(report, count, parities, rounds, parameters)
    steps(report, count, parities, rounds, parameters)
    return report


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--parities", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--role", choices=("train",), help=argparse.SUPPRESS)
    parser.add_argument("--agent", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    if options.role:
        train(options.agent, options.parameters)
    else:
        run(options.nodes, options.parities, options.rounds, options.parameters).print()


if __name__ == "__main__":
    main()
