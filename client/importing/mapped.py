"""Tensors that lie in a file.

Owns the mapping of a file, read-only. Promises that no tensor reaches beyond its file, and that
nothing is copied: a page is read when it is captured, and the kernel may drop it again.
"""

import mmap
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from everstep.proto.errors import FormatInvalid


class MappedFile:
    """A file as memory. The tensors that are made of it keep it mapped.

    Raises:
        FormatInvalid: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self.size = os.fstat(descriptor).st_size
                self._memory = mmap.mmap(descriptor, self.size, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise FormatInvalid(str(path), f"it cannot be mapped: {error}") from error

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of it; fewer at its end."""
        return self._memory[offset : offset + size]

    def tensor(
        self,
        dtype: torch.dtype,
        offset: int,
        size: int,
        shape: Sequence[int],
        stride: Sequence[int] | None = None,
        first: int = 0,
    ) -> torch.Tensor:
        """A tensor that lies in it.

        Args:
            dtype: Its type.
            offset: Where its storage begins.
            size: Of its storage, in bytes.
            shape: Its own.
            stride: Its own, in elements; by default row by row.
            first: Its first element in the storage.

        Raises:
            FormatInvalid: If it is not inside of its storage, or that not in the file.
        """
        where = f"{self.path}, a tensor at {offset}"
        if offset < 0 or size < 0 or offset + size > self.size or size % dtype.itemsize:
            raise FormatInvalid(where, f"its {size} bytes are not in a file of {self.size}")
        elements = size // dtype.itemsize
        steps = _row_by_row(shape) if stride is None else tuple(stride)
        if len(steps) != len(shape) or min((first, *shape, *steps)) < 0:
            raise FormatInvalid(where, "an impossible shape")
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=dtype)
        last = first + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if last >= elements:
            raise FormatInvalid(where, f"element {last} of {elements} would be in it")
        with warnings.catch_warnings():
            # It says that the memory is not writable, which is the point of it.
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=offset)
        return flat.view(dtype).as_strided(tuple(shape), steps, first)


def _row_by_row(shape: Sequence[int]) -> tuple[int, ...]:
    steps = [1]
    for length in reversed(shape[1:]):
        steps.append(steps[-1] * length)
    return tuple(reversed(steps)) if shape else ()
