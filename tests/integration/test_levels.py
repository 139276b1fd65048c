"""NVMe when memory is gone, damage that is found and gone around, files that anyone can read."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn, optim

import everstep
from everstep.proto.errors import NothingRecoverable

from .conftest import AgentProcess, eventually
from .states import exact, states

Connect = Callable[..., everstep.Client]
Objects = dict[str, Any]


def make(seed: int) -> Objects:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    return {"model": model, "optimizer": optim.AdamW(model.parameters())}


def one_step(objects: Objects) -> None:
    optimizer = objects["optimizer"]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def train(client: everstep.Client, objects: Objects, *steps: int, level: str = "memory") -> Objects:
    """One step and one snapshot for each; returns the exact state at each of them."""
    seen = {}
    for step in steps:
        one_step(objects)
        seen[step] = states(objects)
        assert client.snapshot(step).wait(level)
    return seen


def test_restore_from_nvme_after_memory_is_lost(
    start_agent: Callable[..., AgentProcess], job: str
) -> None:
    agent = start_agent()
    objects = make(1)
    client = everstep.connect(job, agent=agent.address)
    client.attach(**objects)
    expected = train(client, objects, 1, 2, level="nvme")
    train(client, objects, 3)  # in memory alone
    # Killed, not asked to end: step 3 is lost with the memory, as in a power failure.
    agent.kill()
    shutil.rmtree(agent.memory_dir / job)
    agent.start()
    client.close(timeout=0)

    other = make(2)
    client = everstep.connect(job, agent=agent.address)
    client.attach(**other)
    assert client.restore() == 2
    assert client.restored_from == ("nvme",)
    assert states(other) == expected[2]
    train(client, other, 3)
    client.close(timeout=0)


@pytest.mark.parametrize("where", ["payload", "header"])
def test_a_flipped_bit_in_memory_is_gone_around(
    connect: Connect, shared_agent: AgentProcess, job: str, where: str
) -> None:
    objects = make(1)
    client = connect()
    client.attach(**objects)
    expected = train(client, objects, 1, 2, level="nvme")
    expected |= train(client, objects, 3)
    shared_agent.flip(job, 3, from_end=1 if where == "payload" else image_bytes(shared_agent, job))

    other = make(2)
    client = connect()
    client.attach(**other)
    assert client.restore() == 2  # still in memory's other slot, or on NVMe
    assert states(other) == expected[2]
    assert len(client.rejected) == 1
    assert client.rejected[0].startswith("step 3, rank 0, memory: ")
    assert "digest" in client.rejected[0]
    train(client, other, 3)


def image_bytes(agent: AgentProcess, job: str) -> int:
    return int(agent.memory.records(job)[0].record.image_bytes)


def test_a_bad_copy_in_memory_and_a_good_one_on_nvme(
    connect: Connect, shared_agent: AgentProcess, job: str
) -> None:
    objects = make(1)
    client = connect()
    client.attach(**objects)
    expected = train(client, objects, 1, level="nvme")
    shared_agent.flip(job, 1)
    other = make(2)
    client = connect()
    client.attach(**other)
    assert client.restore() == 1
    assert client.restored_from == ("nvme",)
    assert len(client.rejected) == 1
    assert states(other) == expected[1]


def test_a_bad_copy_on_nvme_is_not_needed_or_reported(
    connect: Connect, shared_agent: AgentProcess, job: str
) -> None:
    objects = make(1)
    client = connect()
    client.attach(**objects)
    expected = train(client, objects, 1, 2, level="nvme")
    flip_file(shared_agent, job, 2)
    other = make(2)
    client = connect()
    client.attach(**other)
    assert client.restore(levels=("nvme",)) == 1
    assert states(other) == expected[1]
    assert client.rejected[0].startswith("step 2, rank 0, nvme: ")


def flip_file(agent: AgentProcess, job: str, step: int) -> None:
    path = shard_file(agent, job, step)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def shard_file(agent: AgentProcess, job: str, step: int) -> Path:
    assert agent.nvme_dir is not None
    return agent.nvme_dir / job / f"step-{step:012d}" / "rank-00000.safetensors"


def test_nothing_whole_is_an_error_and_nothing_is_touched(
    connect: Connect, shared_agent: AgentProcess, job: str
) -> None:
    objects = make(1)
    client = connect()
    client.attach(**objects)
    train(client, objects, 1)
    shared_agent.flip(job, 1)
    other = make(2)
    before = states(other)
    client = connect()
    client.attach(**other)
    with pytest.raises(NothingRecoverable, match="step 1, rank 0, memory") as raised:
        client.restore()
    assert raised.value.job == job
    assert states(other) == before

    # The launch after that one does not take the job for a new one.
    client = connect()
    client.attach(**other)
    with pytest.raises(NothingRecoverable, match="step 1"):
        client.restore()
    assert states(other) == before
    assert client.snapshot(7).wait()
    client = connect()
    client.attach(**other)
    assert client.restore() == 7


def test_a_bad_copy_is_found_when_the_agent_starts_again(agent_process: AgentProcess) -> None:
    """Adopted arenas are verified before anybody asks."""
    objects = make(1)
    client = everstep.connect("job", agent=agent_process.address)
    client.attach(**objects)
    expected = train(client, objects, 1, 2)
    client.close(timeout=0)
    agent_process.kill()
    agent_process.flip("job", 2)
    agent_process.start()
    eventually(lambda: "is damaged" in agent_process.log.read_text(), "the damage in the log")
    other = make(2)
    client = everstep.connect("job", agent=agent_process.address)
    client.attach(**other)
    assert client.restore() == 1
    assert states(other) == expected[1]
    client.close(timeout=0)


def test_a_shard_opens_with_safetensors(
    connect: Connect, shared_agent: AgentProcess, job: str
) -> None:
    """Without Everstep, on NVMe and in the arena alike."""
    objects = make(1)
    objects["odd"] = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "fp8": torch.ones(9).to(torch.float8_e5m2),
    }
    client = connect()
    client.attach(**objects)
    train(client, objects, 1, level="nvme")
    model = objects["model"].state_dict()
    (held,) = shared_agent.memory.records(job)
    image = held.arena.path.read_bytes()[held.slot * held.arena.slot_bytes :]
    copy = shard_file(shared_agent, job, 1).parent / "copy.safetensors"
    copy.write_bytes(image[: held.record.image_bytes])
    for path in (shard_file(shared_agent, job, 1), copy):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            assert {"model/0.weight", "optimizer/state/model.1.bias/exp_avg_sq"} <= names
            for name in model:
                assert exact(file.get_tensor(f"model/{name}")) == exact(model[name])
            for name, tensor in objects["odd"].items():
                assert exact(file.get_tensor(f"odd/{name}")) == exact(tensor)


def test_only_the_newest_are_kept_on_nvme(
    connect: Connect, shared_agent: AgentProcess, job: str
) -> None:
    objects = make(1)
    client = connect()
    client.attach(**objects)
    train(client, objects, 1, 2, 3, 4, level="nvme")
    # Older ones are removed after the newest was told of.
    eventually(lambda: shared_agent.steps_on_nvme(job) == [3, 4], "the newest two are left")


def test_a_persisted_step_is_younger_than_its_predecessors(
    connect: Connect, shared_agent: AgentProcess, job: str
) -> None:
    """An incarnation that repeats a step supersedes what the one before it wrote."""
    objects = make(1)
    client = connect()
    client.attach(**objects)
    train(client, objects, 1, 2, level="nvme")
    assert client.rewind(to=1) == 1
    one_step(objects)
    one_step(objects)
    expected = states(objects)
    begun = time.time()
    assert client.snapshot(2).wait("nvme")
    assert shared_agent.steps_on_nvme(job) == [1, 2]
    assert shared_agent.nvme.commits(job)[-1].committed_unix_s >= begun - 1
    other = make(2)
    client = connect()
    client.attach(**other)
    assert client.restore(levels=("nvme",)) == 2
    assert states(other) == expected
