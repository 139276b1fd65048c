"""Models and optimizers come back bit for bit, and go on as if nothing had happened."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import everstep

from .states import exact, states

Objects = dict[str, Any]
Make = Callable[[int], Objects]
SAVED, LAST = 3, 6


class Network(nn.Module):
    """Large enough to be copied lazily, with random draws and buffers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(24, 200, dtype=dtype)
        self.norm = nn.BatchNorm1d(200, dtype=dtype)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(200, 24, dtype=dtype)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.relu(self.norm(self.first(batch))))
        out: torch.Tensor = self.last(hidden)
        return out


def network(seed: int, dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(seed)
    return Network(dtype)


def train(objects: Objects, first: int, last: int) -> None:
    """Steps `first` + 1 to `last`; the batches depend on the step alone."""
    for step in range(first + 1, last + 1):
        one_step(objects, step)


def one_step(objects: Objects, step: int) -> None:
    model = objects["model"]
    dtype = next(model.parameters()).dtype
    batch = torch.randn(16, 24, generator=torch.Generator().manual_seed(step)).to(dtype)
    optimizers = [thing for thing in objects.values() if isinstance(thing, optim.Optimizer)]

    def closure() -> torch.Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss: torch.Tensor = (model(batch) - batch).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizers[0], optim.LBFGS):
        optimizers[0].step(closure)
        return
    closure()
    for optimizer in optimizers:
        optimizer.step()


def check_continues(connect: Callable[..., everstep.Client], make: Make) -> Objects:
    """Snapshot at an odd moment, restore into objects made anew, go on with both."""
    original = make(1)
    client = connect()
    client.attach(**original)
    train(original, 0, SAVED)
    at_snapshot = states(original)
    handle = client.snapshot(SAVED)
    train(original, SAVED, LAST)
    assert handle.wait(), handle
    client.close(timeout=0)

    other = make(2)
    train(other, 0, 1)  # state that must be replaced
    client = connect()
    client.attach(**other)
    assert client.restore() == SAVED
    assert states(other) == at_snapshot
    train(other, SAVED, LAST)
    assert states(other) == states(original)
    return other


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam-loop": lambda p: optim.Adam(p, foreach=False),
    "adam-amsgrad": lambda p: optim.Adam(p, foreach=True, amsgrad=True),
    "adamw-foreach": lambda p: optim.AdamW(p, foreach=True),
    "adamw-fused": lambda p: optim.AdamW(p, fused=True),
    "adamw-tensor-lr": lambda p: optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "nadam": lambda p: optim.NAdam(p),
    "rmsprop": lambda p: optim.RMSprop(p, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p),
    "adafactor": lambda p: optim.Adafactor(p),
    "rprop": lambda p: optim.Rprop(p),
    "lbfgs": lambda p: optim.LBFGS(p, max_iter=3, history_size=4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(connect: Callable[..., everstep.Client], name: str) -> None:
    def make(seed: int) -> Objects:
        model = network(seed)
        return {"model": model, "optimizer": OPTIMIZERS[name](model.parameters())}

    check_continues(connect, make)


def test_sparse_gradients(connect: Callable[..., everstep.Client]) -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(300, 24, sparse=True)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.table((batch[:, 0] * 1000).long() % 300)
            return out

    def make(seed: int) -> Objects:
        torch.manual_seed(seed)
        model = Lookup()
        return {"model": model, "optimizer": optim.SparseAdam(model.parameters())}

    check_continues(connect, make)


def test_two_optimizers_and_groups_and_frozen_parameters(
    connect: Callable[..., everstep.Client],
) -> None:
    def make(seed: int) -> Objects:
        model = network(seed)
        model.first.bias.requires_grad_(False)
        loose = nn.Parameter(torch.randn(100, 100))  # in no module, and never with a gradient
        groups = [
            {"params": [model.last.weight], "lr": 0.05, "name": "head"},
            {"params": [model.last.bias, loose], "weight_decay": 0.1},
        ]
        return {
            "model": model,
            "optimizer": optim.AdamW([*model.first.parameters(), *model.norm.parameters()]),
            "head": optim.SGD(groups, lr=0.01, momentum=0.9),
            "loose": {"loose": loose},
        }

    check_continues(connect, make)


def test_parameters_in_no_module(connect: Callable[..., everstep.Client]) -> None:
    def make(seed: int) -> Objects:
        model = network(seed)  # not attached: its parameters are known to the optimizer alone
        return {"optimizer": optim.AdamW(model.parameters()), "weights": dict(model.state_dict())}

    first = make(1)
    client = connect()
    client.attach(**first)
    for parameter in first["optimizer"].param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    first["optimizer"].step()
    assert client.snapshot(1).wait()
    expected = states(first)
    client.close(timeout=0)
    second = make(2)
    client = connect()
    client.attach(**second)
    assert client.restore() == 1
    assert states(second) == expected


def test_state_of_low_precision_weights_keeps_its_dtype(
    connect: Callable[..., everstep.Client],
) -> None:
    """torch's own load_state_dict would cast the moments to the weights' dtype."""

    class FullPrecision(optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.01})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    if not state:
                        state["master"] = parameter.float()
                        state["nested"] = [{"moment": torch.zeros(parameter.shape)}, None, 7]
                    moment = state["nested"][0]["moment"]
                    moment.mul_(0.9).add_(parameter.grad.float())
                    state["nested"][2] += 1
                    state["master"].sub_(moment, alpha=group["lr"])
                    parameter.copy_(state["master"])

    def make(seed: int) -> Objects:
        model = network(seed, torch.bfloat16)
        return {"model": model, "optimizer": FullPrecision(model.parameters())}

    restored = check_continues(connect, make)
    state = restored["optimizer"].state[restored["model"].first.weight]
    assert state["master"].dtype is torch.float32
    assert state["nested"][0]["moment"].dtype is torch.float32
    # Otherwise the test could not tell: some bits of the masters are beyond bfloat16.
    assert not torch.equal(state["master"], state["master"].bfloat16().float())


