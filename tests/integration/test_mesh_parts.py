"""Tensors that lie on a part of the ranks' mesh only: what the other dimensions have of them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import everstep
from everstep.proto.errors import StateMismatch
from everstep.snapshot.layout import decode

from .conftest import AgentProcess
from .meshes import WORLD_LIMIT, Sharded, dealt, update

WHOLE = {"split": torch.randn(10, 301), "norm": torch.randn(7, 4000)}
Build = Callable[[int], dict[str, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_LIMIT)
    yield
    torch.distributed.destroy_process_group()


@dataclass
class Rank:
    """A rank's live objects and its client."""

    model: Sharded
    optimizer: torch.optim.Optimizer
    client: everstep.Client

    def local(self, name: str, key: str = "") -> torch.Tensor:
        parameter = self.model.get_parameter(name)
        found = self.optimizer.state[parameter][key] if key else parameter
        return found._local_tensor if isinstance(found, DTensor) else found


@contextmanager
def job(agent: AgentProcess, world: int, build: Build, *, trained: int = 0) -> Iterator[list[Rank]]:
    found = []
    for number in range(world):
        model = Sharded(build(number))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        client = everstep.connect(job="job", rank=number, world=world, agent=agent.address)
        client.attach(model=model, optimizer=optimizer)
        found.append(Rank(model, optimizer, client))
        for _ in range(trained):
            update(optimizer)
    yield found
    every(found, lambda rank: rank.client.close(timeout=0))


def every(ranks: list[Rank], work: Callable[[Rank], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(work, ranks))


def save(ranks: list[Rank], step: int) -> None:
    handles = every(ranks, lambda rank: rank.client.snapshot(step, force=True))
    assert all(handle.wait() for handle in handles), handles


def mesh_of(rank: int, *shape: int, first: int = 0) -> DeviceMesh:
    names = ("shard", "tensor")[: len(shape)]
    numbers = torch.arange(first, first + torch.Size(shape).numel()).reshape(shape)
    mesh = DeviceMesh("cpu", numbers, mesh_dim_names=names, _rank=rank)
    mesh._thread_id = rank
    return mesh


def over_tensor_parallelism(zeros: bool, *shape: int) -> Build:
    """As fully_shard makes it of a model that parallelize_module has taken a part of."""

    def build(rank: int) -> dict[str, torch.Tensor]:
        mesh = mesh_of(rank, *shape)
        column = mesh.mesh[:, mesh.get_coordinate()[1]]
        part = DeviceMesh("cpu", column, mesh_dim_names=("shard",), _rank=rank)
        part._thread_id, part._root_mesh = rank, mesh  # as mesh["shard"] is, on that rank
        values = {n: torch.zeros_like(t) if zeros else t for n, t in WHOLE.items()}
        return {
            "split": dealt(values["split"], mesh, [Shard(0), Shard(1)]),
            "norm": dealt(values["norm"], part, [Shard(0)]),
        }

    return build


def expected(steps: int) -> dict[str, torch.Tensor]:
    model = Sharded({name: tensor.clone() for name, tensor in WHOLE.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        update(optimizer)
    states = {
        f"{n}/{k}": v for n, p in model.named_parameters() for k, v in optimizer.state[p].items()
    }
    return {**{n: p.detach() for n, p in model.named_parameters()}, **states}


def check_norm(ranks: list[Rank], shards: int, tensors: int, steps: int) -> None:
    """Every rank has its rows, whatever its place along the dimension that the norm is not on."""
    wanted = expected(steps)
    for key in ("", "exp_avg", "exp_avg_sq"):
        rows = wanted["norm" + (f"/{key}" if key else "")].chunk(shards)
        for number, rank in enumerate(ranks):
            assert torch.equal(rank.local("norm", key), rows[number // tensors])
    assert {rank.local("norm", "step").item() for rank in ranks} == {steps}


def test_what_tensor_parallelism_leaves_alone(agent_process: AgentProcess) -> None:
    """It is on all tensor ranks, stored once, and goes to any other mesh."""
    with job(agent_process, 4, over_tensor_parallelism(False, 2, 2), trained=2) as ranks:
        save(ranks, 2)
    held = agent_process.memory.records("job")
    layouts = [decode(agent_process.memory.layout("job", x.record.layout_id), "") for x in held]
    stored = sum(
        x.held_bytes for layout in layouts for x in layout.leaves if x.tensor == "model/norm"
    )
    assert stored == WHOLE["norm"].nbytes
    for shape in [(2, 2), (1, 2), (3, 1), (1, 1)]:
        zeros = over_tensor_parallelism(True, *shape)
        with job(agent_process, shape[0] * shape[1], zeros) as ranks:
            assert set(every(ranks, lambda rank: rank.client.restore())) == {2}
            check_norm(ranks, *shape, steps=2)
            every(ranks, lambda rank: update(rank.optimizer))
            check_norm(ranks, *shape, steps=3)


def stages(zeros: bool) -> Build:
    """Two stages whose layers have the same names, each on two ranks that hold the same."""

    def build(rank: int) -> dict[str, torch.Tensor]:
        mesh = mesh_of(rank, 2, first=rank // 2 * 2)
        value = torch.full((300, 1000), 0.0 if zeros else 1.0 + rank // 2)
        return {"layer": DTensor.from_local(value, mesh, [Replicate()], run_check=False)}

    return build


def test_stages_with_the_same_names_are_not_merged(agent_process: AgentProcess) -> None:
    with job(agent_process, 4, stages(False), trained=1) as ranks:
        save(ranks, 1)
        saved = [rank.local("layer").clone() for rank in ranks]
        assert not torch.equal(saved[0], saved[2])
    with job(agent_process, 4, stages(True)) as ranks:
        assert every(ranks, lambda rank: rank.client.restore()) == [1] * 4
        for rank, tensor in zip(ranks, saved, strict=True):
            assert torch.equal(rank.local("layer"), tensor)
    with job(agent_process, 2, stages(True)) as ranks:
        for rank in ranks:
            with pytest.raises(StateMismatch) as raised:
                rank.client.restore()
            assert "model/layer" in raised.value.divergent
            assert not rank.local("layer").any()
