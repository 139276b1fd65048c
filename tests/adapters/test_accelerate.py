"""A loop over an Accelerator goes on from a snapshot as if it had never stopped."""

import math
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import everstep
from everstep.proto.errors import Refused, StateMismatch

from .conftest import Killed, digest

accelerate = pytest.importorskip("accelerate", reason="pip install everstep[accelerate]")

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = 9
ACCUMULATED = 2
PER_EPOCH = math.ceil(BATCHES / ACCUMULATED)
EPOCHS = 3


class Losses:
    """Something that a program registers with its Accelerator."""

    def __init__(self) -> None:
        self.total = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total = state["total"]


class Run:
    def __init__(self, job: str | None, interval: int = 1, width: int = 8) -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            gradient_accumulation_steps=ACCUMULATED,
            dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=True),
        )
        accelerate.utils.set_seed(3)
        data = TensorDataset(torch.randn(2 * BATCHES, 4))
        model = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 1)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        loader = DataLoader(data, batch_size=2, shuffle=True)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        self.losses = Losses()
        self.accelerator.register_for_checkpointing(self.losses)
        self.start = 0
        self.checkpointer = None
        if job is not None:
            self.checkpointer = everstep.AccelerateCheckpointer(
                self.accelerator, job, interval, on_busy="wait"
            )
            self.start = self.checkpointer.load_state() or 0

    def train(self, killed_at: int | None = None) -> "Run":
        step = self.start
        for epoch in range(step // PER_EPOCH, EPOCHS):
            self.loader.set_epoch(epoch)
            batches = self.loader
            if self.checkpointer is not None and epoch == self.start // PER_EPOCH:
                skipped = self.start % PER_EPOCH * ACCUMULATED
                batches = self.checkpointer.skip_first_batches(self.loader, skipped)
            for (x,) in batches:
                if step == killed_at:
                    raise Killed
                with self.accelerator.accumulate(self.model):
                    loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
                    self.losses.total += loss.item()
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    step += 1
                    if self.checkpointer is not None:
                        self.checkpointer.save_state(step)
                elif self.checkpointer is not None:
                    assert self.checkpointer.save_state(step).skipped
        if self.checkpointer is not None:
            self.checkpointer.end_training()
        return self

    def outcome(self) -> tuple[Any, ...]:
        weights = digest(self.model, self.optimizer.optimizer)
        rate = self.scheduler.get_last_lr()
        return weights, rate, self.losses.total, torch.get_rng_state().tolist()


def killed(job: str, step: int, interval: int = 1) -> None:
    run = Run(job, interval)
    with pytest.raises(Killed):
        run.train(step)
    assert run.checkpointer is not None
    run.checkpointer.client.close(timeout=0)


@pytest.fixture(scope="module")
def expected() -> tuple[Any, ...]:
    return Run(None).train().outcome()


@pytest.mark.parametrize("step", [1, 4, PER_EPOCH, PER_EPOCH + 2, 2 * PER_EPOCH])
def test_goes_on_bit_for_bit(step: int, job: str, expected: tuple[Any, ...]) -> None:
    killed(job, step)
    run = Run(job)
    assert run.start == step
    assert run.train().outcome() == expected


def test_the_count_of_accumulated_batches_comes_back(job: str) -> None:
    killed(job, 4)
    run = Run(job)
    assert run.accelerator.step == 4 * ACCUMULATED
    run.checkpointer.client.close(timeout=0)


def test_killed_twice_with_an_interval(job: str, expected: tuple[Any, ...]) -> None:
    killed(job, 5, interval=3)
    killed(job, 11, interval=3)
    run = Run(job, interval=3)
    assert run.start == 9
    assert run.train().outcome() == expected


def test_another_model_is_refused(job: str) -> None:
    killed(job, 2)
    with pytest.raises(StateMismatch):
        Run(job, width=9)


def test_sharded_state_is_refused(job: str) -> None:
    accelerator = Run(None).accelerator
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    with pytest.raises(Refused, match="FSDP"):
        everstep.AccelerateCheckpointer(accelerator, job)