def test_optimizer_that_replaces_its_state(connect: Callable[..., everstep.Client]) -> None:
    class Replacing(optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.01})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                before = state.get("moment", torch.zeros_like(parameter))
                state["moment"] = before * 0.9 + parameter.grad
                parameter.sub_(state["moment"], alpha=0.01)

    def make(seed: int) -> Objects:
        model = network(seed)
        return {"model": model, "optimizer": Replacing(model.parameters())}

    check_continues(connect, make)


def test_snapshot_before_the_first_step(connect: Callable[..., everstep.Client]) -> None:
    """An optimizer without state yet: restoring takes away what the new one has."""
    model = network(1)
    original: Objects = {"model": model, "optimizer": optim.Adam(model.parameters())}
    client = connect()
    client.attach(**original)
    assert client.snapshot(0).wait()
    expected = states(original)
    client.close(timeout=0)
    model = network(2)
    other: Objects = {"model": model, "optimizer": optim.Adam(model.parameters())}
    train(other, 0, 1)
    client = connect()
    client.attach(**other)
    assert client.restore() == 0
    assert states(other) == expected


def test_references_held_elsewhere_stay_good(connect: Callable[..., everstep.Client]) -> None:
    """Weights and state are filled in place."""
    model = network(1)
    objects: Objects = {"model": model, "optimizer": optim.AdamW(model.parameters())}
    train(objects, 0, 1)
    client = connect()
    client.attach(**objects)
    assert client.snapshot(1).wait()
    expected = states(objects)
    weight = model.first.weight
    moment = objects["optimizer"].state[weight]["exp_avg"]
    pointers = (weight.data_ptr(), moment.data_ptr())
    train(objects, 1, 3)
    assert client.rewind() == 1
    assert states(objects) == expected
    assert model.first.weight is weight
    assert objects["optimizer"].state[weight]["exp_avg"] is moment
    assert (weight.data_ptr(), moment.data_ptr()) == pointers
    assert exact(weight) == expected["model"]["first.weight"]
