"""Processes of the tests: each known by its pid, many forked by warm ones that have imported torch.

Nothing here sleeps in the hope that something has happened: processes are waited for by pidfd,
everything else is looked at until a deadline.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

Thing = TypeVar("Thing")
SCRIPT = Path(__file__).with_name("zygote.py")
DEADLINE_S = 30.0
POLL_S = 0.005
OWN_ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    "PYTHONSAFEPATH": "1",
}


def until(condition: Callable[[], Thing], what: str, within_s: float = DEADLINE_S) -> Thing:
    """The first true value of a condition, which is looked at again and again."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {within_s:g} s")
        time.sleep(POLL_S)


class Process:
    """A process that is ours, by its pid; its log is a file."""

    def __init__(self, pid: int, log: Path, reap: Callable[[], int]) -> None:
        self.pid = pid
        self.log = log
        self.code: int | None = None
        self._reap = reap
        self._descriptor = os.pidfd_open(pid)

    @property
    def alive(self) -> bool:
        return self.code is None and not select.select([self._descriptor], [], [], 0)[0]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stacks(self) -> str:
        """What it is doing, in its log: for the message about a process that hangs."""
        before = len(self.text())
        self.signal(signal.SIGUSR1)
        with contextlib.suppress(TimeoutError):
            until(lambda: "most recent call first" in self.text()[before:], "a dump", 2.0)
        return self.text()[-6000:]

    def signal(self, number: int) -> None:
        if self.code is None:
            signal.pidfd_send_signal(self._descriptor, number)

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self.signal(signal.SIGSTOP)
        self.until_stopped()

    def until_stopped(self) -> None:
        tasks = Path(f"/proc/{self.pid}/task")

        def stopped() -> bool:
            states = [
                (task / "stat").read_text().rsplit(")", 1)[1].split()[0] for task in tasks.iterdir()
            ]
            return set(states) == {"T"}

        until(stopped, f"process {self.pid} stopping")

    def proceed(self) -> None:
        self.signal(signal.SIGCONT)

    def ended(self, within_s: float = DEADLINE_S) -> int:
        """Wait for the end; the exit status, negative for a signal."""
        if self.code is None:
            if not select.select([self._descriptor], [], [], within_s)[0]:
                raise TimeoutError(
                    f"process {self.pid} runs on after {within_s:g} s\n" + self.stacks()
                )
            self.code = self._reap()
            os.close(self._descriptor)
        return self.code

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.signal(signal.SIGKILL)
        self.ended()


class Zygote:
    """A warm process that forks others; see zygote.py. Threads may share it."""

    def __init__(self, kind: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), kind, str(theirs.fileno())],
                env={**OWN_ENVIRONMENT, "EVERSTEP_FAILPOINTS": "unused=exit"},
                pass_fds=[theirs.fileno()],
            )
        self._control = ours
        self._lock = threading.Lock()
        self._ready = False

    def fork(
        self,
        log: Path,
        environ: dict[str, str],
        failpoints: str,
        descriptors: tuple[int, ...] = (),
        **request: Any,
    ) -> Process:
        request |= {"environ": environ, "failpoints": failpoints}
        with log.open("ab") as output:
            pid = self._ask(request, output.fileno(), *descriptors)
        return Process(pid, log, lambda: self._ask({"reap": pid}))

    def close(self) -> None:
        self._control.close()
        self._process.wait(DEADLINE_S)

    def _ask(self, request: dict[str, Any], *descriptors: int) -> Any:
        with self._lock:
            if not self._ready:
                self._answer()
                self._ready = True
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
            return self._answer()

    def _answer(self) -> Any:
        data = self._control.recv(4096)
        assert data, "the zygote died"
        return json.loads(data)


@functools.cache
def zygote(kind: str) -> Zygote:
    """The one of this kind, "agent" or "trainer", that all tests of this process share."""
    started = Zygote(kind)
    atexit.register(started.close)
    return started


class Program:
    """What `python` runs, without the seconds that it takes to import torch; as `subprocess.Popen`.

    It leads a session of its own.

    Args:
        kind: Of its zygote.
        command: A script's path or -m and a module's name, and arguments.
        environ: Added to the environment of this process.
        log: Gets what it says and its errors.
        piped: Its input and output are pipes: `log` gets its errors alone.
    """

    def __init__(
        self, kind: str, *command: str, environ: dict[str, str], log: Path, piped: bool = False
    ) -> None:
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        theirs: tuple[int, ...] = ()
        if piped:
            (their_input, our_input), (our_output, their_output) = os.pipe(), os.pipe()
            self.stdin, self.stdout = os.fdopen(our_input, "wb"), os.fdopen(our_output, "rb")
            theirs = (their_input, their_output)
        environ = {**os.environ, **environ}
        failpoints = environ.pop("EVERSTEP_FAILPOINTS", "")
        self._process = zygote(kind).fork(log, environ, failpoints, theirs, command=command)
        for descriptor in theirs:
            os.close(descriptor)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.code

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return None if self._process.alive else self._process.ended()

    def wait(self, timeout: float = DEADLINE_S) -> int:
        """The same, once it has ended."""
        return self._process.ended(timeout)

    def send_signal(self, number: int) -> None:
        self._process.signal(number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
