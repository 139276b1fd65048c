"""Checkpoints of torch.distributed.checkpoint over Everstep, when something is wrong."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed.checkpoint as dcp

import everstep
from everstep.dcp import EverstepReader, EverstepWriter

from .conftest import AgentProcess
from .dcp_states import State, bits, reason, zeroed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is ")
LOADS = """
import sys, torch, torch.distributed.checkpoint as dcp
from everstep.dcp import EverstepReader
state = {"w": torch.zeros(1)}
dcp.load(state, storage_reader=EverstepReader(sys.argv[1], agent=sys.argv[2]))
print(state["w"].item())
"""


def test_a_closed_session_lets_go_of_the_rank(shared_agent: AgentProcess, job: str) -> None:
    """Another process may be the rank, though this one lives on."""
    writer = EverstepWriter(job, agent=shared_agent.address)
    dcp.save({"w": torch.full((1,), 7.0)}, storage_writer=writer)
    command = [sys.executable, "-W", "ignore", "-c", LOADS, job, shared_agent.address]
    claimed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"is held by process {os.getpid()}" in claimed.stderr
    writer.close()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "7.0\n"


def test_an_agent_that_is_gone_is_an_error(
    start_agent: Callable[..., AgentProcess], job: str
) -> None:
    agent = start_agent()
    limits = everstep.Limits(agent_start_s=4.0, offer_s=4.0, pause_s=0.0, close_s=0.0)
    writer = EverstepWriter(job, agent=agent.address, limits=limits, timeout_s=30.0)
    dcp.save({"w": torch.ones(1)}, storage_writer=writer)
    agent.kill()
    attempt = {"w": torch.ones(1)}
    assert "no agent answers" in reason(lambda: dcp.save(attempt, storage_writer=writer))
    agent.start()
    dcp.save({"w": torch.full((1,), 2.0)}, storage_writer=writer)
    loaded = {"w": torch.zeros(1)}
    dcp.load(loaded, storage_reader=EverstepReader(job, agent=agent.address))
    assert loaded["w"].item() == 2
    writer.close()


def test_damage_is_named_and_nothing_is_loaded(
    start_agent: Callable[..., AgentProcess], job: str
) -> None:
    agent = start_agent()
    writer = EverstepWriter(job, agent=agent.address)
    state = {"w": torch.ones(400_000), "v": torch.ones(5), "text": "y" * 100}
    dcp.save(state, storage_writer=writer, checkpoint_id=6)
    assert agent.steps_on_nvme(job) == []
    agent.flip(job, 6, from_end=600_000)
    loaded = zeroed(state)
    reader = EverstepReader(job, agent=agent.address)
    attempt = reason(lambda: dcp.load(loaded, storage_reader=reader))
    assert "ShardCorrupt" in attempt and "arena" in attempt
    assert loaded["w"].count_nonzero() == loaded["v"].count_nonzero() == 0
    assert loaded["text"] is None
    writer.close()


def test_another_copy_is_used_where_there_is_one(
    start_agent: Callable[..., AgentProcess], job: str
) -> None:
    agent = start_agent()
    writer = EverstepWriter(job, agent=agent.address, level="nvme")
    state = {"w": torch.ones(400_000), "text": "y" * 100}
    dcp.save(state, storage_writer=writer, checkpoint_id=6)
    agent.flip(job, 6, from_end=600_000)
    loaded = zeroed(state)
    dcp.load(loaded, storage_reader=EverstepReader(job, agent=agent.address))
    assert bits(loaded) == bits(state)
    writer.close()


def test_objects_are_verified_too(start_agent: Callable[..., AgentProcess], job: str) -> None:
    agent = start_agent()
    writer = EverstepWriter(job, agent=agent.address)
    dcp.save({"text": "y" * 100}, storage_writer=writer, checkpoint_id=6)
    agent.flip(job, 6, from_end=4096 - 200)
    loaded: State = {"text": None}
    reader = EverstepReader(job, agent=agent.address)
    assert "ShardCorrupt" in reason(lambda: dcp.load(loaded, storage_reader=reader))
    assert loaded == {"text": None}
    writer.close()
