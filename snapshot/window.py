"""How much of a state can leave the device before the next update overtakes the copy.

Owns the estimate: a biased product of the recent bandwidth and the shortest recent time from
snapshot to update, less the time for which the copies of earlier captures kept the bus from a new
one. All of it is measured on the device: the host, which is ahead of it by up to a step, cannot
know what will be left of an earlier capture when a new one begins there. Promises 0 until both
were measured: then everything is cloned at the update, which is right, and measured. Pure: no
device, no clock; safe to use from several threads.

The bias falls at once, rises slowly, and leaves a third of the time idle, because the two
mistakes differ: a byte too few is cloned on the device, sixty times faster than it crosses PCIe,
and leaves right behind the window; a byte too many makes the update wait. So it pays to allow for a
bus that is slower now and then: on H100s that others share, one capture in six left the device at
three quarters of the usual speed.
"""

import threading
from collections import deque

FIRST_BIAS = 0.7
LOWEST_BIAS = 0.5
_MOST_BIAS = 0.92
"""Where room for a slower bus would have to be taken from other captures."""
RECENT = 8
RECENT_WAITS = 2
"""A cadence that changes shows at once; one that alternates has a wait at every second."""
_IDLE_SHARE = 0.33
"""Copies that end more than this share of the time before the update could have been more."""
_RAISE = 0.03
"""Of what was idle beyond that share."""


class Window:
    """The estimate for one device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bias = FIRST_BIAS
        self._compute_s: deque[float] = deque(maxlen=RECENT)
        self._bandwidths: deque[float] = deque(maxlen=RECENT)
        self._waits_s: deque[float] = deque(maxlen=RECENT_WAITS)
        self._periods_s: deque[float] = deque(maxlen=RECENT_WAITS)
        self._began_s: float | None = None

    @property
    def bias(self) -> float:
        """The share of the product that is used."""
        return self._bias

    @property
    def compute_s(self) -> float | None:
        """The shortest recent time from a snapshot to the update after it, if any was seen."""
        with self._lock:
            return min(self._compute_s, default=None)

    def bytes(self, total_bytes: int, *, pauses: bool = False) -> int:
        """How many bytes of a new capture to copy before its update.

        Args:
            total_bytes: Of the capture.
            pauses: Whether what is left cannot leave before the update has come: room for a slower
                bus is then taken from the captures that follow, and left only if they have it.
        """
        with self._lock:
            if not self._compute_s or not self._bandwidths:
                return 0
            # The median: one capture that shared the bus with a restore says little.
            bandwidth = sorted(self._bandwidths)[len(self._bandwidths) // 2]
            compute_s = min(self._compute_s)
            share = self._bias
            if pauses and self._periods_s:
                needed = total_bytes - (min(self._periods_s) - compute_s) * bandwidth
                share = max(share, min(needed / (compute_s * bandwidth), _MOST_BIAS))
            most = share * compute_s * bandwidth
            # Captures keep the bus from each other where too much of each is left for after its
            # update. To copy less before, because of that, would keep it so.
            rest_s = compute_s + (total_bytes - most) / bandwidth
            if self._periods_s and rest_s <= min(self._periods_s):
                return int(most)
            left_s = compute_s - max(self._waits_s, default=0.0)
            return max(0, int(share * left_s * bandwidth))

    def observe_wait(self, seconds: float) -> None:
        """Note how long after a snapshot its first copy could begin, on the device."""
        with self._lock:
            self._waits_s.append(max(0.0, seconds))

    def began(self, now_s: float) -> None:
        """Note that a snapshot begins; only differences of the times matter."""
        with self._lock:
            if self._began_s is not None:
                self._periods_s.append(now_s - self._began_s)
            self._began_s = now_s

    def observe_bandwidth(self, copied_bytes: int, seconds: float) -> None:
        """Note that so many bytes left the device, one after the other, in this time."""
        if copied_bytes > 0 and seconds > 0:
            with self._lock:
                self._bandwidths.append(copied_bytes / seconds)

    def observe_update(self, compute_s: float, late_s: float | None) -> None:
        """Note one update.

        Args:
            compute_s: From the snapshot to the update, on the device.
            late_s: How long after it the window's last copy ended; negative if before. None if
                the window was not what limited the copy.
        """
        if compute_s <= 0:
            return
        with self._lock:
            self._compute_s.append(compute_s)
            if late_s is None:
                return
            if late_s > 0:
                lowered = self._bias * (1 - min(0.1, 0.01 + late_s / compute_s))
                self._bias = max(LOWEST_BIAS, lowered)
            elif -late_s > _IDLE_SHARE * compute_s:
                idle = -late_s / compute_s - _IDLE_SHARE
                self._bias = min(1.0, self._bias + _RAISE * idle)
