"""State in codes on meshes: parts of codes go with parts of parameters, and come back on others."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from everstep.client import optim

from . import meshes
from .conftest import AgentProcess
from .meshes import WORLD_LIMIT, Job, Plan, Reference

SAVED = [Plan(2, 2, 1), Plan(4, 1, 1), Plan(2, 1, 1, 2)]
OTHERS = [Plan(1), Plan(3), Plan(2, 2, 2)]
LONG = pytest.mark.long
CODED = ["int8", "4bit", "fp8", "compress"]
# The steps of torch's own optimizer on meshes take torch a quarter of a minute.
CASES = [
    pytest.param(
        codec, saved, id=f"{codec}-{saved}", marks=LONG if codec == "compress" and at else []
    )
    for codec in CODED
    for at, saved in enumerate(SAVED)
]


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_LIMIT)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def coded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meshes whose models are larger, and have their states in codes."""

    def adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
        if request.param == "compress":
            torchs = torch.optim.AdamW(parameters, lr=lr, foreach=False)
            return optim.compress(torchs, block=64, min_elements=50)
        return optim.AdamW(
            parameters, lr=lr, codec=request.param, block=64, min_elements=50, kernels="reference"
        )

    sizes = {
        "0.column.weight": (22, 33),
        "0.column.bias": (22,),
        "0.row.weight": (13, 256),
        "0.norm": (13,),
        "1.column.weight": (5, 4, 40),
        "1.row.weight": (33, 128),
        "1.scale": (),
        "1.norm": (3,),
    }
    monkeypatch.setattr(meshes, "SIZES", sizes)
    monkeypatch.setattr(meshes, "optim", SimpleNamespace(AdamW=adamw))


@pytest.mark.parametrize(("coded", "saved"), CASES, indirect=["coded"])
def test_every_mesh_restores_the_codes_of_another(
    agent_process: AgentProcess, coded: None, saved: Plan
) -> None:
    agent = agent_process.address
    with Job(saved, "job", agent=agent) as first:
        first.train(2)
        assert first.whole() == Reference(2).state
        first.snapshot(2)
    for plan in [saved, *OTHERS]:
        with Job(plan, "job", zeros=True, agent=agent) as job:
            assert job.restore(partial=plan.stages > 1) == [2] * plan.world, plan
            assert job.whole() == Reference(2).state, plan
            job.train(1)
            assert job.whole() == Reference(3).state, plan
