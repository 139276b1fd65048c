"""Comparing training states, bit for bit."""

from collections.abc import Mapping
from typing import Any

import torch


def exact(tree: Any) -> Any:
    """The tree with each tensor as dtype, shape and bytes, so that == means equal bits.

    A float is spelled out, or NaN would differ from itself and 0.0 equal -0.0.
    """
    if isinstance(tree, torch.Tensor):
        plain = torch.empty(tree.shape, dtype=tree.dtype)  # contiguous, nothing left to conjugate
        data = plain.copy_(tree.detach()).reshape(-1).view(torch.uint8).numpy().tobytes()
        return ("tensor", str(tree.dtype), tuple(tree.shape), data)
    if isinstance(tree, Mapping):
        return {key: exact(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(exact(value) for value in tree)
    if isinstance(tree, float):
        return ("float", tree.hex())
    return tree


def states(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The exact state of everything that is attached."""
    return {
        name: exact(thing.state_dict() if hasattr(thing, "state_dict") else thing)
        for name, thing in objects.items()
    }
