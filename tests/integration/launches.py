"""Launches of the script fsdp_ranks.py, and what its ranks have seen."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .conftest import DEADLINE_S, AgentProcess, eventually

Facts = list[dict[str, Any]]
TENSORS = 145  # 36 parameters with three of AdamW's each, and a buffer
_LIMIT_S = 240.0  # of a launch; busy machines take a minute for four ranks
NAMES = {1: "one", 2: "two", 3: "three", 4: "four"}


class Launches:
    """Starts torchrun with the script fsdp_ranks.py.

    Args:
        agent: That all ranks talk to.
        out: Where they write what they saw.
        device: "cpu" or "cuda".
    """

    def __init__(self, agent: AgentProcess, out: Path, device: str = "cpu") -> None:
        self.agent = agent
        self.out = out
        self._device = device
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, world: int, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(world), str(Path(__file__).parent / "fsdp_ranks.py")]
        command += ["--out", str(self.out), "--device", self._device, *arguments]
        environ |= {"EVERSTEP_AGENT": self.agent.address, "OMP_NUM_THREADS": "1"}
        # What cuBLAS asks for where results must not depend on how kernels overlap.
        environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        with (self.out / "torchrun.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONWARNINGS": "ignore", **environ},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def facts(self, name: str, kind: str, world: int, running: subprocess.Popen[bytes]) -> Facts:
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
        ranks = self.facts("save", kinds[-1], world, running)
        os.killpg(running.pid, signal.SIGKILL)
        for rank in ranks:
            os.kill(rank["pid"], signal.SIGKILL)
        running.wait(DEADLINE_S)

    def resume(self, world: int, kinds: Sequence[str]) -> None:
        """Restore, and go on to the end."""
        running = self.start(world, "resume", "--kinds", *kinds, "--name", NAMES[world])
        assert running.wait(_LIMIT_S) == 0, self.said()

    def die_restoring(self, world: int, kind: str) -> None:
        """Every rank is killed once it has copied, and before it has handed anything over."""
        (self.out / "torchrun.log").unlink()
        killed = {"EVERSTEP_FAILPOINTS": "client.restore.copied=kill"}
        running = self.start(world, "resume", "--kinds", kind, "--name", "killed", **killed)
        assert running.wait(_LIMIT_S) != 0
        assert not list(self.out.glob("killed-*")), self.said()
        assert "SIGKILL" in self.said(), self.said()

    def said(self) -> str:
        return (self.out / "torchrun.log").read_text()[-6000:]

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(DEADLINE_S)


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
