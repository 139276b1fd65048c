"""A digest of training state: what the demo compares two runs by.

Promises that two states with the same digest have the same names, types, shapes and bytes.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


def digest_of(*states: Any) -> str:
    """Of every byte of nested states, in hexadecimal."""
    digest = hashlib.sha256()
    for state in states:
        _add(digest, "", state)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", path: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in value:
            _add(digest, f"{path}/{key}", value[key])
    elif isinstance(value, list | tuple):
        for number, element in enumerate(value):
            _add(digest, f"{path}/{number}", element)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{path} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    else:
        digest.update(f"{path} {value!r}\n".encode())
