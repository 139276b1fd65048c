"""Named points at which a test can kill, stop, fail or hold the process.

Owns the syntax of ``EVERSTEP_FAILPOINTS``: ``name=action`` pairs separated by ``;``, where action
is ``kill``, ``stop``, ``exit``, ``error:ENOSPC`` (any errno name) or ``hold:PATH``, each
optionally followed by ``@N`` to act at the N-th passage only. ``hold`` creates ``PATH.reached``
and waits until ``PATH.go`` exists. With the variable unset, `failpoint` is an empty function.
Promises nothing to production code, which never sets the variable.
"""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_VARIABLE = "EVERSTEP_FAILPOINTS"
_HOLD_LIMIT_S = 120.0


class _Point:
    def __init__(self, specification: str) -> None:
        action, _, nth = specification.partition("@")
        self.action, _, self.argument = action.partition(":")
        self.nth = int(nth) if nth else 0
        self.passages = 0
        self.lock = threading.Lock()

    def reached(self) -> None:
        with self.lock:
            self.passages += 1
            due = not self.nth or self.passages == self.nth
        if due:
            self.act()

    def act(self) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            # To this thread, which must not get any further until the others have stopped too.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        elif self.action == "exit":
            os._exit(3)
        elif self.action == "error":
            code = getattr(errno, self.argument)
            raise OSError(code, os.strerror(code))
        elif self.action == "hold":
            Path(self.argument + ".reached").touch()
            deadline = time.monotonic() + _HOLD_LIMIT_S
            while not Path(self.argument + ".go").exists() and time.monotonic() < deadline:
                time.sleep(0.005)
        else:
            sys.exit(f"{_VARIABLE}: unknown action {self.action!r}")


def _nothing(name: str) -> None:
    pass


def _armed(variable: str) -> Callable[[str], None]:
    points = {
        name.strip(): _Point(specification.strip())
        for name, _, specification in (pair.partition("=") for pair in variable.split(";") if pair)
    }

    def failpoint(name: str) -> None:
        point = points.get(name)
        if point is not None:
            point.reached()

    return failpoint


_setting = os.environ.get(_VARIABLE, "")  # noqa: TID251  set by tests only, before the start
failpoint: Callable[[str], None] = _armed(_setting) if _setting else _nothing
"""Call as ``failpoint("agent.seal.before_record")``: names are ``process.verb.moment``."""
