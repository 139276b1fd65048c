"""What restoring asks of a device, as `snapshot/device_fill.py` uses it.

Owns the protocols of a device, of pinned memory to send from, and of a place in the device's work.
`snapshot/restore_cuda.py` has the one for CUDA; tests have one that is none.
"""

from typing import Protocol

import numpy
from numpy.typing import NDArray

Table = NDArray[numpy.uint64]
"""Copies: one (target, source, bytes) a row."""


class DeviceFailure(RuntimeError):
    """The device, not the data, is why bytes cannot come this way."""


class Buffer(Protocol):
    """Pinned memory for a moment."""

    @property
    def address(self) -> int:
        """Of its first byte, at the start of a page."""

    def release(self) -> None:
        """Give it back; nothing reads from it any more."""


class Ring(Protocol):
    """A bounded number of buffers."""

    def acquire(self, timeout_s: float) -> Buffer | None:
        """A buffer, or None if none came free in time."""

    def close(self) -> object:
        """Free them all."""


class Mark(Protocol):
    """A place in the device's work."""

    def query(self) -> bool:
        """Whether the device has come past it."""


class Digests(Mark, Protocol):
    """Digests on their way; to be read when the device has come past them."""

    def read(self) -> bytes:
        """16 bytes for each unit.

        Raises:
            DeviceFailure: If the device failed.
        """


class Accelerator(Protocol):
    """What filling asks of one device. Every method may raise `DeviceFailure`."""

    @property
    def can_digest(self) -> bool:
        """Whether `digests` is ready to work here, as far as is known."""

    def enter_thread(self) -> None:
        """Make this thread, one of ours, use this device."""

    def ring(self, buffers: int, buffer_bytes: int) -> Ring:
        """Pinned memory to send from."""

    def room(self) -> int:
        """Bytes that could be allocated."""

    def allocate(self, size: int) -> int | None:
        """The address of new device memory, aligned to 16 bytes; None if there is no room."""

    def free(self) -> None:
        """Let go of everything allocated; nothing uses it any more."""

    def follow(self) -> None:
        """Let what is enqueued from now on wait for the work that this thread has enqueued."""

    def copy(self, table: Table) -> None:
        """Enqueue copies, rows of (target, source, bytes), between host and device memory.

        Where the host's is not pinned, this waits until all copies so far have been made.
        """

    def mark(self) -> Mark:
        """The place after everything enqueued so far, digests too."""

    def digests(self, address: int, count: int) -> Digests:
        """Enqueue digesting so many units, one after the other, after all copies so far.

        Copies that are enqueued later need not wait for it.
        """
