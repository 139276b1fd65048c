"""Finding this user's agent, or starting one.

Owns the embedded default: an agent of the user's own, started once, that outlives the trainer.
Promises that several ranks that start at once end up with one agent. Does not import the agent:
it runs as a process of its own.
"""

import os
import socket as sockets
import subprocess
import sys
import time
from pathlib import Path

from everstep.client.environment import named_agent, places
from everstep.proto.errors import AgentUnavailable
from everstep.proto.places import Places, private_directory

_POLL_S = 0.02


def find_agent(address: str | None, timeout_s: float) -> str:
    """The address of a running agent.

    Args:
        address: As the user gave it; None takes ``EVERSTEP_AGENT``, else this user's own agent,
            which is started if it is not running.
        timeout_s: How long a starting agent may take.

    Raises:
        AgentUnavailable: If none answers in time.
    """
    named = named_agent(address)
    if named is not None:
        return named
    mine = places()
    if not _answers(mine.socket):
        _start(mine, timeout_s)
    return mine.address


def _answers(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _start(mine: Places, timeout_s: float) -> None:
    private_directory(mine.socket.parent, os.getuid())
    mine.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = {
        "--socket": mine.socket,
        "--memory-dir": mine.memory_dir,
        "--nvme-dir": mine.nvme_dir,
    }
    command = [sys.executable, "-P", "-m", "everstep.agent", "agent"]
    command += [str(word) for option in options.items() for word in option]
    with mine.log.open("ab") as log:
        # A session of its own: it must survive the trainer and the terminal.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=True,
            cwd="/",
        )
    deadline = time.monotonic() + timeout_s
    while not _answers(mine.socket):
        # An agent that lost the race for the lock ends at once; the winner will answer.
        if time.monotonic() > deadline:
            status = process.poll()
            how = "is still starting" if status is None else f"ended with status {status}"
            raise AgentUnavailable(
                mine.address, f"the agent that was started {how}; see {mine.log}"
            )
        time.sleep(_POLL_S)
