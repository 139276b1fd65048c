"""Time to bring the state back into a live process, beside dcp.load from tmpfs and a memcpy.

``python -m benchmarks.restore [--rounds N] [--parameters P]``. A trainer snapshots and is killed.
Then each round is a fresh process that has built its model and optimizer state (as dcp.load
demands) and times ``client.restore()`` from memory, digests checked by the agent and again on
the way; ``dcp.load`` of the same state from tmpfs; and a warm memcpy of as many bytes.
"""

import argparse
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

from benchmarks.report import Report
from benchmarks.workload import PARAMETERS, Training, agent, scratch

JOB = "bench"


def save(address: str, directory: Path, parameters: int) -> None:
    """As a process: take the snapshot that the rounds restore, save it for dcp too, and die."""
    import torch.distributed.checkpoint as dcp

    import everstep

    training = Training.start(parameters)
    client = everstep.connect(JOB, agent=address)
    client.attach(model=training.model, optimizer=training.optimizer)
    assert client.snapshot(1).wait()
    dcp.save(_nested(training), checkpoint_id=str(directory / "dcp"), no_dist=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _nested(training: Training) -> dict[str, object]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(training.model, training.optimizer)
    return {"model": model, "optimizer": optimizer}


def load(address: str, directory: Path, parameters: int) -> None:
    """As a process: one round; prints its times as JSON."""
    import torch.distributed.checkpoint as dcp

    import everstep
    from benchmarks.stall import memcpy_seconds

    training = Training.start(parameters)
    client = everstep.connect(JOB, agent=address)
    client.attach(model=training.model, optimizer=training.optimizer)
    times = {}
    begun = time.perf_counter()
    assert client.restore(levels=("memory",)) == 1
    times["ours"] = time.perf_counter() - begun
    times["memcpy"] = statistics.median(memcpy_seconds(training.state_bytes, 3))
    nested = _nested(training)
    begun = time.perf_counter()
    dcp.load(nested, checkpoint_id=str(directory / "dcp"), no_dist=True)
    times["dcp"] = time.perf_counter() - begun
    begun = time.perf_counter()
    client.rewind()
    times["rewind"] = time.perf_counter() - begun
    print(json.dumps({**times, "state": training.state_bytes}))
    client.close(timeout=0)


def run(rounds: int, parameters: int) -> Report:
    """Measure; the table's rows are medians over the rounds."""
    report = Report("restore")
    samples: dict[str, list[float]] = {}
    with agent() as address, scratch("/dev/shm") as directory:

        def child(role: str) -> str:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.restore"]
            command += ["--role", role, "--agent", address]
            command += ["--directory", str(directory), "--parameters", str(parameters)]
            return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout

        child("save")
        for _ in range(rounds):
            for name, value in json.loads(child("load")).items():
                samples.setdefault(name, []).append(value)
    state = samples["state"][0]
    report.add("state", state, f"{state / 1e6:9.1f} MB", "state_bytes")
    ours = report.seconds("restore() from memory, fresh process", samples["ours"], "restore")
    report.seconds("rewind() in the live process", samples["rewind"], "rewind")
    dcp = report.seconds("dcp.load from tmpfs", samples["dcp"], "dcp_load")
    copy = report.seconds("warm memcpy of the state", samples["memcpy"], "memcpy")
    report.target("restore over memcpy", ours / copy, 2.5)
    report.target("dcp.load over restore", dcp / ours, 1.5, at_least=True)
    return report


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--role", choices=("save", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--agent", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    if options.role:
        role = {"save": save, "load": load}[options.role]
        role(options.agent, options.directory, options.parameters)
    else:
        run(options.rounds, options.parameters).print()


if __name__ == "__main__":
    main()
