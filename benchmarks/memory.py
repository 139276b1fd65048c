"""Memory: the arena beside the state, and what the trainer's own peak grows by.

``python -m benchmarks.memory [--parameters P]``. The same training runs twice in processes of
their own, with and without snapshots at every second step; a thread samples the process's
anonymous memory every millisecond. The arena is shared memory and counted apart, as tmpfs has it.
The agent's resident size and CPU time at rest are measured too.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import psutil

from benchmarks.report import Report
from benchmarks.workload import PARAMETERS, Training, agent

STEPS = 12
REST_S = 5.0
ROUNDS = 3


class Peak:
    """Samples this process's anonymous memory."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.001):
            self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """This process's own memory, shared mappings left out."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon")


def train(address: str, parameters: int) -> None:
    """As a process: train, with snapshots if there is an agent; prints its peak as JSON."""
    training = Training.start(parameters)
    after = None
    if address:
        import everstep

        client = everstep.connect("bench", interval=2, agent=address)
        client.attach(model=training.model, optimizer=training.optimizer)

        def after(step: int) -> None:
            client.snapshot(step + 1)

    with Peak() as peak:
        training.steps(STEPS, after)
    if address:
        assert client.stats.taken >= STEPS // 4, client.stats
        client.close(timeout=0)
    print(json.dumps({"peak": peak.bytes, "state": training.state_bytes}))


def run(parameters: int) -> Report:
    """Measure."""
    report = Report("memory")
    with agent() as address:

        def child(with_agent: str) -> dict[str, int]:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--role", "train"]
            command += [f"--agent={with_agent}", "--parameters", str(parameters)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            answer: dict[str, int] = json.loads(done.stdout)
            return answer

        plain, ours = (
            {key: int(statistics.median(run[key] for run in runs)) for key in ("peak", "state")}
            for runs in zip(*[(child(""), child(address)) for _ in range(ROUNDS)], strict=True)
        )
        process = _agent_process(address)
        memory_dir = process.cmdline()[process.cmdline().index("--memory-dir") + 1]
        arena = sum(f.stat().st_blocks * 512 for f in Path(memory_dir).rglob("*") if f.is_file())
        before = sum(process.cpu_times()[:2])
        time.sleep(REST_S)
        rest_cpu = (sum(process.cpu_times()[:2]) - before) / REST_S
        resident = process.memory_info().rss
    state = plain["state"]
    growth = ours["peak"] - plain["peak"]
    report.add("state", state, f"{state / 1e6:9.1f} MB", "state_bytes")
    report.add("all that lies in memory_dir", arena, f"{arena / 1e6:9.1f} MB", "arena_bytes")
    report.add(
        "trainer's peak without",
        plain["peak"],
        f"{plain['peak'] / 1e6:9.1f} MB",
        "plain_peak_bytes",
    )
    report.add("trainer's peak with", ours["peak"], f"{ours['peak'] / 1e6:9.1f} MB", "peak_bytes")
    report.target("memory_dir over the state", arena / state, 2.02)
    report.target("growth of the trainer's peak over the state", growth / state, 0.02)
    report.target("agent's resident size at rest, MB", resident / 1e6, 100)
    report.target("agent's CPU at rest, share of a core", rest_cpu, 0.005)
    return report


def _agent_process(address: str) -> psutil.Process:
    socket = address.removeprefix("unix:")
    for process in psutil.Process().children():
        if socket in process.cmdline():
            return process
    raise SystemExit(f"no agent of {socket}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--role", choices=("train",), help=argparse.SUPPRESS)
    parser.add_argument("--agent", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    if options.role:
        train(options.agent, options.parameters)
    else:
        run(options.parameters).print()


if __name__ == "__main__":
    main()
