"""State dicts compared by their bytes, and what DCP says of an attempt that fails."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

State = dict[str, Any]


def bits(tree: Any) -> Any:
    """The same tree, with the bytes of its tensors."""
    if isinstance(tree, torch.Tensor):
        flat = tree.detach().resolve_conj().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return (tree.dtype, tuple(tree.shape), data)
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    return tree


def zeroed(tree: Any) -> Any:
    """The same tree, with other contents."""
    if isinstance(tree, torch.Tensor):
        return torch.zeros(tree.shape, dtype=tree.dtype)
    if isinstance(tree, dict):
        return {key: zeroed(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [zeroed(value) for value in tree]
    return None


def reason(attempt: Callable[[], object]) -> str:
    """Why an attempt fails, as DCP tells it."""
    with pytest.raises(CheckpointException) as caught:
        attempt()
    return str(caught.value)
