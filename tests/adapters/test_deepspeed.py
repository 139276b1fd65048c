"""DeepSpeed loads from a snapshot what it would have loaded from its files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import everstep
from everstep.proto.errors import NothingRecoverable, Refused

from .conftest import digest

deepspeed = pytest.importorskip("deepspeed", reason="pip install everstep[deepspeed]")

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 8
CONFIGS: dict[str, dict[str, Any]] = {
    "stage 0": {"zero_optimization": {"stage": 0}},
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 2 in bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
}


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    # Compiled at first use, for several ranks on one CPU; there is one here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**variables, "RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        deepspeed.init_distributed(
            dist_backend="gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
        )
        yield
        torch.distributed.destroy_process_group()


def engine_of(config: str) -> Any:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        **CONFIGS[config],
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings
    )
    return engine


def train(engine: Any, until: int) -> Any:
    while engine.global_steps < until:
        for _ in range(engine.gradient_accumulation_steps()):
            x = torch.randn(2, 4).to(next(engine.parameters()).dtype)
            loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
            engine.backward(loss)
            engine.step()
    return engine


def outcome(engine: Any) -> tuple[Any, ...]:
    """Of an engine: the weights, the fp32 copies and moments, what comes next."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    masters = torch.nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])
    return (
        digest(engine.module, optimizer),
        digest(masters),
        engine.lr_scheduler.get_last_lr(),
        engine.global_steps,
        torch.get_rng_state().tolist(),
    )


def installed(engine: Any, job: str) -> Any:
    checkpoints = everstep.DeepSpeedCheckpointEngine(job)
    checkpoints.install(engine)
    return checkpoints


def saved(config: str, job: str, where: Path, *steps: int) -> None:
    """A run that is killed after it has saved these steps."""
    engine = engine_of(config)
    checkpoints = installed(engine, job)
    for step in steps:
        train(engine, step)
        engine.save_checkpoint(str(where), client_state={"seen": [step, "words"]})
    train(engine, steps[-1] + 1)
    checkpoints.client.close(timeout=0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("lost", [False, True], ids=["", "on a machine without the directory"])
def test_goes_on_bit_for_bit(config: str, lost: bool, job: str, tmp_path: Path) -> None:
    expected = outcome(train(engine_of(config), STEPS))
    where = tmp_path / "first"
    saved(config, job, where, 2, 5)
    if lost:
        where = tmp_path / "second"
    engine = engine_of(config)
    checkpoints = installed(engine, job)
    torch.manual_seed(99)
    assert checkpoints.resume(str(where)) == "global_step5"
    path, state = engine.load_checkpoint(str(where))
    assert Path(path).parent == where / "global_step5"
    assert (engine.global_steps, state["seen"]) == (5, [5, "words"])
    assert outcome(train(engine, STEPS)) == expected
    checkpoints.cleanup()


def test_no_state_is_in_the_files(job: str, tmp_path: Path) -> None:
    saved("stage 1", job, tmp_path, 2)
    files = list((tmp_path / "global_step2").iterdir())
    assert len(files) == 2
    assert all(file.stat().st_size < 200 for file in files)


def test_an_older_tag_by_name(job: str, tmp_path: Path) -> None:
    """Two snapshots are in memory: the one before the newest may be, too."""
    saved("stage 0", job, tmp_path, 2, 5)
    engine = engine_of("stage 0")
    checkpoints = installed(engine, job)
    engine.load_checkpoint(str(tmp_path), tag="global_step5")
    assert engine.global_steps == 5
    checkpoints.cleanup()


def test_a_tag_that_does_not_say_the_step(job: str, tmp_path: Path) -> None:
    engine = train(engine_of("stage 1"), 3)
    checkpoints = installed(engine, job)
    engine.save_checkpoint(str(tmp_path), tag="best")
    checkpoints.client.close(timeout=0)
    engine = engine_of("stage 1")
    checkpoints = installed(engine, job)
    assert checkpoints.resume(str(tmp_path)) == "best"
    engine.load_checkpoint(str(tmp_path))
    assert engine.global_steps == 3
    checkpoints.cleanup()


def test_a_stub_whose_snapshot_is_another_is_not_loaded(job: str, tmp_path: Path) -> None:
    """Its run was given up, and the next one has captured the same step under another tag."""
    saved("stage 0", job, tmp_path, 2)
    for stub in (tmp_path / "global_step2").iterdir():
        stub.write_text(stub.read_text().replace("global_step2", "given-up"))
    engine = engine_of("stage 0")
    checkpoints = installed(engine, job)
    with pytest.raises(NothingRecoverable, match="given-up"):
        engine.load_checkpoint(str(tmp_path))
    checkpoints.cleanup()


def test_back_within_the_run(job: str, tmp_path: Path) -> None:
    engine = engine_of("stage 1")
    checkpoints = installed(engine, job)
    train(engine, 3)
    engine.save_checkpoint(str(tmp_path))
    first = outcome(train(engine, 6))
    engine.load_checkpoint(str(tmp_path))
    assert engine.global_steps == 3
    assert outcome(train(engine, 6)) == first
    checkpoints.cleanup()


def test_nothing_to_resume_from(job: str, tmp_path: Path) -> None:
    checkpoints = everstep.DeepSpeedCheckpointEngine(job)
    assert checkpoints.resume(str(tmp_path)) is None
    checkpoints.cleanup()


def test_files_of_deepspeeds_own_are_read(job: str, tmp_path: Path) -> None:
    engine = train(engine_of("stage 1"), 3)
    engine.save_checkpoint(str(tmp_path))
    expected = outcome(engine)[:4]
    again = engine_of("stage 1")
    checkpoints = installed(again, job)
    again.load_checkpoint(str(tmp_path))
    assert outcome(again)[:4] == expected
    assert checkpoints.client is None


def test_stubs_of_another_job_are_refused(job: str, tmp_path: Path) -> None:
    saved("stage 0", job, tmp_path, 2)
    engine = engine_of("stage 0")
    checkpoints = installed(engine, job + "-other")
    with pytest.raises(Refused, match="belongs to job"):
        engine.load_checkpoint(str(tmp_path))
    checkpoints.cleanup()


def test_what_cannot_be_stored_without_pickle_is_refused(job: str, tmp_path: Path) -> None:
    engine = train(engine_of("stage 0"), 1)
    checkpoints = installed(engine, job)
    with pytest.raises(everstep.errors.NotCapturable, match="unfit"):
        engine.save_checkpoint(str(tmp_path), client_state={"unfit": object()})
    checkpoints.client.close(timeout=0)
