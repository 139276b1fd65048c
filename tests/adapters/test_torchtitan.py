"""torchtitan's components go on from a snapshot, in a loop like its Trainer's.

The Trainer itself wants an accelerator: it is not run here. Model, optimizers, schedulers, data
loader and the checkpoint manager's base class are torchtitan's own.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

import everstep
from everstep.proto.errors import Refused, StateMismatch

from .conftest import Killed, digest

_REASON = "pip install everstep[torchtitan]"
pytest.importorskip("torchtitan", reason=_REASON)
dataloader = pytest.importorskip("torchtitan.components.dataloader", reason=_REASON)
optimizing = pytest.importorskip("torchtitan.components.optimizer", reason=_REASON)
base = pytest.importorskip("torchtitan.components.checkpointer.base", reason=_REASON)

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 12


class Numbers(IterableDataset):  # type: ignore[type-arg]
    """Goes on where it was, as torchtitan's data sets do."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.position += 1
            yield torch.sin(torch.arange(4.0) * self.position)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Run:
    """What torchtitan's Trainer does with its checkpointer, in the same order."""

    def __init__(self, job: str | None, width: int = 8, **options: Any) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 1)
        )
        group = optimizing.ParamGroupConfig(
            pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2}
        )
        settings = optimizing.OptimizersContainer.Config(
            param_groups=[group], implementation="for-loop"
        )
        self.optimizers = settings.build(model_parts=[self.model])
        self.lr_schedulers = optimizing.LRSchedulersContainer.Config(warmup_steps=4).build(
            optimizers=self.optimizers, training_steps=STEPS
        )
        self.loader = dataloader.ParallelAwareDataloader(Numbers(), 0, 1, batch_size=3)
        self.step = self.ntokens_seen = 0
        config = everstep.TorchTitanCheckpointManager.Config(
            enable=job is not None,
            job=job or "none",
            **{"interval": 1, "on_busy": "wait"} | options,
        )
        self.checkpointer = config.build(
            dataloader=self.loader,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            states={"train_state": self},
            sd_adapter=None,
            base_folder="",
        )

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]

    def train(self, killed_at: int | None = None, load_step: int = -1) -> "Run":
        self.loaded = self.checkpointer.load(step=load_step)
        self.began = self.step
        batches = iter(self.loader)
        while self.step < STEPS:
            if self.step == killed_at:
                raise Killed
            self.step += 1
            self.optimizers.zero_grad()
            x = next(batches)
            self.ntokens_seen += x.numel()
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            self.checkpointer.maybe_wait_for_staging()
            self.optimizers.step()
            self.lr_schedulers.step()
            self.checkpointer.save(self.step, last_step=self.step == STEPS)
        self.checkpointer.maybe_wait_for_saving()
        self.checkpointer.close()
        return self

    def outcome(self) -> tuple[Any, ...]:
        return (
            digest(self.model, *self.optimizers),
            self.lr_schedulers.state_dict(),
            self.loader.dataset.position,
            self.state_dict(),
            torch.get_rng_state().tolist(),
        )


def killed(job: str, step: int, **options: Any) -> None:
    run = Run(job, **options)
    with pytest.raises(Killed):
        run.train(step)
    run.checkpointer.client.close(timeout=0)


@pytest.fixture(scope="module")
def expected() -> tuple[Any, ...]:
    return Run(None).train().outcome()


@pytest.mark.parametrize("step", [1, 7])
def test_goes_on_bit_for_bit(step: int, job: str, expected: tuple[Any, ...]) -> None:
    killed(job, step)
    run = Run(job).train()
    assert (run.loaded, run.began) == (True, step)
    assert run.outcome() == expected


def test_killed_twice_with_an_interval(job: str, expected: tuple[Any, ...]) -> None:
    killed(job, 5, interval=3)
    killed(job, 10, interval=3)
    run = Run(job, interval=3).train()
    assert run.began == 9
    assert run.outcome() == expected


def test_the_first_and_the_last_step_at_any_interval(job: str) -> None:
    killed(job, 3, interval=5, enable_first_step_checkpoint=True)
    run = Run(job, interval=5).train()
    assert run.began == 1
    again = Run(job, interval=5).train()
    assert again.began == STEPS


def test_a_named_step_and_no_saves(job: str, expected: tuple[Any, ...]) -> None:
    killed(job, 7, interval=2)
    run = Run(job, load_only=True).train(load_step=4)
    assert run.began == 4
    assert run.outcome() == expected
    assert run.checkpointer.client.stats.taken == 0


def test_nothing_to_load(job: str) -> None:
    run = Run(job)
    assert run.checkpointer.load() is False
    run.checkpointer.close()


def test_another_model_is_refused(job: str) -> None:
    killed(job, 2)
    run = Run(job, width=9)
    with pytest.raises(StateMismatch):
        run.checkpointer.load()
    run.checkpointer.close()


def test_what_would_silently_not_happen_is_refused(job: str) -> None:
    with pytest.raises(Refused, match="initial_load_path"):
        Run(job, initial_load_path="/data/llama")


def test_it_is_a_checkpoint_manager_of_torchtitan() -> None:
    assert issubclass(everstep.TorchTitanCheckpointManager, base.BaseCheckpointManager)
