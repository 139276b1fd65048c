"""Tensors without memory, that stand for those of a snapshot until these are written.

Owns the address space that they lie in: it is read-only and never touched, so nothing of it becomes
memory. Promises that each has a storage of its own, of its exact size, so that torch writes them as
it would write the real ones.
"""

import mmap
import warnings
from math import prod
from typing import Protocol

import torch

from everstep.client.attachment import dtype_named
from everstep.snapshot.layout import element_bytes

_ALIGNMENT_BYTES = 64


class Source(Protocol):
    """What a placeholder stands for: a tensor of the snapshot, or one that is made of several."""

    @property
    def dtype(self) -> str:
        """Torch's name of the type, without "torch."."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""


class Placeholders:
    """Makes them, and knows what each stands for.

    Args:
        room_bytes: How much address space they may take in all; see `room`.
    """

    def __init__(self, room_bytes: int) -> None:
        # Private and not writable: the kernel sets nothing aside for it.
        self._memory = mmap.mmap(
            -1,
            max(1, room_bytes),
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            prot=mmap.PROT_READ,
        )
        self._end = 0
        self._made: dict[int, tuple[torch.Tensor, Source]] = {}

    def stand_for(self, tensor: Source) -> torch.Tensor:
        """A tensor of its type and shape, with nothing in it."""
        size = prod(tensor.shape) * element_bytes(tensor.dtype)
        dtype = dtype_named(tensor.dtype)
        if not size:
            made = torch.empty(tensor.shape, dtype=dtype)
        else:
            with warnings.catch_warnings():
                # It says that the memory is not writable, which is the point of it.
                warnings.simplefilter("ignore", UserWarning)
                flat = torch.frombuffer(
                    self._memory, dtype=torch.uint8, count=size, offset=self._end
                )
            made = flat.view(dtype).reshape(tensor.shape)
            self._end += room(tensor)
        self._made[id(made)] = made, tensor
        return made

    def source(self, tensor: object) -> Source | None:
        """What a tensor stands for; None if it is an ordinary one."""
        found = self._made.get(id(tensor))
        return None if found is None else found[1]


def room(tensor: Source) -> int:
    """How much address space its placeholder takes."""
    size = prod(tensor.shape) * element_bytes(tensor.dtype)
    return size + -size % _ALIGNMENT_BYTES
