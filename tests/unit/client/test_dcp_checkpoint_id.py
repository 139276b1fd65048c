"""What a checkpoint_id means, who a process is, and that errors reach the other ranks."""

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.planner import LoadPlan

from everstep.client.dcp.checkpoint_id import names_step, step_of
from everstep.client.dcp.connection import Address
from everstep.client.dcp.ranks import address_of, check_rank, check_world
from everstep.dcp import EverstepReader, EverstepWriter
from everstep.proto.errors import EverstepError, NothingRecoverable, Refused, ShardCorrupt


@pytest.mark.parametrize(
    ("checkpoint_id", "step"),
    [
        (0, 0),
        (7, 7),
        ("7", 7),
        ("step-7", 7),
        ("step_12", 12),
        ("runs/gpt/checkpoint-500", 500),
        ("/tmp/out/step-0042/", 42),
        (Path("iter.3"), 3),
        ("epoch9", 9),
        ((1 << 63) - 1, (1 << 63) - 1),
    ],
)
def test_a_checkpoint_id_names_a_step(checkpoint_id: int | str | Path, step: int) -> None:
    assert step_of(checkpoint_id) == step
    assert names_step(checkpoint_id)
    assert EverstepWriter.validate_checkpoint_id(checkpoint_id)
    assert EverstepReader.validate_checkpoint_id(checkpoint_id)


@pytest.mark.parametrize(
    "checkpoint_id",
    [
        "",
        "last",
        "step-",
        "step--7",
        "7b",
        "llama-7b",
        "pytorch_model_fsdp_0",
        "step-7/model",
        "step-٣",
        -1,
        1 << 63,
        "9999999999999999999",
        True,
    ],
)
def test_what_names_no_step_is_refused(checkpoint_id: int | str) -> None:
    assert not names_step(checkpoint_id)
    with pytest.raises(Refused, match="names no step"):
        EverstepWriter("job").reset(checkpoint_id)
    with pytest.raises(Refused, match="names no step"):
        EverstepReader("job", checkpoint_id=checkpoint_id)


def test_ids_of_other_types_name_nothing() -> None:
    assert not names_step(None)
    assert not names_step(7.0)


def test_nothing_is_connected_before_the_first_save() -> None:
    assert EverstepWriter("job").checkpoint_id is None
    assert EverstepReader("job").checkpoint_id is None
    assert EverstepReader("job", checkpoint_id="x/step-3").checkpoint_id == "step-3"
    with pytest.raises(Refused, match="there is no level 'disk'"):
        EverstepWriter("job", level="disk")
    with pytest.raises(Refused, match="comes first"):
        EverstepReader("job").prepare_local_plan(None)  # type: ignore[arg-type]


def test_a_process_is_who_it_is_to_torch_distributed() -> None:
    assert not torch.distributed.is_initialized()
    assert address_of("job", None, None, None) == Address("job", None, 0, 1)
    assert address_of("job", "unix:/a", 1, 2) == Address("job", "unix:/a", 1, 2)
    with pytest.raises(Refused, match="both"):
        address_of("job", None, 1, None)
    check_rank(Address("job", None, 1, 2), 1)
    check_rank(Address("job", None, 1, 2), None)
    with pytest.raises(Refused, match="and rank 1 of 2 to job"):
        check_rank(Address("job", None, 1, 2), 0)
    check_world(Address("job", None, 1, 2), 2)
    with pytest.raises(Refused, match="there are 1"):
        check_world(Address("job", None, 0, 2), 1)


def test_ranks_that_would_load_different_snapshots_are_told() -> None:
    reader = EverstepReader("job", rank=0, world=2)
    plans = [LoadPlan([], storage_data=(3, 7)), LoadPlan([], storage_data=(3, 7))]
    assert reader.prepare_global_plan(plans) == plans
    plans[1].storage_data = (3, 8)
    with pytest.raises(Refused, match="step 7 of launch 3, step 8 of launch 3"):
        reader.prepare_global_plan(plans)


def test_a_writer_can_be_sent_to_the_process_that_saves() -> None:
    writer = EverstepWriter("job", level="nvme", agent="unix:/a", nvme_interval=3)
    writer.reset("step-5")
    sent = pickle.loads(pickle.dumps(writer))
    assert (sent.checkpoint_id, sent.level) == ("step-5", "nvme")


@pytest.mark.parametrize(
    "error",
    [NothingRecoverable("job", ("a", "b")), ShardCorrupt("here", (1, 2)), Refused("no")],
)
def test_errors_reach_the_other_ranks(error: EverstepError) -> None:
    """DCP gathers what went wrong on each rank; what cannot be sent would end in a hang."""
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is type(error)
    assert str(sent) == str(error)
    assert {k: v for k, v in vars(sent).items() if k != "rejected"} == {
        k: v for k, v in vars(error).items() if k != "rejected"
    }
