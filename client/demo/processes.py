"""The processes that the demo starts, follows and kills.

Owns a trainer as a child, and the agent that the trainer's client has started. Promises to touch
no process but these, each found by what it is and not by its name; that following one is bounded;
and that `end_agent` leaves nothing in memory. Does not know what the trainer computes.
"""

import shutil
import signal
import socket as sockets
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from everstep.client.demo.diary import Entry, Follower
from everstep.client.environment import for_child, places
from everstep.proto.errors import DeadlineExceeded, EverstepError

_POLL_S = 0.01
_SILENCE_S = 120.0
_END_S = 20.0
_CREDENTIALS = struct.Struct("3i")


class ProcessFailed(EverstepError):
    """A process of the demo ended by itself.

    Attributes:
        log: Where its last words are.
    """

    def __init__(self, who: str, status: int, log: Path) -> None:
        self.log = log
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        super().__init__(
            f"{who} ended with status {status} ({' '.join(last) or 'it said nothing'}). "
            f"All that it said is in {log}; your own jobs and their state were not touched."
        )


class Trainer:
    """One trainer process.

    Args:
        home: The demo's own EVERSTEP_HOME.
        options: Of `everstep.client.demo.trainer`.
        follower: Of the run's diary; shared by all processes of the run.
    """

    def __init__(self, home: Path, options: dict[str, object], follower: Follower) -> None:
        self._follower = follower
        self._log = home / "trainer.log"
        # -P, since the demo may be run in a checkout, where everstep/ is the face alone.
        command = [sys.executable, "-P", "-m", "everstep.client.demo.trainer"]
        command += [f"--{name}={value}" for name, value in options.items()]
        environ = for_child(
            {
                "EVERSTEP_HOME": str(home),
                "EVERSTEP_AGENT": None,
                "RANK": None,
                "WORLD_SIZE": None,
                # Threads that wait for work by spinning steal the time of whatever else runs here.
                "OMP_WAIT_POLICY": "PASSIVE",
                "OMP_DYNAMIC": "FALSE",
                # torch makes it, in the user's temporary directory unless it is told where.
                "TORCHINDUCTOR_CACHE_DIR": str(home / "torch"),
            }
        )
        self.started_s = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def entries(self) -> Iterator[Entry]:
        """What the trainer notes, as it does, until it has ended well.

        Raises:
            ProcessFailed: If it ends otherwise.
            DeadlineExceeded: If it is silent for too long.
        """
        deadline = time.monotonic() + _SILENCE_S
        while True:
            status = self._process.poll()
            fresh = self._follower.poll()
            yield from fresh
            if fresh:
                deadline = time.monotonic() + _SILENCE_S
            elif status is not None:
                break
            elif time.monotonic() > deadline:
                late = f"the trainer (see trainer.log and agent.log in {self._log.parent})"
                raise DeadlineExceeded("progress in training", _SILENCE_S, (late,))
            else:
                time.sleep(_POLL_S)
        if status:
            raise ProcessFailed("the trainer", status, self._log)

    def kill(self) -> None:
        """SIGKILL, without waiting."""
        self._process.kill()

    def wait(self) -> bool:
        """After `kill`: wait for the end, read the last entries, and say if the kill did it."""
        status = self._process.wait(_END_S)
        self._follower.poll()
        return status == -signal.SIGKILL


def agent_of(home: Path) -> psutil.Process | None:
    """The agent that answers at a home's socket, by the kernel's word; None if none does."""
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(places({"EVERSTEP_HOME": str(home)}).socket))
            credentials = probe.getsockopt(
                sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size
            )
            return psutil.Process(_CREDENTIALS.unpack(credentials)[0])
        except (OSError, psutil.NoSuchProcess):
            return None


def wait_for_end(process: psutil.Process) -> None:
    """Wait until a process that was told to end has; whoever its parent is may not have noticed.

    Raises:
        DeadlineExceeded: If it has not in time.
    """
    deadline = time.monotonic() + _END_S
    while _runs(process):
        if time.monotonic() > deadline:
            raise DeadlineExceeded("the end of the demo's agent", _END_S, (f"pid {process.pid}",))
        time.sleep(_POLL_S)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_agent(home: Path) -> None:
    """End a home's agent, if there is one, and give back the memory it held."""
    agent = agent_of(home)
    if agent is not None:
        # What is on NVMe is about to be deleted, so there is no need for a last flush.
        agent.kill()
        wait_for_end(agent)
    mine = places({"EVERSTEP_HOME": str(home)})
    shutil.rmtree(mine.memory_dir, ignore_errors=True)
    if home not in mine.socket.parents:
        # A home with a long name has its socket elsewhere.
        mine.socket.unlink(missing_ok=True)
