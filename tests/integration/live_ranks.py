"""Ranks of a job that joins are tried on: the script live_trainer.py, driven step by step."""

import json
import os
import selectors
import signal
import time
from pathlib import Path
from typing import Any

from tests.zygotes import Program

DEADLINE_S = 60.0


class LiveRank:
    """One rank as a process.

    Args:
        address: Of its agent.
        rank: Which.
        world: Of how many.
        log: Where its errors go.
        arguments: See live_trainer.py.
    """

    def __init__(self, address: str, rank: int, world: int, log: Path, *arguments: str) -> None:
        self.rank = rank
        self.facts: dict[str, Any] = {}
        """What it said last."""
        self._log = log
        self._begun = b""
        script = str(Path(__file__).parent / "live_trainer.py")
        environ = {"RANK": str(rank), "WORLD_SIZE": str(world), "EVERSTEP_AGENT": address}
        self.process = Program("trainer", script, *arguments, environ=environ, log=log, piped=True)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def says(self, event: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """The next thing it says, which must be this."""
        fact = self._next(time.monotonic() + deadline_s)
        assert fact["event"] == event, (fact, self._words())
        return fact

    def begin(self, step: int) -> None:
        """Have it do a step; what comes of it is the next thing it says."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"%d\n" % step)
        self.process.stdin.flush()

    def step(self, step: int) -> dict[str, Any]:
        """Have it do a step, and wait for what it says."""
        self.begin(step)
        return self.says("step")

    def kill(self) -> None:
        """SIGKILL."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End it."""
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _next(self, deadline: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._begun:
                left_s = deadline - time.monotonic()
                assert left_s > 0 and selector.select(left_s), f"silent: {self._words()}"
                more = self.process.stdout.read()
                assert more != b"", f"it ended: {self._words()}"
                self._begun += more or b""
        first, _, self._begun = self._begun.partition(b"\n")
        self.facts = json.loads(first)
        return self.facts

    def _words(self) -> str:
        return f"rank {self.rank}: {self._log.read_text(errors='replace')[-3000:]}"
