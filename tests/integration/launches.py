"""Launches of the script fsdp_ranks.py, and what its ranks have seen."""

import json
import signal
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.zygotes import Program

from .conftest import DEADLINE_S, AgentProcess, eventually

Facts = list[dict[str, Any]]
TENSORS = 145  # 36 parameters with three of AdamW's each, and a buffer
_LIMIT_S = 240.0  # of a launch; busy machines take a minute for four ranks
NAMES = {1: "one", 2: "two", 3: "three", 4: "four"}


class Launch:
    """The ranks of one launch; they see what torchrun lets its ranks see."""

    def __init__(self, world: int, arguments: Sequence[str], log: Path, **environ: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        script = str(Path(__file__).parent / "fsdp_ranks.py")
        environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        self.ranks = [
            Program(
                "trainer",
                script,
                *arguments,
                environ={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                log=log,
            )
            for rank in range(world)
        ]

    def poll(self) -> int | None:
        """The status of the first rank that failed; None while all are well, 0 at the end."""
        codes = [rank.poll() for rank in self.ranks]
        failed = next((code for code in codes if code), 0)
        return None if not failed and None in codes else failed

    def wait(self, timeout_s: float) -> int:
        """The same, once it is known."""
        eventually(lambda: self.poll() is not None, "the end of all ranks", timeout_s)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
        for rank in self.ranks:
            rank.wait(DEADLINE_S)


class Launches:
    """Launches the script fsdp_ranks.py.

    Args:
        agent: That all ranks talk to.
        out: Where they write what they saw.
        device: "cpu" or "cuda".
    """

    def __init__(self, agent: AgentProcess, out: Path, device: str = "cpu") -> None:
        self.agent = agent
        self.out = out
        self._device = device
        self._started: list[Launch] = []
        self._log = out / "ranks.log"

    def start(self, world: int, *arguments: str, **environ: str) -> Launch:
        arguments = ("--out", str(self.out), "--device", self._device, *arguments)
        environ["EVERSTEP_AGENT"] = self.agent.address
        # What cuBLAS asks for where results must not depend on how kernels overlap.
        environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        self._started.append(Launch(world, arguments, self._log, **environ))
        return self._started[-1]

    def facts(self, name: str, kind: str, world: int, running: Launch) -> Facts:
        """What each rank has written; waits for it."""
        paths = [self.out / f"{name}-{kind}-{rank}.json" for rank in range(world)]

        def written() -> bool:
            there = all(path.exists() for path in paths)
            assert there or running.poll() in (None, 0), self.said()
            return there

        eventually(written, f"{name} of {kind}", _LIMIT_S)
        return [json.loads(path.read_text()) for path in paths]

    def save_and_die(self, world: int, kinds: Sequence[str]) -> None:
        """Train, take a snapshot, train on; then nothing is left of it but the agent."""
        running = self.start(world, "alone", "save", "--kinds", *kinds, "--linger")
        self.facts("save", kinds[-1], world, running)
        running.kill()

    def resume(self, world: int, kinds: Sequence[str]) -> None:
        """Restore, and go on to the end."""
        running = self.start(world, "resume", "--kinds", *kinds, "--name", NAMES[world])
        assert running.wait(_LIMIT_S) == 0, self.said()

    def die_restoring(self, world: int, kind: str) -> None:
        """Every rank is killed once it has copied, and before it has handed anything over."""
        killed = {"EVERSTEP_FAILPOINTS": "client.restore.copied=kill"}
        running = self.start(world, "resume", "--kinds", kind, "--name", "killed", **killed)
        for rank in running.ranks:
            assert rank.wait(_LIMIT_S) == -signal.SIGKILL, self.said()
        assert not list(self.out.glob("killed-*")), self.said()

    def said(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]

    def close(self) -> None:
        for launch in self._started:
            launch.kill()


class Seen:
    """What the ranks of all launches have written, of one kind of run."""

    def __init__(self, out: Path, kind: str) -> None:
        self._ranks: dict[str, Facts] = {}
        for path in sorted(out.glob(f"*-{kind}-*.json")):
            name = path.name.partition("-")[0]
            self._ranks.setdefault(name, []).append(json.loads(path.read_text()))

    def __getitem__(self, name: str) -> Facts:
        return self._ranks[name]

    def whole(self, name: str, what: str) -> dict[str, str]:
        """All tensors' digests of a moment; those that several ranks have are equal."""
        found: dict[str, str] = {}
        for rank in self[name]:
            tensors = rank[what].get("tensors", rank[what])
            for tensor, digest in tensors.items():
                assert found.setdefault(tensor, digest) == digest, f"{tensor} differs"
        return found

    def check_saved(self) -> None:
        """Else nothing of the rest would count."""
        assert all(rank["start"] is None and rank["committed"] for rank in self["save"])
        saved, end = self.whole("save", "saved"), self.whole("alone", "end")
        assert len(saved) == len(end) == TENSORS
        assert not [
            name for name in saved if not name.endswith("step") and saved[name] == end[name]
        ]

    def check_restored(self, name: str, *, same_end: bool) -> None:
        """From memory, every global byte; and on from there as from what torch had saved."""
        ranks = self[name]
        assert [rank["start"] for rank in ranks] == [3] * len(ranks)
        assert {tuple(rank["from"]) for rank in ranks} == {("memory",)}
        assert self.whole(name, "restored") == self.whole("save", "saved")
        assert self.whole(name, "loaded") == self.whole("save", "saved")
        assert [rank["end"] for rank in ranks] == [rank["end of loaded"] for rank in ranks]
        assert self.whole(name, "end") != self.whole(name, "restored")
        undisturbed = [rank["end"] for rank in self["alone"]]
        assert ([rank["end"] for rank in ranks] == undisturbed) is same_end
        for rank, then in zip(ranks, self["save"], strict=False):
            assert rank["restored"]["generators"] == then["saved"]["generators"]
        for number, rank in enumerate(ranks):
            is_new = number >= len(self["save"])
            assert any(f"rank {number} is new" in note for note in rank["notes"]) is is_new
