"""Which process is which: a pid, and when it started.

Owns the one way in which a process is told apart from a later one with the same pid. Promises a
start time that no change of the wall clock moves: it counts from boot, in ticks of the kernel.
Does not see processes of another pid namespace.
"""

import os
from pathlib import Path

_STATE, _START = 0, 19
"""Places of these fields of proc_pid_stat(5) after the name, which may contain anything."""


def started_s(pid: int) -> float | None:
    """When a process started, in seconds since boot; None if it has ended or is a zombie."""
    if pid <= 0:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        if fields[_STATE] in (b"Z", b"X"):
            return None
        return int(fields[_START]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None
