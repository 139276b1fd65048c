"""Real agents, each with a socket, a memory directory and an NVMe directory of its own."""

import json
import os
import shutil
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import everstep
from everstep.proto import failpoint
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel
from tests.zygotes import Program

# As themselves: they are fixtures of the folder from here on.
from .bulk_plane import make_units as make_units
from .bulk_plane import nothing_stays_open as nothing_stays_open
from .bulk_plane import start_server as start_server
from .clusters import AgentCluster

DEADLINE_S = 60.0
_POLL_S = 0.01


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Sums must not depend on how many threads a child happens to have.
    torch.set_num_threads(1)


def eventually(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until `condition` holds; return what it returned."""
    deadline = time.monotonic() + deadline_s
    while not (outcome := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {deadline_s} s: {what}")
        time.sleep(_POLL_S)
    return outcome


class AgentProcess:
    """An agent in the foreground of a child process.

    Args:
        nvme_dir: Its durable level; None for none.
        options: Sections of its configuration file, as TOML.
        environ: Added to its environment, e.g. failpoints.
    """

    def __init__(
        self, nvme_dir: Path | None, options: str = "", environ: dict[str, str] | None = None
    ) -> None:
        # In /tmp, since a socket's path must be short.
        self.home = Path(tempfile.mkdtemp(prefix="es-", dir="/tmp"))
        self.memory_dir = Path(tempfile.mkdtemp(prefix="everstep-test-", dir="/dev/shm"))
        self.nvme_dir = nvme_dir
        self.socket = self.home / "a.sock"
        self.address = f"unix:{self.socket}"
        self.log = self.home / "agent.log"
        self.process: Program | None = None
        self._config = self.home / "everstep.toml"
        self._config.write_text(options)
        self._environ = environ or {}

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def memory(self) -> MemoryLevel:
        """Its memory level, to look at and to damage."""
        return MemoryLevel(self.memory_dir, keep_free_bytes=0)

    @property
    def nvme(self) -> NvmeLevel:
        """Its durable level, to look at."""
        assert self.nvme_dir is not None
        return NvmeLevel(self.nvme_dir, write_threads=1, chunk_bytes=1 << 20, direct=False)

    def start(self, environ: dict[str, str] | None = None) -> None:
        """Start it, and wait until its socket answers."""
        command = ["-m", "everstep.agent", "agent", "--node-id", "n0"]
        command += ["--socket", str(self.socket), "--memory-dir", str(self.memory_dir)]
        command += ["--nvme-dir", str(self.nvme_dir or ""), "--config", str(self._config)]
        added = {**self._environ, **(environ or {})}
        self.process = Program("agent", *command, environ=added, log=self.log)
        eventually(self._answers, f"an answer at {self.address}: {self.log.read_text()[-2000:]}")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM; the exit status once it has ended."""
        return self._end(signal.SIGTERM)

    def restart(self) -> None:
        """SIGKILL it and start it again on the same directories."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End it and remove what it left."""
        if self.process is not None and self.process.poll() is None:
            self.cont()
            self.kill()
        shutil.rmtree(self.memory_dir, ignore_errors=True)
        shutil.rmtree(self.home, ignore_errors=True)

    def steps_in_memory(self, job: str) -> list[int]:
        """The steps whose shards of all ranks are recorded beside the arenas."""
        return [snapshot.step for snapshot in self.memory.snapshots(job)]

    def steps_on_nvme(self, job: str) -> list[int]:
        """The steps committed on NVMe."""
        return [commit.step for commit in self.nvme.commits(job)]

    def flip(self, job: str, step: int, rank: int = 0, *, from_end: int = 1) -> None:
        """Change one byte of a shard in memory, counted from the end of its image."""
        (held,) = [
            one for one in self.memory.records(job) if (one.snapshot.step, one.rank) == (step, rank)
        ]
        at = held.slot * held.arena.slot_bytes + held.record.image_bytes - from_end
        with held.arena.path.open("r+b") as arena:
            arena.seek(at)
            (byte,) = arena.read(1)
            arena.seek(at)
            arena.write(bytes([byte ^ 0x40]))


@pytest.fixture
def start_agent(tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    """Starts agents that end with the test."""
    started: list[AgentProcess] = []

    def start(options: str = "", environ: dict[str, str] | None = None) -> AgentProcess:
        agent = AgentProcess(tmp_path / f"nvme-{len(started)}", options, environ)
        started.append(agent)
        agent.start()
        return agent

    yield start
    for agent in started:
        agent.close()


@pytest.fixture
def agent_process(start_agent: Callable[..., AgentProcess]) -> AgentProcess:
    """An agent of this test's own."""
    return start_agent()


@pytest.fixture(scope="session")
def shared_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """One agent for all tests that leave it alone; jobs keep them apart."""
    agent = AgentProcess(tmp_path_factory.mktemp("nvme"), "[agent]\nmax_jobs = 1024\n")
    agent.start()
    yield agent
    agent.close()


@pytest.fixture
def job() -> str:
    """A name that no other test uses."""
    return f"job-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def connect(shared_agent: AgentProcess, job: str) -> Iterator[Callable[..., everstep.Client]]:
    """Connects to the shared agent; a second time as the trainer that follows a crash."""
    clients: list[everstep.Client] = []

    def connected(**options: Any) -> everstep.Client:
        chosen = {"job": job, "agent": shared_agent.address, "rank": 0, "world": 1, **options}
        client = everstep.connect(**chosen)
        clients.append(client)
        return client

    yield connected
    for client in clients:
        client.close(timeout=0)


class Trainer:
    """The script trainer.py in a process.

    Args:
        environ: Added to its environment.
        arguments: See there.
    """

    def __init__(self, environ: dict[str, str], arguments: tuple[str, ...]) -> None:
        script = str(Path(__file__).parent / "trainer.py")
        errors = Path("/dev/stderr")
        self.process = Program(
            "trainer", script, *arguments, environ=environ, log=errors, piped=True
        )

    def facts(self, count: int = 1) -> dict[str, dict[str, Any]]:
        """The next lines of what it says, by case."""
        assert self.process.stdout is not None
        lines = [json.loads(self.process.stdout.readline()) for _ in range(count)]
        return {line["case"]: line for line in lines}

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.ended()

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def start_trainer() -> Iterator[Callable[..., Trainer]]:
    """Starts trainers that end with the test; the first argument is their agent, or None."""
    started: list[Trainer] = []

    def start(agent: AgentProcess | None, *arguments: str, **environ: str) -> Trainer:
        if agent is not None:
            environ["EVERSTEP_AGENT"] = agent.address
        started.append(Trainer(environ, arguments))
        return started[-1]

    yield start
    for trainer in started:
        if trainer.process.poll() is None:
            trainer.kill()
        for stream in (trainer.process.stdin, trainer.process.stdout):
            assert stream is not None
            stream.close()


class Hold:
    """A failpoint that holds whoever reaches it first, until it is opened."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def reached(self) -> None:
        """Wait until somebody is held."""
        eventually(Path(f"{self._path}.reached").exists, f"{self._path} reached")

    def open(self) -> None:
        """Let them go."""
        Path(f"{self._path}.go").touch()


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hold]]:
    """Arms a failpoint of this process's capture: it holds at its n-th passage from now on."""
    holds: list[Hold] = []

    def armed(name: str = "client.capture.block", nth: int = 1) -> Hold:
        path = tmp_path / f"hold-{len(holds)}"
        point = failpoint._armed(f"{name}=hold:{path}@{nth}")
        for module in ("snapshot.capture", "client.capturing", "snapshot.restore"):
            monkeypatch.setattr(f"everstep.{module}.failpoint", point)
        holds.append(Hold(path))
        return holds[-1]

    yield armed
    for held in holds:
        held.open()


@pytest.fixture
def start_cluster() -> Iterator[Callable[..., AgentCluster]]:
    """Starts agents that know each other, so many; they end with the test. See `AgentCluster`."""
    started: list[AgentCluster] = []

    def start(count: int, options: str = "", **more: Any) -> AgentCluster:
        cluster = AgentCluster(options, **more)
        started.append(cluster)
        cluster.start(count)
        return cluster

    yield start
    for cluster in started:
        cluster.close()
