"""Checkpoints of torch.distributed.checkpoint over Everstep: one process."""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

import everstep
import everstep.dcp
from everstep.dcp import EverstepReader, EverstepWriter
from everstep.proto.errors import EverstepError

from .conftest import AgentProcess
from .dcp_states import State, bits, reason, zeroed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is ")


@pytest.fixture
def writer(shared_agent: AgentProcess, job: str) -> Iterator[EverstepWriter]:
    made = EverstepWriter(job, agent=shared_agent.address)
    yield made
    made.close()


@pytest.fixture
def reader(writer: EverstepWriter, shared_agent: AgentProcess, job: str) -> EverstepReader:
    return EverstepReader(job, agent=shared_agent.address)


def nested() -> State:
    torch.manual_seed(0)
    return {
        "model": {"w": torch.randn(3, 5), "b": torch.randn(()), "deep": {"er": torch.randn(2)}},
        "half": [torch.randn(7).bfloat16(), {"inner": torch.arange(4)}],
        "empty": torch.zeros(0, 3),
        "step": 3,
        "names": ["a", "b"],
        "opt": {"groups": [{"lr": 0.1, "params": [0, 1]}]},
        "slash/and~tilde.dot": torch.ones(2),
    }


def dtypes() -> State:
    torch.manual_seed(1)
    names = ["float64", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "complex64"]
    found: State = {name: torch.randn(5, 3).to(getattr(torch, name)) for name in names}
    found["float8"] = torch.randn(9).to(torch.float8_e4m3fn)
    found["uint16"] = torch.arange(5, dtype=torch.int32).to(torch.uint16)
    return found


def memories() -> State:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "tied": base,
        "again": base,
        "view": base[1:3],
        "flipped": base.t(),
        "strided": base[:, ::2],
        "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "parameter": nn.Parameter(torch.ones(3)),
    }


def objects() -> State:
    return {
        "none": None,
        "text": "x" * 200_000,
        "bytes": bytes(range(256)) * 1000,
        "tuple": (1, (2, "three")),
        "ordered": OrderedDict(b=1, a=[1, 2]),
        "stream": 1.5,
    }


@pytest.mark.parametrize("make", [nested, dtypes, memories, objects, dict])
def test_loaded_as_from_a_directory(
    make: Callable[[], State], writer: EverstepWriter, reader: EverstepReader, tmp_path: Path
) -> None:
    """DCP's own storage says what a load is to give, and how a checkpoint is described."""
    state = make()
    dcp.save(state, checkpoint_id=tmp_path / "step-7")
    dcp.save(state, storage_writer=writer, checkpoint_id=tmp_path / "step-7")
    expected, loaded = zeroed(state), zeroed(state)
    dcp.load(expected, checkpoint_id=tmp_path / "step-7")
    dcp.load(loaded, storage_reader=reader)
    assert bits(loaded) == bits(expected)
    assert bits(loaded) == bits(state)
    theirs = dcp.FileSystemReader(tmp_path / "step-7").read_metadata()
    assert described(reader.read_metadata()) == described(theirs)


def described(metadata: Metadata) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks = [(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks]
            found[name] = (entry.properties.dtype, tuple(entry.size), chunks)
        else:
            found[name] = "bytes"
    return {"entries": found, "paths": metadata.planner_data, "version": metadata.version}


def test_tensors_may_change_once_save_returns(
    writer: EverstepWriter, reader: EverstepReader
) -> None:
    state, loaded = {"w": torch.ones(300_000)}, {"w": torch.zeros(300_000)}
    dcp.save(state, storage_writer=writer)
    state["w"].fill_(2)
    dcp.load(loaded, storage_reader=reader)
    assert bits(loaded["w"]) == bits(torch.ones(300_000))


def test_steps_go_on_from_the_last(
    writer: EverstepWriter, reader: EverstepReader, shared_agent: AgentProcess, job: str
) -> None:
    for expected in (1, 2):
        dcp.save({"w": torch.full((2,), expected)}, storage_writer=writer)
        assert writer.checkpoint_id == f"step-{expected}"
    dcp.save({"w": torch.full((2,), 40)}, storage_writer=writer, checkpoint_id="run/step-40")
    loaded = {"w": torch.zeros(2, dtype=torch.int64)}
    dcp.load(loaded, storage_reader=reader)
    assert loaded["w"].tolist() == [40, 40]
    # As after a restart: nothing is known here any more.
    everstep.dcp.close(job)
    dcp.save({"w": torch.full((2,), 41)}, storage_writer=writer)
    assert writer.checkpoint_id == "step-41"
    assert shared_agent.steps_in_memory(job)[-1] == 41


def test_a_step_is_never_overwritten(
    writer: EverstepWriter, reader: EverstepReader, shared_agent: AgentProcess
) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=writer, checkpoint_id=5)

    def again(step: int) -> Callable[[], object]:
        state = {"w": torch.zeros(2)}
        return lambda: dcp.save(state, storage_writer=writer, checkpoint_id=step)

    assert "step 5 of job" in reason(again(5))
    assert "step 5 was captured already" in reason(again(4))
    loaded = {"w": torch.zeros(2)}
    dcp.load(loaded, storage_reader=reader)
    assert loaded["w"].tolist() == [1, 1]


