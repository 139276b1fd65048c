"""The handle that `Client.snapshot` returns.

Owns one snapshot's outcome as the trainer sees it. Promises that `wait` is bounded and says who
is late, and that a handle's outcome never changes once it is skipped or dropped. Keeps no tensors.
"""

import threading
import time
from collections.abc import Callable

from everstep.proto.errors import DeadlineExceeded, NotPersisted, Refused

LEVELS = ("memory", "parity", "nvme")
"""Weakest first. Parity and NVMe each follow memory, in any order."""


class Snapshot:
    """One call of `Client.snapshot`.

    Attributes:
        step: As given.
        skipped: Why nothing was captured, e.g. "not due" or "busy: ..."; empty if it was.
        dropped: Why a capture that was begun will never commit; empty otherwise.
    """

    def __init__(self, step: int, skipped: str = "") -> None:
        self.step = step
        self.skipped = skipped
        self.dropped = ""
        self._sealed = False
        self._committed: set[str] = set()
        self._changed = threading.Condition()
        self._help: Callable[[], object] | None = None
        self._persist: Callable[[float], str] | None = None
        self._levels: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """ "skipped", "dropped", "copying", "sealed", "memory", "parity" or "nvme"."""
        if self.skipped:
            return "skipped"
        if self.dropped:
            return "dropped"
        for level in reversed(LEVELS):
            if level in self._committed:
                return level
        return "sealed" if self._sealed else "copying"

    def done(self, level: str = "memory") -> bool:
        """Whether the snapshot is committed at a level: by all ranks, not only this one.

        Args:
            level: "memory", "parity" (of this step, or of a newer one) or "nvme".
        """
        _check_level(level)
        return level in self._committed

    def wait(self, level: str = "memory", timeout: float = 60.0) -> bool:
        """Wait until the snapshot is committed at a level; helps copying meanwhile.

        Args:
            level: "memory", "parity" (of this step, or of a newer one) or "nvme"; for "nvme" a
                flush is asked for.
            timeout: In seconds.

        Returns:
            False if it was skipped or dropped, and so never will be.

        Raises:
            DeadlineExceeded: If neither happens in time.
            Refused: If the agent has no such level.
            NotPersisted: If the flush to NVMe failed; says why.
        """
        _check_level(level)
        if self._levels and level not in self._levels:
            raise Refused(
                f"this agent has no level {level!r}, only {', '.join(self._levels)}. Parity needs "
                "other agents: name them with `--peer`; NVMe needs `--nvme-dir`."
            )
        deadline = time.monotonic() + timeout
        help_copying = self._help
        if help_copying is not None:
            help_copying()
        self._wait_for("memory", deadline, timeout)
        if level == "parity" and not self._ended():
            self._wait_for("parity", deadline, timeout)
        if level == "nvme" and not self._ended() and self._persist is not None:
            if not self.done("nvme"):
                problem = self._persist(max(0.0, deadline - time.monotonic()))
                if problem and not self.done("nvme") and time.monotonic() < deadline:
                    raise NotPersisted(self.step, problem)
            self._wait_for("nvme", deadline, timeout)
        return level in self._committed

    def _ended(self) -> bool:
        return bool(self.skipped or self.dropped)

    def _wait_for(self, level: str, deadline: float, timeout: float) -> None:
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: level in self._committed or self._ended(), deadline - time.monotonic()
            )
        if not arrived:
            late = () if self._sealed else ("this rank",)
            what = f"the commit of step {self.step} at level {level!r}"
            raise DeadlineExceeded(what, timeout, late or ("other ranks or the agent",))

    def on_wait(
        self,
        help_copying: Callable[[], object],
        persist: Callable[[float], str],
        levels: tuple[str, ...] = (),
    ) -> None:
        """Say what a waiting thread can do, and which levels there are. For the client."""
        self._levels = levels
        self._help = help_copying
        self._persist = persist

    def mark(self, *, sealed: bool = False, committed: str = "", dropped: str = "") -> bool:
        """Note progress; return whether it changed the outcome. For the client."""
        with self._changed:
            before = self.state
            self._sealed = self._sealed or sealed
            if committed:
                # Nothing is protected or flushed but what memory had committed.
                self._committed |= {"memory", committed}
            elif dropped and not self._committed:
                self.dropped = self.dropped or dropped
            if self._sealed or self._committed or self.dropped:
                self._help = None  # it holds on to the state that was captured
            self._changed.notify_all()
            return self.state != before

    def __repr__(self) -> str:
        why = self.skipped or self.dropped
        return f"Snapshot(step={self.step}, {self.state}{': ' + why if why else ''})"


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise Refused(f"there is no level {level!r}; levels are {', '.join(LEVELS)}.")
