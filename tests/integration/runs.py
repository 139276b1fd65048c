"""The smallest run that is copied lazily, and what its next trainer gets."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim

import everstep

from .states import states

Connect = Callable[..., everstep.Client]
Objects = dict[str, Any]


def make(seed: int = 1) -> Objects:
    """A model whose weights and moments are large enough to be copied lazily."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96))
    return {"model": model, "optimizer": optim.AdamW(model.parameters(), lr=0.1)}


def one_step(objects: Objects) -> None:
    optimizer = objects["optimizer"]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def restored(connect: Connect, objects: Objects, expected_step: int) -> Objects:
    """What the next trainer gets."""
    client = connect()
    client.attach(**objects)
    assert client.restore() == expected_step
    return states(objects)


def save(connect: Connect, objects: Objects, step: int = 1, **more: Any) -> Objects:
    """Snapshot; return the exact state at that moment."""
    client = connect()
    client.attach(**objects, **more)
    before = states(objects)
    assert client.snapshot(step).wait()
    client.close(timeout=0)
    return before


def load(connect: Connect, objects: Objects, **more: Any) -> Objects:
    """Restore as the next trainer; return the exact state then."""
    client = connect()
    client.attach(**objects, **more)
    assert client.restore() is not None
    client.close(timeout=0)
    return states(objects)