def test_an_older_step_is_gone_back_to(writer: EverstepWriter, reader: EverstepReader) -> None:
    for step in (10, 20):
        dcp.save({"w": torch.tensor(step)}, storage_writer=writer, checkpoint_id=step)
    loaded = {"w": torch.tensor(0)}
    for step in (10, 20, 10):
        dcp.load(loaded, storage_reader=reader, checkpoint_id=f"step-{step}")
        assert loaded["w"].item() == step
        assert reader.checkpoint_id == f"step-{step}"
    # What follows is saved from there, and is the newest.
    dcp.save({"w": torch.tensor(11)}, storage_writer=writer, checkpoint_id=11)
    reader.reset()
    dcp.load(loaded, storage_reader=reader)
    assert (loaded["w"].item(), reader.checkpoint_id) == (11, "step-11")


def test_what_does_not_fit_is_refused(writer: EverstepWriter, reader: EverstepReader) -> None:
    saved = {"w": torch.ones(2, 3), "b": torch.ones(2), "step": 4}
    dcp.save(saved, storage_writer=writer, checkpoint_id=1)

    def load(state: State, **options: Any) -> Callable[[], object]:
        return lambda: dcp.load(state, storage_reader=reader, **options)

    partial = {"w": torch.zeros(2, 3), "other": torch.zeros(1)}
    assert "Missing key in checkpoint state_dict: other" in reason(load(partial))
    assert partial["w"].count_nonzero() == 0
    assert "Size mismatch" in reason(load({"w": torch.zeros(3, 2)}))
    assert "step 9 is at no level" in reason(load({"w": torch.zeros(2, 3)}, checkpoint_id=9))
    reader.reset()
    dcp.load(
        partial, storage_reader=reader, planner=dcp.DefaultLoadPlanner(allow_partial_load=True)
    )
    assert bits(partial["w"]) == bits(saved["w"])
    # Fewer keys than were saved are DCP's way of loading a part; another dtype is converted.
    half = {"b": torch.zeros(2, dtype=torch.float64)}
    dcp.load(half, storage_reader=reader)
    assert half["b"].tolist() == [1, 1]


def test_nothing_saved_is_an_error(reader: EverstepReader) -> None:
    attempt = {"w": torch.zeros(2)}
    assert "no snapshot was ever committed" in reason(
        lambda: dcp.load(attempt, storage_reader=reader)
    )


def test_a_state_of_another_form_each_time(writer: EverstepWriter, reader: EverstepReader) -> None:
    forms: list[State] = [
        {"w": torch.ones(4), "text": "a"},
        {"v": torch.ones(2, 2), "w": torch.ones(5)},
        {"text": "b" * 10_000},
        {"w": torch.full((4,), 2.0), "text": "c"},
    ]
    for state in forms:
        dcp.save(state, storage_writer=writer)
        loaded = zeroed(state)
        dcp.load(loaded, storage_reader=reader)
        assert bits(loaded) == bits(state)
        assert set(reader.read_metadata().state_dict_metadata) == set(state)


def test_saved_with_cached_plans(writer: EverstepWriter, reader: EverstepReader) -> None:
    planner_type = type("Cached", (dcp.DefaultSavePlanner,), {})
    for step in (1, 2, 3):
        state = {"w": torch.full((3,), float(step)), "step": step}
        dcp.save(state, storage_writer=writer, planner=planner_type(enable_plan_caching=True))
        assert writer.checkpoint_id == f"step-{step}"
        loaded = zeroed(state)
        dcp.load(loaded, storage_reader=reader)
        assert bits(loaded) == bits(state)


