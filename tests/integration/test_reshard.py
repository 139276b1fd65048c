"""State of any mesh comes back in any other, from memory: global tensors equal as bytes."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from .conftest import AgentProcess
from .meshes import WORLD_LIMIT, Job, Plan, Reference

SAVED = [Plan(2, 2, 1), Plan(4, 1, 1), Plan(1, 2, 2), Plan(2, 1, 1, 2)]
OTHERS = [Plan(1), Plan(3), Plan(8), Plan(2, 2, 2), Plan(1, 4, 1), Plan(2, 2, 1, 2)]


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_LIMIT)
    yield
    torch.distributed.destroy_process_group()


def options(agent: AgentProcess) -> dict[str, str]:
    return {"agent": agent.address}


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_every_mesh_restores_what_another_has_saved(
    agent_process: AgentProcess, saved: Plan
) -> None:
    with Job(saved, "job", **options(agent_process)) as first:
        first.train(2)
        assert first.whole() == Reference(2).state
        first.snapshot(2)
    for plan in [saved, *(p for p in [*SAVED, *OTHERS] if p != saved)]:
        with Job(plan, "job", zeros=True, **options(agent_process)) as job:
            partial = plan.stages > 1
            assert job.restore(partial=partial) == [2] * plan.world, plan
            assert job.whole() == Reference(2).state, plan
            job.train(1)
            assert job.whole() == Reference(3).state, plan
