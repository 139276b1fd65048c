"""What a snapshot of an int8 AdamW run costs beside one of an fp32 run.

``python -m benchmarks.optim_capture [--rounds N] [--parameters P]``. The same model twice, with
torch's fused AdamW and with `everstep.optim.AdamW(codec="int8")`, each with a job of its own.
In turns each is snapshot while its trainer waits: from the call of ``snapshot()`` until it is
committed. Beside that, the bytes of the two shards, and a restore of each into the live objects.
"""

import argparse
import time
from typing import Any

import torch

from benchmarks.report import Report
from benchmarks.workload import Training, agent

PARAMETERS = 150_000_000
SHARE = 0.52


class Run:
    """One of the two, attached.

    Args:
        name: Of the job.
        optimizer: Made of the model's parameters; None for torch's fused AdamW.
        address: The agent's.
        parameters: Of the model.
    """

    def __init__(self, name: str, optimizer: Any, address: str, parameters: int) -> None:
        import everstep

        self.training = Training.start(parameters)
        if optimizer is not None:
            self.training.optimizer = optimizer(self.training.model.parameters())
            self.training.steps(2)
        self.client = everstep.connect(name, agent=address, nvme_interval=10**9)
        self.client.attach(model=self.training.model, optimizer=self.training.optimizer)
        self.step = 0
        self.captured: list[float] = []
        self.restored: list[float] = []

    def snapshot(self) -> float:
        """Seconds from the call to the commit."""
        self.training.steps(1)
        self.step += 1
        begun = time.perf_counter()
        handle = self.client.snapshot(self.step)
        assert handle.wait(), handle
        return time.perf_counter() - begun

    def rewind(self) -> float:
        """Seconds of a restore into the live objects."""
        begun = time.perf_counter()
        assert self.client.rewind() == self.step
        return time.perf_counter() - begun


def run(rounds: int, parameters: int) -> Report:
    """Measure; the table's rows are medians over the rounds."""
    from everstep import optim

    def int8(weights: Any) -> torch.optim.Optimizer:
        return optim.AdamW(weights, lr=1e-4, codec="int8")

    report = Report("optim_capture")
    with agent() as address:
        runs = {
            "fp32": Run("fp32", None, address, parameters),
            "int8": Run("int8", int8, address, parameters),
        }
        for round_ in range(rounds + 2):
            for one in runs.values():
                taken = one.snapshot()
                if round_ > 1:  # the first reserve and touch the arena
                    one.captured.append(taken)
        for _ in range(rounds):
            for one in runs.values():
                one.restored.append(one.rewind())
        for one in runs.values():
            one.client.close(timeout=0)
    sizes = {name: one.training.state_bytes for name, one in runs.items()}
    times: dict[str, dict[str, float]] = {"captured": {}, "restored": {}}
    for name, one in runs.items():
        report.add(f"{name}: state", sizes[name], f"{sizes[name] / 1e6:9.1f} MB", f"{name}_bytes")
        for what, found in times.items():
            samples = getattr(one, what)
            found[name] = report.seconds(f"{name}: {what}", samples, f"{name}_{what}")
    report.target("int8 over fp32, bytes", sizes["int8"] / sizes["fp32"], SHARE)
    for what, found in times.items():
        report.add(
            f"int8 over fp32, {what}",
            ratio := found["int8"] / found["fp32"],
            f"{ratio:9.3f}",
            f"{what}_ratio",
        )
    return report


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    options = parser.parse_args()
    run(options.rounds, options.parameters).print()


if __name__ == "__main__":
    main()