def test_the_state_dict_is_rebuilt_without_one(
    writer: EverstepWriter, reader: EverstepReader
) -> None:
    """As `dcp_to_torch_save` does."""
    state = nested()
    dcp.save(state, storage_writer=writer)
    rebuilt: State = {}
    _load_state_dict(rebuilt, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    assert bits(rebuilt) == bits(state)
    part: State = {}
    planner = _EmptyStateDictLoadPlanner(keys={"model"})
    _load_state_dict(part, reader, planner=planner, no_dist=True)
    assert bits(part) == bits({"model": state["model"]})


class Trap:
    """Says when it is unpickled."""

    sprung = 0

    def __setstate__(self, state: object) -> None:
        Trap.sprung += 1

    def __getstate__(self) -> object:
        return {"a": 1}


def test_pickles_are_opened_by_the_planner_alone(
    writer: EverstepWriter, reader: EverstepReader
) -> None:
    Trap.sprung = 0
    dcp.save({"trap": Trap(), "w": torch.ones(1)}, storage_writer=writer)
    reader.read_metadata()
    dcp.load({"w": torch.zeros(1)}, storage_reader=reader)
    assert Trap.sprung == 0
    dcp.load({"trap": None}, storage_reader=reader)
    assert Trap.sprung == 1


class Application:
    """A model and its optimizer as DCP's `Stateful`, as torchtitan and DCP's tutorial do it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def train(self, steps: int) -> None:
        for step in range(steps):
            batch = torch.full((3, 4), step + 1.0) + torch.arange(3).unsqueeze(1)
            self.model(batch).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state_dict(self) -> State:
        of_model, of_optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": of_model, "optim": of_optimizer}

    def load_state_dict(self, state: State) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )


@pytest.mark.parametrize("asynchronously", [False, True])
def test_training_goes_on_bit_for_bit(
    asynchronously: bool, writer: EverstepWriter, reader: EverstepReader, job: str
) -> None:
    first = Application(0)
    first.train(3)
    if asynchronously:
        future = dcp.async_save({"app": first}, storage_writer=writer, no_dist=True)
        first.train(2)
        future.result()
    else:
        dcp.save({"app": first}, storage_writer=writer)
        first.train(2)
    everstep.dcp.close(job)
    second = Application(1)
    second.train(1)
    dcp.load({"app": second}, storage_reader=reader)
    second.train(2)
    assert bits(second.state_dict()) == bits(first.state_dict())


def test_asynchronous_saves_follow_each_other(
    writer: EverstepWriter, reader: EverstepReader
) -> None:
    state = {"w": torch.zeros(1000), "step": 0}
    for step in (1, 2, 3):
        state["w"].fill_(step)
        state["step"] = step
        dcp.async_save(state, storage_writer=writer, checkpoint_id=step, no_dist=True).result()
        state["w"].fill_(-1)
    loaded = zeroed(state)
    dcp.load(loaded, storage_reader=reader)
    assert (loaded["step"], loaded["w"].unique().tolist()) == (3, [3])


def test_snapshots_of_the_client_are_read(
    reader: EverstepReader, shared_agent: AgentProcess, job: str
) -> None:
    trained = Application(0)
    trained.train(2)
    extra = {"mean": torch.ones(3), "words": ["a", "b"], "inner": {"n": 1}, "more": [torch.ones(1)]}
    with everstep.connect(job, agent=shared_agent.address, rank=0, world=1) as client:
        client.attach(model=trained.model, optimizer=trained.optimizer, extra=extra)
        assert client.snapshot(8, force=True).wait()
    other = Application(1)
    other.train(1)
    of_model, of_optimizer = get_state_dict(other.model, other.optimizer)
    state = {"model": of_model, "optimizer": {"state": of_optimizer["state"]}}
    state["extra"] = zeroed(extra)
    state["lr"] = 1
    for key in ("lr", "betas"):
        state[f"optimizer.param_groups.0.{key}"] = None
    del state["lr"]
    dcp.load(state, storage_reader=reader, checkpoint_id=8)
    expected = trained.state_dict()
    assert bits(state["model"]) == bits(expected["model"])
    assert bits(state["optimizer"]["state"]) == bits(expected["optim"]["state"])
    assert bits(state["extra"]) == bits(extra)
    assert state["optimizer.param_groups.0.betas"] == (0.9, 0.999)


def test_levels(shared_agent: AgentProcess, job: str) -> None:
    writer = EverstepWriter(job, agent=shared_agent.address, level="nvme")
    dcp.save({"w": torch.ones(1)}, storage_writer=writer, checkpoint_id=3)
    assert shared_agent.steps_on_nvme(job) == [3]
    writer.level = "parity"
    attempt = {"w": torch.ones(1)}
    assert "no level 'parity'" in reason(lambda: dcp.save(attempt, storage_writer=writer))
    writer.close()


def test_one_process_has_one_session_of_a_job(
    writer: EverstepWriter, shared_agent: AgentProcess, job: str
) -> None:
    dcp.save({"w": torch.ones(1)}, storage_writer=writer)
    other = EverstepReader(job, agent=shared_agent.address, nvme_interval=7)
    assert "has job" in reason(lambda: dcp.load({"w": torch.ones(1)}, storage_reader=other))
    writer.close()
    dcp.load({"w": torch.ones(1)}, storage_reader=other)


def test_a_checkpoint_of_each_rank_alone_is_refused(writer: EverstepWriter) -> None:
    def save() -> None:
        dcp.save({"w": torch.ones(1)}, storage_writer=writer, use_collectives=False)

    with pytest.raises(EverstepError, match="use_collectives=False"):
        save()


def test_the_bytes_that_planners_are_given(writer: EverstepWriter, reader: EverstepReader) -> None:
    """A planner that serialises in its own way gets back what it gave, to the byte."""

    class Saving(dcp.DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            return io.BytesIO(object) if isinstance(object, bytes) else object

    class Loading(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            self.original_state_dict[read_item.dest_index.fqn] = value.read()

    state = {"empty": b"", "one": b"1", "many": bytes(range(256)) * 20}
    dcp.save(state, storage_writer=writer, planner=Saving())
    loaded = copy.copy(dict.fromkeys(state))
    dcp.load(loaded, storage_reader=reader, planner=Loading())
    assert loaded == state
