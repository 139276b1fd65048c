"""What a rank that joins live is given when there is little to be had, and what it is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import everstep
from everstep.proto.errors import NothingRecoverable, Refused

from .conftest import AgentProcess

Connect = Callable[..., everstep.Client]


def rank_of(connect: Connect, rank: int, value: float, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A rank with one tensor of its own."""
    client = connect(rank=rank, world=2, on_busy="wait", **more)
    state = {"own": torch.full((1000,), float(value))}
    client.attach(per_rank={"state": state})
    return client, state


def commit(clients: list[Any], step: int) -> None:
    handles = [client.snapshot(step) for client in clients]
    assert all(handle.wait(timeout=20.0) for handle in handles), handles


def test_with_nobody_there_it_is_an_ordinary_start(connect: Connect) -> None:
    first = [rank_of(connect, rank, rank, live_join=True)[0] for rank in (0, 1)]
    assert [(c.restore(), c.joined, c.incarnation) for c in first] == [(None, False, 1)] * 2
    commit(first, 1)
    for client in first:
        client.close(timeout=0)
    again = [rank_of(connect, rank, 9.0, live_join=True) for rank in (0, 1)]
    assert [(c.restore(), c.joined, c.incarnation) for c, _ in again] == [(1, False, 2)] * 2
    assert [float(state["own"][0]) for _, state in again] == [0.0, 1.0]


def test_before_anything_is_committed_it_begins_as_all_ranks_did(connect: Connect) -> None:
    first = [rank_of(connect, rank, rank)[0] for rank in (0, 1)]
    assert [client.restore() for client in first] == [None, None]
    joiner, _ = rank_of(connect, 1, 5.0, live_join=True)
    assert (joiner.joined, joiner.restore(), joiner.incarnation) == (True, None, 1)
    commit([joiner, first[0]], 3)
    joiner.close(timeout=0)
    first[0].close(timeout=0)

    second = [rank_of(connect, rank, 9.0)[0] for rank in (0, 1)]
    assert [client.restore() for client in second] == [3, 3]
    joiner, state = rank_of(connect, 1, 9.0, live_join=True)
    assert (joiner.joined, joiner.restore(), joiner.incarnation) == (True, 3, 2)
    assert float(state["own"][0]) == 5.0, "what the others began with, too"


def test_it_takes_what_the_running_incarnation_has_and_once(connect: Connect) -> None:
    first = [rank_of(connect, rank, rank)[0] for rank in (0, 1)]
    commit(first, 7)
    first[1].rewind()
    first[0].rewind()
    commit(first, 8)
    joiner, state = rank_of(connect, 1, 9.0, live_join=True)
    with pytest.raises(NothingRecoverable, match="committed no such step"):
        joiner.restore(7)
    assert joiner.restore() == 8
    assert float(state["own"][0]) == 1.0
    with pytest.raises(Refused, match="has restored already"):
        joiner.restore()
    commit([joiner, first[0]], 9)


def test_another_world_is_refused_and_the_others_go_on(connect: Connect) -> None:
    first = [rank_of(connect, rank, rank)[0] for rank in (0, 1)]
    with pytest.raises(Refused, match="a world of 3, and 2 rank"):
        connect(rank=1, world=3, live_join=True)
    commit(first, 1)


def test_one_whose_rank_was_taken_over_goes_no_further(connect: Connect) -> None:
    first = [rank_of(connect, rank, rank)[0] for rank in (0, 1)]
    commit(first, 1)
    joiner, _ = rank_of(connect, 1, 9.0, live_join=True)
    assert "another process has taken this rank over" in first[1].snapshot(2).skipped
    assert joiner.restore() == 1


def test_a_rewind_of_a_rank_that_has_joined_ends_the_incarnation(connect: Connect) -> None:
    first = [rank_of(connect, rank, rank)[0] for rank in (0, 1)]
    commit(first, 1)
    joiner, _ = rank_of(connect, 1, 9.0, live_join=True)
    assert joiner.restore() == 1
    commit([joiner, first[0]], 2)
    assert joiner.rewind() == 2
    assert (joiner.incarnation, joiner.joined) == (2, False)


def test_an_agent_that_was_restarted_is_joined_at_once(
    agent_process: AgentProcess, connect: Connect
) -> None:
    """Its trainers are alive, though none of them has attached to the new agent yet."""
    options = {"agent": agent_process.address}
    first = [rank_of(connect, rank, rank, **options)[0] for rank in (0, 1)]
    commit(first, 1)
    agent_process.restart()
    joiner, _ = rank_of(connect, 1, 9.0, live_join=True, **options)
    assert (joiner.joined, joiner.incarnation, joiner.restore()) == (True, 1, 1)
