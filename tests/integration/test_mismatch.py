"""A state that does not fit is refused, with everything that does not; nothing is touched."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn, optim

import everstep
from everstep.proto.errors import NothingRecoverable, Refused, StateMismatch

from .states import states

Connect = Callable[..., everstep.Client]
Objects = dict[str, Any]


def model(*widths: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b, bias=bias, dtype=dtype) for a, b in pairwise(widths)))


def one_step(objects: Objects) -> None:
    for thing in objects.values():
        if isinstance(thing, optim.Optimizer):
            for group in thing.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn_like(parameter)
            thing.step()


def adam(network: nn.Module) -> Objects:
    return {"model": network, "optimizer": optim.Adam(network.parameters())}


@pytest.fixture
def saved(connect: Connect) -> Objects:
    """A snapshot of a model of three layers and its optimizer."""
    objects = adam(model(4, 6, 4))
    one_step(objects)
    client = connect()
    client.attach(**objects)
    assert client.snapshot(1).wait()
    exact = states(objects)
    client.close(timeout=0)
    return exact


def refused(connect: Connect, objects: Objects, **options: Any) -> StateMismatch:
    """The error of restoring into these objects, which are as before."""
    before = states(objects)
    generator = torch.get_rng_state()
    client = connect()
    client.attach(**objects)
    with pytest.raises(StateMismatch) as raised:
        client.restore(**options)
    assert states(objects) == before
    assert torch.equal(torch.get_rng_state(), generator)
    client.close(timeout=0)
    return raised.value


def test_missing_unexpected_and_reshaped_leaves_are_listed(
    connect: Connect, saved: Objects
) -> None:
    wider = model(4, 7, 4, 4)
    wider[0].bias = None
    wider[2].weight = nn.Parameter(wider[2].weight.half())
    error = refused(connect, {"model": wider, "optimizer": optim.Adam(wider.parameters())})
    assert {"model/2.weight", "model/2.bias"} <= set(error.missing)
    assert "model/0.bias" in error.unexpected
    assert "optimizer/state/model.0.bias/exp_avg" in error.unexpected
    assert "model/0.weight: float32[6, 4] -> float32[7, 4]" in error.reshaped
    assert "model/1.weight: float32[4, 6] -> float32[4, 7]" in error.reshaped
    text = str(error)
    assert "Nothing was loaded" in text
    assert all(name in text for name in ("model/2.weight", "model/0.bias", "float32[7, 4]"))


def test_another_dtype_is_a_mismatch(connect: Connect, saved: Objects) -> None:
    error = refused(connect, adam(model(4, 6, 4, dtype=torch.bfloat16)))
    assert "model/0.weight: float32[6, 4] -> bfloat16[6, 4]" in error.reshaped
    assert not error.missing
    assert not error.unexpected


def test_something_attached_that_was_not_saved(connect: Connect, saved: Objects) -> None:
    error = refused(connect, {**adam(model(4, 6, 4)), "progress": {"step": 1}})
    assert error.missing == ("progress",)
    assert "weights_only" in str(error)


def test_an_optimizer_that_was_not_saved(connect: Connect) -> None:
    """Weights alone are never taken silently for a whole state."""
    network = model(4, 6, 4)
    client = connect()
    client.attach(model=network)
    assert client.snapshot(1).wait()
    expected = states({"model": network})
    client.close(timeout=0)
    objects = adam(model(4, 6, 4))
    error = refused(connect, objects)
    assert error.missing == ("optimizer",)
    assert "weights_only=True" in str(error)
    client = connect()
    client.attach(**objects)
    assert client.restore(weights_only=True) == 1
    assert states({"model": objects["model"]}) == expected


def test_an_optimizer_that_is_not_attached(connect: Connect, saved: Objects) -> None:
    network = model(4, 6, 4)
    error = refused(connect, {"model": network})
    assert error.unexpected == ("optimizer",)
    assert "optimizer" in str(error)


def test_weights_only_leaves_the_rest_alone(connect: Connect, saved: Objects) -> None:
    objects = adam(model(4, 6, 4))
    one_step(objects)
    optimizer = states({"optimizer": objects["optimizer"]})
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    client = connect()
    client.attach(**objects, progress=(progress := {"step": 9}))
    assert client.restore(weights_only=True) == 1
    assert states({"model": objects["model"]})["model"] == saved["model"]
    assert states({"optimizer": objects["optimizer"]}) == optimizer
    assert progress == {"step": 9}
    assert torch.equal(torch.get_rng_state(), generator)


def test_another_class_of_optimizer(connect: Connect, saved: Objects) -> None:
    """Even where its state looks the same."""
    network = model(4, 6, 4)
    objects = {"model": network, "optimizer": optim.AdamW(network.parameters())}
    error = refused(connect, objects)
    assert "torch.optim.adam.Adam " in str(error)
    assert "torch.optim.adamw.AdamW" in str(error)
    assert "force=True" in str(error)
    client = connect()
    client.attach(**objects)
    assert client.restore(force=True) == 1
    restored = states(objects)
    assert restored["model"] == saved["model"]
    assert restored["optimizer"]["state"] == saved["optimizer"]["state"]


def test_parameters_in_another_order_still_find_their_state(
    connect: Connect, saved: Objects
) -> None:
    """State is filed under names; a group in another order is refused, not mixed up."""
    network = model(4, 6, 4)
    backwards = optim.Adam(reversed(list(network.parameters())))
    error = refused(connect, {"model": network, "optimizer": backwards})
    assert "optimizer/param_groups" in error.reshaped[0]


def test_another_number_of_groups(connect: Connect, saved: Objects) -> None:
    network = model(4, 6, 4)
    groups = [{"params": [p], "lr": 0.1} for p in network.parameters()]
    error = refused(connect, {"model": network, "optimizer": optim.Adam(groups)})
    assert "optimizer/param_groups" in error.reshaped[0]


def test_a_tree_of_another_form(connect: Connect) -> None:
    client = connect()
    client.attach(tree={"w": torch.ones(3), "v": torch.ones(2)})
    assert client.snapshot(1).wait()
    client.close(timeout=0)
    live = {"w": torch.zeros(4), "u": torch.zeros(2)}
    error = refused(connect, {"tree": live})
    assert error.reshaped == ("tree/w: float32[3] -> float32[4]",)
    assert error.missing == ("tree/u",)


def test_extra_state_that_is_not_there(connect: Connect) -> None:
    class Counting(nn.Linear):
        calls = 3

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    client = connect()
    client.attach(model=nn.Sequential(Counting(3, 3)))
    assert client.snapshot(1).wait()
    client.close(timeout=0)
    error = refused(connect, {"model": nn.Sequential(nn.Linear(3, 3))})
    assert error.unexpected == ("model/0._extra_state",)

    client = connect()
    client.attach(model=nn.Sequential(nn.Linear(3, 3)))
    assert client.snapshot(2).wait()
    client.close(timeout=0)
    error = refused(connect, {"model": nn.Sequential(Counting(3, 3))})
    assert error.missing == ("model/0._extra_state",)


def test_another_number_of_ranks(connect: Connect, saved: Objects) -> None:
    """Of one rank, whose state is nobody's copy, every rank takes all."""
    objects = adam(model(4, 6, 4))
    client = connect(rank=0, world=2)
    client.attach(**objects)
    assert client.restore() == 1
    assert states(objects) == saved
    assert client.restored_notes == ()


def test_after_a_refusal_the_right_call_works(connect: Connect, saved: Objects) -> None:
    """In the same process: a refusal costs nothing."""
    objects = adam(model(4, 6, 4))
    client = connect()
    client.attach(**objects, progress=[1])
    with pytest.raises(StateMismatch):
        client.restore()
    assert client.restore(weights_only=True) == 1
    with pytest.raises((Refused, NothingRecoverable)):
        client.restore(to=12)
    assert client.snapshot(2).wait()
