"""The Trainer of transformers goes on from a snapshot as if it had never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch

import everstep
from everstep.proto.errors import Refused

from .conftest import Killed, digest

transformers = pytest.importorskip("transformers", reason="pip install everstep[huggingface]")
pytest.importorskip("accelerate", reason="pip install everstep[huggingface]")

pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = 38
BATCH = 2
ACCUMULATED = 2
PER_EPOCH = 10  # 19 batches: the last step of an epoch has one batch only
EPOCHS = 3
LOGGED = 2


class Kill(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends the run when this step has begun, after Everstep had its turn."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def trainer(where: Path, *callbacks: Any, **arguments: Any) -> Any:
    transformers.set_seed(7)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=False
    )
    words = torch.randint(0, 32, (EXAMPLES, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in words]
    chosen = {
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "num_train_epochs": EPOCHS,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "logging_steps": LOGGED,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    return transformers.Trainer(
        model=transformers.GPT2LMHeadModel(config),
        args=transformers.TrainingArguments(output_dir=str(where), **chosen),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=list(callbacks),
    )


def outcome(run: Any) -> tuple[str, int, float, list[dict[str, float]]]:
    """Of a finished run; of its log what does not tell the time."""
    kept = [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_s" not in key}
        for entry in run.state.log_history[:-1]
    ]
    optimizer = run.optimizer.optimizer
    return digest(run.model, optimizer), run.state.global_step, run.state.epoch, kept


def everstep_callback(job: str, interval: int = 1) -> Any:
    return everstep.HuggingFaceCallback(job, interval, on_busy="wait")


def killed(where: Path, job: str, step: int, interval: int = 1) -> None:
    callback = everstep_callback(job, interval)
    run = trainer(where, callback, Kill(step))
    with pytest.raises(Killed):
        run.train(resume_from_checkpoint=callback.resume_from_checkpoint())
    callback.client.close(timeout=0)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = trainer(tmp_path_factory.mktemp("alone"))
    run.train()
    return outcome(run)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(7, id="within an epoch"),
        pytest.param(8, id="after an evaluation, which draws random numbers"),
        pytest.param(PER_EPOCH, id="between epochs"),
        pytest.param(PER_EPOCH + 6, id="in the second epoch"),
    ],
)
def test_goes_on_bit_for_bit(step: int, job: str, tmp_path: Path, expected: Any) -> None:
    killed(tmp_path, job, step)
    torch.manual_seed(1234)
    callback = everstep_callback(job)
    run = trainer(tmp_path, callback)
    path = callback.resume_from_checkpoint()
    assert path is not None
    run.train(resume_from_checkpoint=path)
    assert callback.resumed == run._initial_global_step == step
    weights, ended, epoch, logged = outcome(run)
    assert (weights, ended, epoch) == expected[:3]
    # What was summed up for the next log is lost, as it is with the Trainer's own checkpoints.
    unsure = step + 1 if step % LOGGED else None
    assert [e for e in logged if e["step"] != unsure] == [
        e for e in expected[3] if e["step"] != unsure
    ]
    assert not Path(path).exists()


def test_killed_twice_with_an_interval(job: str, tmp_path: Path, expected: Any) -> None:
    killed(tmp_path, job, 8, interval=3)
    killed(tmp_path, job, 20, interval=3)
    callback = everstep_callback(job, interval=3)
    run = trainer(tmp_path, callback)
    run.train(resume_from_checkpoint=callback.resume_from_checkpoint())
    assert run._initial_global_step == 18
    weights, step, epoch, _ = outcome(run)
    assert (weights, step, epoch) == expected[:3]


def test_a_finished_run_stays_finished(job: str, tmp_path: Path, expected: Any) -> None:
    """The last step is captured, whatever the interval."""
    first = everstep_callback(job, interval=7)
    run = trainer(tmp_path, first)
    run.train(resume_from_checkpoint=first.resume_from_checkpoint())
    assert first.client is None
    again = everstep_callback(job, interval=7)
    run = trainer(tmp_path, again)
    run.train(resume_from_checkpoint=again.resume_from_checkpoint())
    assert run._initial_global_step == EPOCHS * PER_EPOCH
    assert outcome(run)[:2] == expected[:2]


def test_an_older_step_on_request(job: str, tmp_path: Path, expected: Any) -> None:
    killed(tmp_path, job, 5, interval=2)
    callback = everstep_callback(job)
    run = trainer(tmp_path, callback)
    run.train(resume_from_checkpoint=callback.resume_from_checkpoint(to=4))
    assert run._initial_global_step == 4
    assert outcome(run)[0] == expected[0]


def test_nothing_to_resume_from(job: str) -> None:
    callback = everstep_callback(job)
    assert callback.resume_from_checkpoint() is None
    callback.client.close()


def test_a_run_with_snapshots_is_not_begun_anew(job: str, tmp_path: Path) -> None:
    killed(tmp_path, job, 3)
    callback = everstep_callback(job)
    run = trainer(tmp_path, callback)
    with pytest.raises(Refused, match="would begin at step 0"):
        run.train()
    callback.client.close()


def test_snapshots_of_another_program_are_refused(job: str) -> None:
    with everstep.connect(job, on_busy="wait") as client:
        client.attach(model=torch.nn.Linear(2, 2))
        assert client.snapshot(1).wait()
    callback = everstep_callback(job)
    with pytest.raises(Refused, match="not a Trainer's"):
        callback.resume_from_checkpoint()
    callback.client.close()
