"""All ranks of one launch of the demo's cluster job, as processes, followed by their diaries.

Owns their start and their end. Promises to end only processes it started, by their id, and that
following them is bounded. Whoever uses it says which rank runs on which node.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from everstep.client.demo.diary import Entry, Follower
from everstep.client.demo.processes import ProcessFailed
from everstep.client.environment import for_child
from everstep.proto.errors import DeadlineExceeded

_POLL_S = 0.01
_SILENCE_S = 180.0
_END_S = 20.0


class Fleet:
    """One launch.

    Args:
        home: The demo's own directory, for diaries and logs.
        number: Of the launch.
        options: Of `everstep.client.demo.rank`, but for those that differ by rank.
        followers: Of the ranks' diaries; shared by all launches of the run.
        environs: What each rank's environment says of its agent.
    """

    def __init__(
        self,
        home: Path,
        number: int,
        options: Mapping[str, object],
        followers: Sequence[Follower],
        environs: Sequence[Mapping[str, str | None]],
    ) -> None:
        self._followers = followers
        self._logs = [home / f"trainer-{rank}.log" for rank in range(len(followers))]
        self._processes: list[subprocess.Popen[bytes]] = []
        world = len(followers)
        meeting = home / f"meeting-{options['name']}-{number}"
        for rank, (log, environ) in enumerate(zip(self._logs, environs, strict=True)):
            own = {**options, "meeting": meeting, "rank": rank, "world": world}
            # torch makes it, in the user's temporary directory unless it is told where.
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(home / "torch")}
            self._processes.append(_start(own, log, {**cache, **environ}))

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """What the ranks note, as they do, until all have ended well.

        Raises:
            ProcessFailed: If one ends otherwise.
            DeadlineExceeded: If all are silent for too long.
        """
        deadline = time.monotonic() + _SILENCE_S
        while True:
            statuses = [process.poll() for process in self._processes]
            fresh = self._poll()
            yield from fresh
            if fresh:
                deadline = time.monotonic() + _SILENCE_S
            elif any(statuses):
                rank = next(rank for rank, status in enumerate(statuses) if status)
                raise ProcessFailed(
                    f"the trainer of rank {rank}", statuses[rank] or 0, self._logs[rank]
                )
            elif all(status == 0 for status in statuses):
                return
            elif time.monotonic() > deadline:
                late = tuple(str(log) for log in self._logs)
                raise DeadlineExceeded("progress in training", _SILENCE_S, late)
            else:
                time.sleep(_POLL_S)

    def _poll(self) -> list[tuple[int, Entry]]:
        return [
            (rank, entry)
            for rank, follower in enumerate(self._followers)
            for entry in follower.poll()
        ]

    def kill(self, ranks: Sequence[int]) -> bool:
        """SIGKILL; whether it was that which ended all of them."""
        for rank in ranks:
            self._processes[rank].kill()
        return all(self._processes[rank].wait(_END_S) == -signal.SIGKILL for rank in ranks)

    def close(self) -> None:
        """End what still runs, and read the last entries."""
        self.kill(range(len(self._processes)))
        self._poll()


def _start(
    options: Mapping[str, object], log: Path, environ: Mapping[str, str | None]
) -> subprocess.Popen[bytes]:
    # -P, since the demo may be run in a checkout, where everstep/ is the face alone.
    command = [sys.executable, "-P", "-m", "everstep.client.demo.rank"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    clean: dict[str, str | None] = {
        "RANK": None,
        "WORLD_SIZE": None,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        # Threads that wait for work by spinning steal the time of whatever else runs here.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_DYNAMIC": "FALSE",
    }
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env=for_child({**clean, **environ}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
