"""One trainer of the demo, as a process of its own: ``python -m everstep.client.demo.trainer``.

Owns the training loop that the demo kills. Promises that everything it does follows from the seed,
so that two runs that end at all end with the same bits. Without `--interval` it trains without
Everstep: that is the run which the others are compared with.
"""

import argparse
import random
from pathlib import Path

import numpy
import torch

from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.client.demo.corpus import Batches, standard_library
from everstep.client.demo.diary import Diary
from everstep.client.demo.digest import digest_of
from everstep.client.demo.model import ByteGPT, Shape

JOB = "demo"
THREADS = 2
_BATCH = 8
_LEARNING_RATE = 1e-3


class Training:
    """The model and all that changes while it trains."""

    def __init__(self, steps: int, seed: int) -> None:
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        shape = Shape()
        self.model = ByteGPT(shape)
        self.batches = Batches(standard_library(), shape.window, _BATCH)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self) -> float:
        """One update; returns the loss before it."""
        loss = self.model.loss(*self.batches.draw())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def attach_to(self, client: Client) -> None:
        """Name everything that a restart needs; random generators go along by themselves."""
        client.attach(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            batches=self.batches,
        )

    def digest(self) -> str:
        """A digest of every byte of the model's and the optimizer's state."""
        return digest_of(self.model.state_dict(), self.optimizer.state_dict())


def train(directory: Path, name: str, steps: int, seed: int, interval: int) -> None:
    """Train from where the newest snapshot is, or from the start, to the end.

    Args:
        directory: For the diary.
        name: The run's name there; its next process goes on with the same.
        steps: How many in all.
        seed: Of everything random.
        interval: Steps between snapshots; 0 trains without Everstep.
    """
    diary = Diary(directory / f"{name}.jsonl")
    diary.note("imported")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    training = Training(steps, seed)
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    diary.note("built", parameters=parameters)
    if interval:
        _train_with_snapshots(training, diary, steps, interval)
    else:
        for step in range(steps):
            diary.note("step", step=step + 1, loss=training.step())
    diary.note("ended", digest=training.digest())


def _train_with_snapshots(training: Training, diary: Diary, steps: int, interval: int) -> None:
    client = connect(JOB, interval)
    training.attach_to(client)
    diary.note("connected")
    start = client.restore()
    diary.note("restored", step=start, levels=client.restored_from, rejected=client.rejected)
    captured = 0
    for step in range(start or 0, steps):
        loss = training.step()
        diary.note("step", step=step + 1, loss=loss)
        if captured:
            # The fence has been passed by now, so this is all that the snapshot has cost.
            diary.note("stall", step=captured, stall_s=client.stats.last_stall_s)
        captured = 0 if client.snapshot(step + 1).skipped else step + 1
    client.close()
    diary.note(
        "closed",
        taken=client.stats.taken,
        committed=client.stats.committed,
        dropped=client.stats.dropped,
        skipped=client.stats.skipped,
    )


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(prog="python -m everstep.client.demo.trainer")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--interval", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
