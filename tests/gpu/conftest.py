"""Tests on a device, skipped without one; agents are those of the integration tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import everstep

# As themselves: they are fixtures of this folder from here on.
from tests.integration.conftest import AgentProcess
from tests.integration.conftest import job as job
from tests.integration.conftest import start_agent as start_agent

OPTIONS = """
[agent]
max_jobs = 256
[memory]
slots = 5
[nvme]
interval = "off"
flush_on_exit = false
"""


@pytest.fixture(scope="session", autouse=True)
def _on_a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """One agent for all tests of this folder that leave it alone; jobs keep them apart."""
    process = AgentProcess(tmp_path_factory.mktemp("nvme"), OPTIONS)
    process.start()
    yield process
    process.close()


@pytest.fixture
def connect(agent: AgentProcess, job: str) -> Iterator[Callable[..., everstep.Client]]:
    """Connects to the shared agent; a second time as the trainer that follows a crash."""
    clients: list[everstep.Client] = []

    def connected(**options: Any) -> everstep.Client:
        chosen = {"job": job, "agent": agent.address, "rank": 0, "world": 1, **options}
        clients.append(everstep.connect(**chosen))
        return clients[-1]

    yield connected
    for client in clients:
        client.close(timeout=0)
