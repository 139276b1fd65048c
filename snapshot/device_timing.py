"""When a capture's parts began and ended on the device, and what the next one learns from that.

Owns the timed marks of one `DeviceCapture`, and what they tell the device's `Window`. Promises that
times are the device's own: the host, which is up to a step ahead of it, knows none of them. They
can be read once all marks have been passed; waits for nothing.
"""

from collections.abc import Iterator

from everstep.snapshot.device import Device, Mark

MEASURED_BYTES = 16 << 20
"""Shorter copies say little about the bandwidth."""
LATE_START_S = 0.002
"""A first copy that began later than this after the snapshot waited for another capture's."""

Run = tuple[Mark, Mark, int]
"""Copies one after the other: before the first, after the last, and their bytes."""


class Timing:
    """The timed marks of one capture.

    Attributes:
        begun: On the update lane, at the snapshot.
        opened: On the copies' lane, where the first copy could begin.
        fenced: On the update lane, where it begins to wait.
        awaited: After the last copy that it waits for.
        window: The copies from live leaves.
    """

    def __init__(self) -> None:
        self.begun: Mark | None = None
        self.opened: Mark | None = None
        self.fenced: Mark | None = None
        self.awaited: Mark | None = None
        self.window: Run | None = None

    def marks(self) -> Iterator[Mark]:
        """Those that must be passed before the times can be read."""
        last = None if self.window is None else self.window[1]
        for mark in (last, self.fenced, self.awaited):
            if mark is not None:
                yield mark

    def tell(
        self, device: Device, scratch: Run | None, *, was_limited: bool, cloned: bool
    ) -> float:
        """Tell the device's window of everything; return for how long the update waited, in s.

        Args:
            device: Whose marks they are.
            scratch: The copies of clones.
            was_limited: Whether the window was what limited the copies before the update.
            cloned: Whether there were clones: without, less than the window may have been there.
        """
        window = device.window
        compute_s = wait_s = update_wait_s = 0.0
        if self.begun is not None and self.opened is not None:
            wait_s = device.seconds(self.begun, self.opened)
            window.observe_wait(wait_s)
        if self.fenced is not None and self.begun is not None:
            compute_s = device.seconds(self.begun, self.fenced)
            if self.awaited is not None:
                update_wait_s = max(0.0, device.seconds(self.begun, self.awaited) - compute_s)
        if not was_limited:
            window.observe_update(compute_s, None)
            return update_wait_s
        for run in (self.window, scratch):
            if run is not None and run[2] >= MEASURED_BYTES:
                window.observe_bandwidth(run[2], device.seconds(run[0], run[1]))
        late_s = None
        if self.window is not None and self.begun is not None:
            late_s = device.seconds(self.begun, self.window[1]) - compute_s
            # Late because it began late says nothing of how much fits.
            if wait_s > LATE_START_S or (late_s <= 0 and not cloned):
                late_s = None
        window.observe_update(compute_s, late_s)
        return update_wait_s
