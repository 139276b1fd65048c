"""Lightning's Trainer goes on from a snapshot as if it had never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import everstep
from everstep.proto.errors import StateMismatch

from .conftest import Killed, digest

pl = pytest.importorskip("lightning.pytorch", reason="pip install everstep[lightning]")

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = 10
EPOCHS = 3


class Module(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 1)
        )

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        (x,) = batch
        return (self.layers(x) - x.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        torch.rand(3)  # as a sampling metric would

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "epoch"}]


class Kill(pl.Callback):  # type: ignore[misc]
    """Ends the fit after this many batches; it comes after Everstep's own."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batches:
            raise Killed


def fit(where: Path, *callbacks: Any, loader: Any = StatefulDataLoader, **options: Any) -> Any:
    pl.seed_everything(5)
    data = TensorDataset(torch.randn(2 * BATCHES, 4))
    module = Module()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=where,
        **options,
    )
    trainer.fit(module, loader(data, batch_size=2, shuffle=True), DataLoader(data, batch_size=10))
    return module, trainer


def outcome(module: Any, trainer: Any) -> tuple[Any, ...]:
    rates = [config.scheduler.get_last_lr() for config in trainer.lr_scheduler_configs]
    return (
        digest(module, *trainer.optimizers),
        trainer.global_step,
        trainer.current_epoch,
        rates,
        torch.get_rng_state().tolist(),
    )


def everstep_callback(job: str, interval: int = 1, **options: Any) -> Any:
    return everstep.LightningCallback(job, interval, on_busy="wait", **options)


def killed(where: Path, job: str, batches: int, interval: int = 1, **options: Any) -> None:
    with pytest.raises(Killed):
        fit(where, everstep_callback(job, interval), Kill(batches), **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating": {"accumulate_grad_batches": 3},
    "validating": {"val_check_interval": 5},
    "validating seldom": {"check_val_every_n_epoch": 2},
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    where = tmp_path_factory.mktemp("alone")
    return {name: outcome(*fit(where, **options)) for name, options in OPTIONS.items()}


@pytest.mark.parametrize(
    ("name", "batches", "step"),
    [
        ("plain", 7, 7),
        ("plain", BATCHES, BATCHES),
        ("plain", BATCHES + 1, BATCHES + 1),
        ("plain", 2 * BATCHES + 4, 2 * BATCHES + 4),
        ("accumulating", 7, 2),
        ("accumulating", BATCHES + 1, 4),
        ("accumulating", BATCHES + 5, 5),
        ("validating", 5, 5),
        ("validating", 8, 8),
        ("validating", BATCHES, BATCHES),
        ("validating seldom", BATCHES, BATCHES),
        ("validating seldom", 2 * BATCHES, 2 * BATCHES),
    ],
)
def test_goes_on_bit_for_bit(
    name: str, batches: int, step: int, job: str, tmp_path: Path, expected: dict[str, Any]
) -> None:
    killed(tmp_path, job, batches, **OPTIONS[name])
    callback = everstep_callback(job)
    went_on = outcome(*fit(tmp_path, callback, **OPTIONS[name]))
    assert callback.resumed == step
    assert went_on == expected[name]


@pytest.mark.parametrize("name", ["plain", "validating seldom"])
def test_a_loader_without_a_state_goes_on_between_epochs(
    name: str, job: str, tmp_path: Path
) -> None:
    options = OPTIONS[name] | {"loader": DataLoader}
    killed(tmp_path, job, BATCHES, **options)
    callback = everstep_callback(job)
    went_on = outcome(*fit(tmp_path, callback, **options))
    assert callback.resumed == BATCHES
    assert went_on == outcome(*fit(tmp_path, **options))


def test_killed_twice_with_an_interval(job: str, tmp_path: Path, expected: dict[str, Any]) -> None:
    killed(tmp_path, job, 8, interval=3)
    killed(tmp_path, job, 23, interval=3)
    callback = everstep_callback(job, interval=3)
    assert outcome(*fit(tmp_path, callback)) == expected["plain"]
    assert callback.resumed == 21


def test_a_finished_fit_stays_finished(job: str, tmp_path: Path, expected: dict[str, Any]) -> None:
    """The end is captured, whatever the interval."""
    fit(tmp_path, everstep_callback(job, interval=7))
    again = everstep_callback(job, interval=7)
    assert outcome(*fit(tmp_path, again))[:2] == expected["plain"][:2]
    assert again.resumed == EPOCHS * BATCHES


def test_other_callbacks_keep_their_state(job: str, tmp_path: Path) -> None:
    def stopping() -> Any:
        return pl.callbacks.EarlyStopping("missing", patience=9, strict=False)

    with pytest.raises(Killed):
        early = stopping()
        early.wait_count = 4
        fit(tmp_path, everstep_callback(job), early, Kill(3))
    early = stopping()
    with pytest.raises(Killed):
        fit(tmp_path, everstep_callback(job), early, Kill(5))
    assert early.wait_count == 4


def test_a_checkpoint_that_was_named_wins(job: str, tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, everstep_callback(job))
    trainer.save_checkpoint(tmp_path / "named.ckpt")
    callback = everstep_callback(job)
    pl.seed_everything(5)
    again = pl.Trainer(max_epochs=EPOCHS, callbacks=[callback], logger=False, accelerator="cpu")
    loader = DataLoader(TensorDataset(torch.randn(4, 4)))
    again.fit(Module(), loader, ckpt_path=tmp_path / "named.ckpt")
    assert callback.resumed is None


def test_another_model_is_refused(job: str, tmp_path: Path) -> None:
    killed(tmp_path, job, 3)
    trainer = pl.Trainer(
        callbacks=[everstep_callback(job)], logger=False, accelerator="cpu", max_epochs=1
    )
    with pytest.raises(StateMismatch):
        trainer.fit(Module(width=9), DataLoader(TensorDataset(torch.randn(4, 4))))
