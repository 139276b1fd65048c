"""Restoring a named step, going back in a live run, closing; what is kept and what is abandoned."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import everstep
from everstep.proto.errors import Refused

from .conftest import AgentProcess, Hold, eventually
from .runs import make, one_step, restored
from .states import states

Connect = Callable[..., everstep.Client]
Objects = dict[str, Any]
HoldPoint = Callable[..., Hold]


@pytest.fixture
def trained() -> Objects:
    objects = make()
    one_step(objects)
    return objects


def test_restore_without_any_snapshot(connect: Connect) -> None:
    objects = make()
    before = states(objects)
    client = connect()
    client.attach(**objects)
    assert client.restore() is None
    assert states(objects) == before


def test_restore_to_a_named_step(connect: Connect, trained: Objects) -> None:
    client = connect()
    client.attach(**trained)
    expected = {}
    for step in (1, 2):
        one_step(trained)
        expected[step] = states(trained)
        assert client.snapshot(step).wait()
    other = make(2)
    client = connect()
    client.attach(**other)
    assert client.restore(to=1) == 1
    assert states(other) == expected[1]
    client = connect()
    client.attach(**other)
    before = states(other)
    with pytest.raises(everstep.errors.NothingRecoverable, match="step 7"):
        client.restore(to=7)
    assert states(other) == before


def test_a_second_restore_is_not_another_one_in_disguise(
    connect: Connect, trained: Objects
) -> None:
    """Within one launch the decision stands; asking for something else is an error."""
    client = connect()
    client.attach(**trained)
    for step in (1, 2):
        one_step(trained)
        assert client.snapshot(step).wait()
    client = connect()
    client.attach(**trained)
    assert client.restore() == 2
    assert client.restore() == 2  # again, before anything was captured: the same
    before = states(trained)
    with pytest.raises(Refused, match="rewind"):
        client.restore(to=1)
    for step in (3, 4, 5):
        one_step(trained)
        assert client.snapshot(step).wait()
    before = states(trained)
    with pytest.raises(Refused, match="rewind"):
        client.restore()
    assert states(trained) == before


def test_rewind_goes_back_and_on(connect: Connect, trained: Objects) -> None:
    """To the newest, and to a named step whose successors never come back."""
    client = connect()
    client.attach(**trained)
    expected = {}
    for step in (1, 2):
        one_step(trained)
        expected[step] = states(trained)
        assert client.snapshot(step).wait()
    one_step(trained)
    incarnation = client.incarnation
    assert client.rewind() == 2
    assert client.incarnation > incarnation
    assert states(trained) == expected[2]
    one_step(trained)
    assert client.rewind(to=1) == 1
    assert states(trained) == expected[1]

    # The trainer dies before it has captured anything: step 2 was abandoned.
    assert restored(connect, make(2), 1) == expected[1]


def test_steps_after_a_rewind_supersede_those_before(connect: Connect, trained: Objects) -> None:
    client = connect()
    client.attach(**trained)
    for step in (3, 6):
        one_step(trained)
        assert client.snapshot(step).wait()
    assert client.rewind(to=3) == 3
    one_step(trained)
    expected = states(trained)
    assert client.snapshot(4).wait()
    assert restored(connect, make(2), 4) == expected


def test_rewind_while_a_copy_is_under_way(
    connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    client = connect()
    client.attach(**trained)
    handle = client.snapshot(1)
    expected = states(trained)
    assert client.rewind() == 1
    assert states(trained) == expected
    assert handle.done() or handle.state == "sealed"
    assert client.snapshot(2).wait()


def test_rewind_without_a_snapshot_in_memory(connect: Connect, trained: Objects) -> None:
    client = connect()
    client.attach(**trained)
    before = states(trained)
    assert client.rewind() is None
    assert states(trained) == before
    with pytest.raises(everstep.errors.NothingRecoverable):
        client.rewind(to=3)
    assert client.snapshot(1).wait()


def test_close_leaves_the_last_snapshot_on_nvme(
    connect: Connect, shared_agent: AgentProcess, job: str, trained: Objects
) -> None:
    client = connect()
    client.attach(**trained)
    assert client.snapshot(1).wait()
    one_step(trained)
    last = client.snapshot(2)  # close() has to bring it to its end, too
    client.close()
    assert last.done("memory")
    assert shared_agent.steps_on_nvme(job) == [2]
    assert client.snapshot(3).skipped == "the client is closed"


def test_as_a_context_manager(connect: Connect, shared_agent: AgentProcess, job: str) -> None:
    with connect() as client:
        client.attach(tree={"x": torch.ones(3)})
        assert client.snapshot(1).wait()
    assert shared_agent.steps_on_nvme(job) == [1]


def test_nvme_interval(connect: Connect, shared_agent: AgentProcess, job: str) -> None:
    client = connect(nvme_interval=3)
    client.attach(tree={"x": torch.ones(3)})
    for step in range(1, 8):
        assert client.snapshot(step).wait()
        if step in (3, 6):
            eventually(lambda: step in shared_agent.steps_on_nvme(job), f"{step} on NVMe")  # noqa: B023
    assert shared_agent.steps_on_nvme(job) == [3, 6]


def test_to_states_of_other_forms(connect: Connect) -> None:
    """What was understood of one layout is of no use for the next."""
    client = connect()
    tree = {"first": torch.ones(2)}
    client.attach(tree=tree)
    for step, name in enumerate(("second", "third", "fourth"), 1):
        tree[name] = torch.full((step, 3), float(step))
        expected = {key: tensor.clone() for key, tensor in tree.items()}
        assert client.snapshot(step).wait()
        for _ in range(2):
            for tensor in tree.values():
                tensor.zero_()
            assert client.rewind() == step
            assert list(tree) == list(expected)
            assert all(torch.equal(tree[key], expected[key]) for key in tree)
