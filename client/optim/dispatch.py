"""Which code steps a table of works, and on which threads.

Owns the choice between the reference and the kernels, and the pool of threads that share the ranges
of a table on the CPU. Promises that bits do not depend on the number of threads. Native code starts
none: the calling thread takes a part, and the pool has one fewer than torch.get_num_threads().
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TypeAlias

import torch

from everstep.client.optim import reference
from everstep.kernels.optimizer_work import Work

Choice: TypeAlias = Literal["auto", "reference"]
CHOICES: tuple[Choice, ...] = ("auto", "reference")

_PIECES_PER_THREAD = 8
_CHUNKS_AT_LEAST = 64
"""Fewer chunks (of 512 elements) are not worth another thread."""


class Stepper(Protocol):
    """A table of works, whatever it runs on."""

    def refresh(self, works: list[Work]) -> None:
        """Take the addresses and scalars of the next step."""

    def step(self, grad_scale: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        """Take it."""


def table(works: list[Work], method: str, device: torch.device, choice: Choice) -> Stepper:
    """The fastest there is for these works.

    Args:
        works: All on the device.
        method: One of `optimizer_work.METHODS`.
        device: Theirs.
        choice: "reference" for torch alone.
    """
    if choice == "auto":
        if device.type == "cpu":
            return _OnThreads(works, method)
        if device.type == "cuda" and _triton() is not None:
            stepper: Stepper = _triton().Table(works, method)
            return stepper
    return reference.Table(works, method)


@cache
def _triton() -> Any:
    # The module itself imports triton only when a step is wanted.
    if find_spec("triton") is None:
        return None
    from everstep.kernels import optimizer_triton

    return optimizer_triton


class _OnThreads:
    """A native table whose ranges are shared among threads."""

    def __init__(self, works: Sequence[Work], method: str) -> None:
        from everstep.kernels import optimizer_native

        self._table = optimizer_native.Table(works, method)

    def refresh(self, works: list[Work]) -> None:
        self._table.refresh(works)

    def step(self, grad_scale: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        scale = grad_scale.data_ptr()
        found = 0 if found_inf is None else found_inf.data_ptr()
        chunks = self._table.chunk_count
        threads = min(torch.get_num_threads(), -(-chunks // _CHUNKS_AT_LEAST))
        if threads <= 1:
            self._table.step(scale, found, 0, chunks)
            return
        size = max(1, -(-chunks // (threads * _PIECES_PER_THREAD)))
        ranges = deque((first, min(size, chunks - first)) for first in range(0, chunks, size))

        def work_off() -> None:
            while True:
                try:
                    first, count = ranges.popleft()
                except IndexError:
                    return
                self._table.step(scale, found, first, count)

        _shared(work_off, threads)


_pool_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def _shared(work_off: Any, threads: int) -> None:
    """Run it on so many threads, this one included, and wait for all."""
    with _pool_lock:
        pool = _pools.get(threads)
        if pool is None:
            pool = _pools[threads] = ThreadPoolExecutor(threads - 1, "everstep-optim")
    others: list[Future[None]] = [pool.submit(work_off) for _ in range(threads - 1)]
    try:
        work_off()
    finally:
        for other in others:
            other.result()


def _after_fork() -> None:
    """Threads do not survive a fork: a child makes its own."""
    global _pool_lock
    _pool_lock = threading.Lock()
    _pools.clear()


def register_fork() -> None:
    """Have children forget the pools; once a process."""
    import os

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)


register_fork()
