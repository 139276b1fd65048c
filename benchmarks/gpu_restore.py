"""Restoring to the device: in the live process, after SIGKILL, and from NVMe files.

Owns the parent's side; the processes that are started and killed are `gpu_restore_roles`. Promises
that each restore is set beside the time that a plain pinned copy of as many bytes takes in the same
process. The clock of the recovery starts when SIGKILL is sent, and the new process is started at
once, as a launcher would that watches it.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import gpu_files
from benchmarks.gpu_machine import bandwidth
from benchmarks.gpu_results import Results
from benchmarks.gpu_workload import Training

LIMIT_S = 240.0
_STAGES = ("process started", "torch imported", "model built", "connected", "restored")
_DRAIN_S = 30.0


def rewind(results: Results, training: Training, client: Any, rounds: int = 3) -> None:
    """From memory in the live process, beside the PCIe time."""
    times = []
    for _ in range(rounds + 1):
        training.steps(1)
        handle = client.snapshot(training.steps_done)
        assert handle.wait(timeout=60.0), handle
        training.steps(1)
        training.pace.synchronize()
        begun = time.perf_counter()
        step = client.rewind()
        training.pace.synchronize()
        times.append(time.perf_counter() - begun)
        assert step == handle.step, (step, handle)
        training.steps_done = max(training.steps_done, step)
    ours = results.times("rewind() in the live process", times[1:], "rewind")
    copy = training.state_bytes / bandwidth(training.device, to_device=True)
    results.times("  a pinned copy of the state to the device", [copy], "rewind_copy")
    results.target("rewind over PCIe", ours / copy, 1.3)


class Child:
    """A process of `gpu_restore_roles`, and what it says."""

    def __init__(self, role: str, arguments: list[str]) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_restore_roles", role]
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        # Whatever it hangs on, reading its lines ends.
        self._guard = threading.Timer(LIMIT_S, self.process.kill)
        self._guard.start()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it says, until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                yield json.loads(line)

    def until(self, what: str) -> dict[str, Any]:
        """The next line about this; earlier ones are passed over."""
        for line in self.lines():
            if line["what"] == what:
                return line
        raise RuntimeError(f"the process ended before it said {what!r}: {self.process.wait()}")

    def close(self) -> None:
        """End it, if it has not ended."""
        self._guard.cancel()
        self.process.kill()
        self.process.wait(_DRAIN_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def child(role: str, *arguments: str) -> Iterator[Child]:
    """A process that ends with the block."""
    one = Child(role, list(arguments))
    try:
        yield one
    finally:
        one.close()


def killed(results: Results, arguments: list[str]) -> None:
    """From SIGKILL to the first new step, with its parts."""
    with child("train", *arguments) as trainer:
        trainer.until("on nvme")
        lines = trainer.lines()
        for line in lines:
            if line["committed"] and line["step"] >= line["committed"] + 1:
                break
        killed_s = time.time()
        trainer.process.kill()
        last = line
    with child("resume", *arguments) as resumed:
        said = {line["what"]: line for line in resumed.lines()}
    before = killed_s
    for stage in _STAGES:
        at = said[stage]["unix_s"]
        results.times(f"  to: {stage}", [at - before], f"killed_{stage.replace(' ', '_')}")
        before = at
    first = said["first step"]["unix_s"]
    results.times("  to: first step", [first - before], "killed_first_step")
    results.times("SIGKILL to the first new step", [first - killed_s], "killed_all")
    lost = last["step"] - said["restored"]["step"]
    results.count("  steps lost", lost, "killed_steps_lost")
    speed = said["bandwidth"]
    copy = speed["state_bytes"] / speed["bytes_per_s"]
    restore = said["restored"]["unix_s"] - said["connected"]["unix_s"]
    results.count("  restore over PCIe, fresh process", restore / copy, "restore_fresh_over_pcie")
    results.say()


def from_nvme(results: Results, arguments: list[str], nvme_dir: Path) -> None:
    """From the NVMe files, beside bare reads and other loaders, in turns in one process."""
    with child("nvme", *arguments, "--nvme-dir", str(nvme_dir)) as loading:
        lines = [line for line in loading.lines() if line["what"] == "loader"]
    found: dict[str, list[float]] = {}
    for line in lines:
        if "problem" not in line:
            found.setdefault(line["name"], []).append(line["seconds"])
        elif _key(line["name"]) not in results.problems:
            results.problems[_key(line["name"])] = line["problem"]
            results.rows.append((f"  {line['name']}", line["problem"]))
    ours = results.times("restore() from NVMe", found.pop("restore"), "nvme")
    for name, taken in found.items():
        theirs = results.times(f"  {name}, the same file", taken, _key(name))
        if name == gpu_files.BARE:
            results.count(f"  restore from NVMe over {name}", ours / theirs, "nvme_over_bare")
        else:
            results.target(f"restore from NVMe over {name}", ours / theirs, 1.0)


def _key(name: str) -> str:
    return "nvme_" + name.replace(" ", "_").replace("-", "_")
