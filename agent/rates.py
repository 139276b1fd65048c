"""Token buckets that bound how fast bytes are sent or taken.

Owns the arithmetic of a rate. Promises that over any time t at most `bytes_s` * t bytes plus the
burst are let through, whoever shares the bucket, and that whoever came first goes first. A request
larger than the burst is let through after its own time, so no size is impossible. Does not know
what the bytes are.
"""

import math
import threading
import time
from collections.abc import Callable

from everstep.proto.errors import DeadlineExceeded

_DEFAULT_BURST_BYTES = 4 << 20
_LONGEST_NAP_S = 0.25
"""How late a waiter notices that it was cancelled."""


class Rate:
    """So many bytes a second, shared by everybody who holds this object.

    `reserve` is pure: the clock is passed in. `take` waits.
    """

    def __init__(
        self,
        bytes_s: float | None,
        burst_bytes: int = _DEFAULT_BURST_BYTES,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with a full bucket.

        Args:
            bytes_s: The rate; None for no limit.
            burst_bytes: What may pass at once after a pause.
            clock: For `take` and for changes of the rate.
        """
        _check(bytes_s, burst_bytes)
        self._bytes_s = bytes_s
        self._burst_bytes = burst_bytes
        self._clock = clock
        self._level_bytes = float(burst_bytes)
        self._filled_s: float | None = None
        self._reserved_bytes = 0
        self._changed = threading.Condition()

    @property
    def bytes_s(self) -> float | None:
        """The rate now; None for no limit."""
        return self._bytes_s

    def adjust(self, bytes_s: float | None, burst_bytes: int | None = None) -> None:
        """Change the rate; those who wait go by the new one from now on.

        Args:
            bytes_s: The rate; None for no limit.
            burst_bytes: None leaves it as it is.
        """
        with self._changed:
            burst_bytes = self._burst_bytes if burst_bytes is None else burst_bytes
            _check(bytes_s, burst_bytes)
            self._fill(self._clock())
            self._bytes_s, self._burst_bytes = bytes_s, burst_bytes
            self._level_bytes = min(self._level_bytes, float(burst_bytes))
            self._changed.notify_all()

    def reserve(self, count_bytes: int, now_s: float) -> float:
        """Book the bytes; they may pass after the seconds returned.

        Args:
            count_bytes: How many.
            now_s: The clock; never earlier than before.
        """
        with self._changed:
            return self._wait_s(self._book(count_bytes, now_s))

    def take(
        self,
        count_bytes: int,
        deadline_s: float | None = None,
        cancelled: threading.Event | None = None,
    ) -> bool:
        """Wait until the bytes may pass.

        Args:
            count_bytes: How many.
            deadline_s: By this clock; None only where a `cancelled` bounds the wait.
            cancelled: Ends the wait within a quarter of a second.

        Returns:
            Whether they may pass: False if it was cancelled.

        Raises:
            DeadlineExceeded: If they may not pass by then. Nothing is booked then.
        """
        with self._changed:
            begun_s = self._clock()
            mark = self._book(count_bytes, begun_s)
            while True:
                now_s = self._clock()
                self._fill(now_s)
                wait_s = self._wait_s(mark)
                if wait_s <= 0:
                    return True
                if cancelled is not None and cancelled.is_set():
                    self._level_bytes += count_bytes
                    return False
                if deadline_s is not None and now_s + wait_s > deadline_s:
                    self._level_bytes += count_bytes
                    self._changed.notify_all()
                    raise DeadlineExceeded(
                        f"leave to move {count_bytes} bytes at {self._bytes_s:g} bytes/s",
                        max(deadline_s - begun_s, 0.0),
                    )
                self._changed.wait(min(wait_s, _LONGEST_NAP_S))

    def _book(self, count_bytes: int, now_s: float) -> int:
        """Returns the mark of this booking: all that was booked up to and with it."""
        assert count_bytes >= 0, count_bytes
        self._fill(now_s)
        self._level_bytes -= count_bytes
        self._reserved_bytes += count_bytes
        return self._reserved_bytes

    def _wait_s(self, mark: int) -> float:
        """What is missing for a booking does not include those that came after it."""
        missing = -(self._level_bytes + (self._reserved_bytes - mark))
        if missing <= 0 or self._bytes_s is None:
            return 0.0
        return missing / self._bytes_s

    def _fill(self, now_s: float) -> None:
        if self._bytes_s is None:
            self._level_bytes = float(self._burst_bytes)
        elif self._filled_s is not None and now_s > self._filled_s:
            grown = self._level_bytes + (now_s - self._filled_s) * self._bytes_s
            self._level_bytes = min(grown, float(self._burst_bytes))
        self._filled_s = now_s


def join_rate(bytes_s: int) -> Rate | None:
    """What all streams to joining ranks share, by `bulk.join_rate_bytes_s`; None for no limit.

    Its burst is an eighth of a second's: a join must not begin with what others would notice.
    """
    return Rate(bytes_s, max(1, min(bytes_s // 8, _DEFAULT_BURST_BYTES))) if bytes_s else None


def _check(bytes_s: float | None, burst_bytes: int) -> None:
    assert bytes_s is None or (bytes_s > 0 and math.isfinite(bytes_s)), bytes_s
    assert burst_bytes > 0, burst_bytes
