"""What a snapshot costs the trainer, beside torch.save and dcp.async_save.

``python -m benchmarks.stall [--rounds N]``. Each round trains 8 steps four times: without
snapshots, with one of ours, with ``torch.save`` to tmpfs and with ``dcp.async_save`` to tmpfs (its
default stager, the previous save awaited first, as its users must). The stall is the time that
the training thread spends in the call, and for us at the fence; the extra time is that of the 8
steps, minus that of the 8 steps without.
"""

import argparse
import ctypes
import logging
import statistics
import time
import warnings
from pathlib import Path

import torch

from benchmarks.report import Report
from benchmarks.workload import PARAMETERS, Training, agent, scratch

STEPS = 8


class Peers:
    """The other ways to save, as their users would call them."""

    def __init__(self, training: Training, directory: Path) -> None:
        import torch.distributed as distributed

        self.training = training
        self.directory = directory
        self.pending: object | None = None
        store = distributed.HashStore()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def torch_save(self) -> float:
        """Stall of one torch.save."""
        begun = time.perf_counter()
        torch.save(self.training.state(), self.directory / "state.pt")
        return time.perf_counter() - begun

    def async_save(self) -> float:
        """Stall of one dcp.async_save."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        begun = time.perf_counter()
        model, optimizer = get_state_dict(self.training.model, self.training.optimizer)
        self.pending = dcp.async_save(
            {"model": model, "optimizer": optimizer}, checkpoint_id=str(self.directory / "dcp")
        )
        return time.perf_counter() - begun

    def settle(self) -> None:
        """Wait for what is still being written."""
        if self.pending is not None:
            self.pending.result()  # type: ignore[attr-defined]
            self.pending = None


def memcpy_seconds(size: int, rounds: int) -> list[float]:
    """Times of a plain warm copy of so many bytes."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.ones(size, dtype=torch.uint8)
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        ctypes.memmove(target.data_ptr(), source.data_ptr(), size)
        times.append(time.perf_counter() - begun)
    return times


def run(rounds: int, parameters: int) -> Report:
    """Measure; the table's rows are medians over the rounds."""
    import everstep

    report = Report("stall")
    training = Training.start(parameters)
    report.add(
        "state", training.state_bytes, f"{training.state_bytes / 1e6:9.1f} MB", "state_bytes"
    )
    plain: list[float] = []
    stalls: dict[str, list[float]] = {"ours": [], "torch.save": [], "dcp.async_save": []}
    extra: dict[str, list[float]] = {"ours": [], "torch.save": [], "dcp.async_save": []}
    with agent() as address, scratch("/dev/shm") as directory:
        peers = Peers(training, directory)
        client = everstep.connect("bench", interval=1, agent=address, nvme_interval=10**9)
        client.attach(model=training.model, optimizer=training.optimizer)
        count = 0

        def ours() -> float:
            nonlocal count
            count += 1
            assert not client.snapshot(count).skipped
            return 0.0

        methods = {"ours": ours, "torch.save": peers.torch_save, "dcp.async_save": peers.async_save}
        for round_ in range(rounds + 1):
            baseline = training.steps(STEPS)
            for name, save in methods.items():
                stall: list[float] = []

                def after(step: int, save: object = save, stall: list[float] = stall) -> None:
                    if step == 0:
                        stall.append(save())  # type: ignore[operator]

                taken = training.steps(STEPS, after)
                peers.settle()
                again = training.steps(STEPS)
                if round_ == 0:
                    continue  # first calls allocate
                stalls[name].append(client.stats.last_stall_s if name == "ours" else stall[0])
                extra[name].append(taken - (baseline + again) / 2)
                plain.append(again)
                baseline = again
        idle, copies = idle_seal(client, count, training.state_bytes, rounds)
        client.close(timeout=0)
    _rows(report, plain, stalls, extra, idle, copies)
    return report


def idle_seal(
    client: object, count: int, size: int, rounds: int
) -> tuple[list[float], list[float]]:
    """With the trainer waiting: snapshot() to committed, and a memcpy beside each."""
    times, copies = [], []
    for index in range(rounds + 1):
        begun = time.perf_counter()
        handle = client.snapshot(count + 1 + index)  # type: ignore[attr-defined]
        assert handle.wait(), handle
        taken = time.perf_counter() - begun
        copy = statistics.median(memcpy_seconds(size, 3))
        if index:
            times.append(taken)
            copies.append(copy)
    return times, copies


def _rows(
    report: Report,
    plain: list[float],
    stalls: dict[str, list[float]],
    extra: dict[str, list[float]],
    idle: list[float],
    copies: list[float],
) -> None:
    report.seconds(f"{STEPS} steps without snapshots", plain, "plain")
    stall = {n: report.seconds(f"stall, {n}", s, f"stall_{n}") for n, s in stalls.items()}
    cost = {n: report.seconds(f"extra time, {n}", s, f"extra_{n}") for n, s in extra.items()}
    sealed = report.seconds("committed with the trainer idle", idle, "idle_commit")
    copied = report.seconds("warm memcpy of the state", copies, "memcpy")
    report.target("stall over torch.save's", stall["ours"] / stall["torch.save"], 1 / 20)
    report.target("stall over dcp.async_save's", stall["ours"] / stall["dcp.async_save"], 1 / 4)
    report.target("extra time over torch.save's", cost["ours"] / cost["torch.save"], 1 / 4)
    report.target("extra time over dcp.async_save's", cost["ours"] / cost["dcp.async_save"], 1 / 5)
    report.target("idle commit over memcpy", sealed / copied, 1.5)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    warnings.simplefilter("ignore")
    logging.getLogger("everstep").setLevel(logging.ERROR)
    options = parser.parse_args()
    run(options.rounds, options.parameters).print()


if __name__ == "__main__":
    main()
