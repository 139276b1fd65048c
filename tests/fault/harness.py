"""One node of real processes to break: an agent, its trainers, and the directories between them.

Nothing here sleeps in the hope that something has happened: see tests/zygotes.py.
"""

import json
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from everstep.proto import agent_pb2 as wire
from everstep.proto.agent_pb2_grpc import AgentStub
from everstep.proto.wire_errors import decode
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel
from tests.zygotes import DEADLINE_S, OWN_ENVIRONMENT, Process, Zygote, until

HERE = Path(__file__).parent


class TrainerDied(Exception):
    """The trainer ended in the middle of a command."""


class TrainerError(Exception):
    """A command raised, in the trainer, what its user would have seen."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        self.message = message
        super().__init__(f"{kind}: {message}")


class Trainer:
    """A trainer process: `do` for one command of trainer.py, `begin` and `end` for its halves."""

    def __init__(self, process: Process, control: socket.socket) -> None:
        self.process = process
        self._control = control
        self._lines = control.makefile("r", encoding="utf-8")

    def begin(self, command: str, **options: Any) -> None:
        try:
            self._control.sendall(json.dumps([command, options]).encode() + b"\n")
        except OSError as error:
            raise TrainerDied(command) from error

    @property
    def answered(self) -> bool:
        """Whether `end` would not wait."""
        return bool(select.select([self._control], [], [], 0)[0])

    def end(self, within_s: float = DEADLINE_S) -> Any:
        self._control.settimeout(within_s)
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            line = ""
        except TimeoutError as error:
            raise TimeoutError("no answer from the trainer\n" + self.process.stacks()) from error
        if not line:
            raise TrainerDied(self.process.text()[-3000:])
        answer = json.loads(line)
        if "error" in answer:
            raise TrainerError(answer["error"], answer["message"])
        return answer["result"]

    def do(self, command: str, **options: Any) -> Any:
        self.begin(command, **options)
        return self.end()

    def run(self, steps: int = 1, level: str = "memory", **options: Any) -> list[dict[str, Any]]:
        return self.do("run", steps=steps, level=level, **options)

    def dies(self, within_s: float = DEADLINE_S) -> int:
        """Wait for its death."""
        code = self.process.ended(within_s)
        self.close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._control.close()


class Node:
    """Directories, an agent and trainers; everything goes with it."""

    def __init__(self, zygotes: dict[str, Zygote]) -> None:
        self.zygotes = zygotes
        self.node_id = "n0"
        self.namespace = ""
        """Of the network, if not the machine's own."""
        self.base = Path(tempfile.mkdtemp(prefix="evf-", dir="/tmp"))
        # What dies here are processes, not machines: a tmpfs will do for the disk, and is quick.
        self.ram = Path(tempfile.mkdtemp(prefix="evf-", dir="/dev/shm"))
        self.memory = self.ram / "memory"
        self.memory.mkdir(mode=0o700)
        self.nvme = self.ram / "nvme"
        self.socket = self.base / "agent.sock"
        self.options: dict[str, dict[str, Any]] = {
            "nvme": {"interval": "off", "keep_newest": 2},
        }
        self.agent: Process | None = None
        self.processes: list[Process] = []
        self.trainers: list[Trainer] = []
        self.digests: dict[int, set[str]] = {}

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"

    def start_agent(
        self,
        failpoints: str = "",
        *,
        preload: Path | None = None,
        environ: dict[str, str] | None = None,
        ready: bool = True,
        socket_path: Path | None = None,
        **request: Any,
    ) -> Process:
        """Start an agent, by default and wait until it answers."""
        toml = self.base / f"agent-{len(self.processes)}.toml"
        toml.write_text(
            "\n".join(
                f"[{section}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
                for section, values in self.options.items()
            )
        )
        path = socket_path or self.socket
        options = {
            "socket": path,
            "memory_dir": self.memory,
            "nvme_dir": self.nvme,
            "node_id": self.node_id,
        }
        log = self.base / f"agent-{len(self.processes)}.log"
        environ = {"EVERSTEP_HOME": str(self.base / "home"), **(environ or {})}
        if self.namespace:
            request["netns"] = self.namespace
        if preload is None:
            process = self.zygotes["agent"].fork(
                log,
                environ,
                failpoints,
                config=str(toml),
                options={f"agent.{name}": str(value) for name, value in options.items()},
                **request,
            )
        else:
            options["config"] = toml
            flags = [(f"--{name.replace('_', '-')}", str(v)) for name, v in options.items()]
            arguments = ["agent", *(word for flag in flags for word in flag)]
            process = self._start_fresh(log, arguments, failpoints, preload, environ)
        self.processes.append(process)
        if path == self.socket:
            self.agent = process
        if ready:
            self.until_answering(process, path)
        return process

    def _start_fresh(
        self,
        log: Path,
        arguments: list[str],
        failpoints: str,
        preload: Path,
        environ: dict[str, str],
    ) -> Process:
        environ = (
            OWN_ENVIRONMENT
            | environ
            | {"EVERSTEP_FAILPOINTS": failpoints, "LD_PRELOAD": str(preload)}
        )
        with log.open("ab") as output:
            started = subprocess.Popen(
                [sys.executable, "-m", "everstep.agent", *arguments],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return Process(started.pid, log, started.wait)

    def until_answering(self, process: Process, path: Path | None = None) -> None:
        def answers() -> bool:
            if not process.alive:
                raise AssertionError(f"the agent ended with {process.ended()}\n{process.text()}")
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(path or self.socket)) == 0

        until(answers, "the agent's answer")

    def start_trainer(
        self, failpoints: str = "", script: str = "trainer.py", **environ: str
    ) -> Trainer:
        """A trainer process that has not connected yet."""
        ours, theirs = socket.socketpair()
        log = self.base / f"trainer-{len(self.processes)}.log"
        environ = {"EVERSTEP_HOME": str(self.base / "home"), **environ}
        with theirs:
            request = {"netns": self.namespace} if self.namespace else {}
            process = self.zygotes["trainer"].fork(
                log, environ, failpoints, (theirs.fileno(),), script=str(HERE / script), **request
            )
        self.processes.append(process)
        self.trainers.append(Trainer(process, ours))
        return self.trainers[-1]

    def trainer(self, failpoints: str = "", **options: Any) -> Trainer:
        """A trainer that is connected."""
        trainer = self.start_trainer(failpoints)
        trainer.do("connect", **{"address": self.address, **options})
        return trainer

    def note(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Remember what the state was at each step, for `assert_restored`."""
        for line in lines:
            self.digests.setdefault(line["step"], set()).add(line["digest"])
        return lines

    def assert_restored(self, answer: dict[str, Any], step: int | None = None) -> None:
        """Bit for bit a step that was taken, and the one that was expected."""
        assert answer["step"] in self.digests, answer
        assert answer["digest"] in self.digests[answer["step"]], answer
        assert step is None or answer["step"] == step, answer

    @contextmanager
    def stub(self) -> Iterator[AgentStub]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self.address, options=options) as channel:
            yield AgentStub(channel)

    def ask(self, method: str, request: Any, timeout_s: float = 20.0) -> Any:
        """One call, as anybody could make it. Raises errors of the tree."""
        with self.stub() as stub:
            try:
                return getattr(stub, method)(request, timeout=timeout_s)
            except grpc.RpcError as error:
                raise decode(error, self.address) from None

    def adopt_files(self, memory: Path, nvme: Path) -> None:
        """Take copies of another node's directories for this one's."""
        shutil.copytree(memory, self.memory, dirs_exist_ok=True)
        shutil.copytree(nvme, self.nvme, dirs_exist_ok=True)

    def job(self, name: str = "job") -> Any:
        (job,) = self.ask("Status", wire.StatusRequest(job=name)).jobs
        return job

    def committed(self, level: str, job: str = "job") -> list[tuple[int, int]]:
        """What the agent says is committed at a level: incarnation and step, oldest first."""
        snapshots = self.job(job).snapshots
        return sorted(
            (s.incarnation, s.step) for s in snapshots if s.committed and s.level == level
        )

    def assert_all_intact(self) -> list[Any]:
        """Everything that is called committed passes its digests."""
        shards = self.ask("Verify", wire.VerifyRequest()).shards
        assert all(shard.intact for shard in shards), shards
        return list(shards)

    def assert_nothing_left_over(self) -> None:
        """No half-written or superseded file waits for somebody to clear it away."""
        left = [path for root in (self.memory, self.nvme) for path in root.rglob(".*")]
        assert not [path for path in left if path.name != ".lock"], left

    def wipe_memory(self) -> None:
        """What a power cut does to a tmpfs."""
        for path in self.memory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def assert_kept(self, told: dict[str, tuple[int, int]], job: str = "job") -> None:
        """Without any agent: what a trainer was told of is there, and all there is is whole."""
        with NvmeLevel(self.nvme) as nvme:
            for level in (MemoryLevel(self.memory, keep_free_bytes=0), nvme):
                found = [(s.incarnation, s.step) for s in level.snapshots(job)]
                assert found, level.name
                assert told[level.name] <= found[-1], (level.name, told, found)
                for snapshot in level.snapshots(job):
                    for rank in level.ranks(job, snapshot):
                        assert not level.verify(job, snapshot, rank), (level.name, snapshot)
                assert not level.problems(job)

    def shards(self, step: int) -> list[Path]:
        return sorted(self.nvme.glob(f"*/step-{step:012d}/*.safetensors"))

    def arenas(self) -> list[Path]:
        return sorted(self.memory.glob("*/*.arena"))

    def close(self) -> None:
        for process in self.processes:
            if process.code is None:
                process.signal(signal.SIGKILL)
                process.signal(signal.SIGCONT)
                process.ended()
        for trainer in self.trainers:
            trainer.close()
        shutil.rmtree(self.ram, ignore_errors=True)
        shutil.rmtree(self.base, ignore_errors=True)


class Shim:
    """System calls that fail on demand; see shim.c."""

    def __init__(self, library: Path, switch: Path) -> None:
        self.library = library
        self._switch = switch
        self.environ = {"SHIM_SWITCH": str(switch)}

    def fail(self, call: str, number: int, nth: int, marker: str) -> None:
        partial = self._switch.with_suffix(".new")
        partial.write_text(f"{call} {number} {nth} {marker}\n")
        partial.replace(self._switch)

    def heal(self) -> None:
        self._switch.unlink()


def failpoints_in_source(*prefixes: str) -> list[str]:
    """Every failpoint that the source names and that begins with one of the prefixes."""
    import re

    from everstep import agent

    root = Path(next(iter(agent.__path__))).resolve().parent
    folders = ("agent", "client", "snapshot", "storage")
    text = "\n".join(p.read_text() for f in folders for p in sorted((root / f).rglob("*.py")))
    names = set(re.findall(r'failpoint\(\s*"([a-z_.]+)"\s*\)', text))
    moments = re.findall(r'failpoint\(f"storage\.\{verb\}\.([a-z_]+)"\)', text)
    verbs = re.findall(r'\.publish\([^()]*(?:\([^()]*\)[^()]*)*, "([a-z]+)"\)', text)
    assert moments
    assert verbs
    names |= {f"storage.{verb}.{moment}" for verb in verbs for moment in moments}
    return sorted(name for name in names if name.startswith(prefixes))
