"""Snapshots of a training on a GPU: step time, stalls, restore, and what there is today beside it.

``python -m benchmarks.gpu_capture [--parts A,B] [--short] [--out FILE] [--plot FILE]``. A GPT of
1.24 G parameters (14.9 GB of state) trains while an agent runs with digests and flushes to NVMe on.
Parts: machine, none, device, rewind, lazy, host, eight_bit, killed, nvme, none_after, torch_save,
dcp, dcp_pinned. ``--out`` is written after each, so that a run cut short keeps what it has;
``nvme`` reads the files that ``killed`` before it has left. ``--plot`` draws from such a file and
measures nothing. ``--device cpu --tiny`` tries the logic; its figures mean nothing.
"""

import argparse
import gc
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import gpu_baselines, gpu_intervals, gpu_machine, gpu_plot, gpu_restore
from benchmarks.gpu_intervals import Variant
from benchmarks.gpu_results import Results, device_name
from benchmarks.gpu_workload import Size, Training
from benchmarks.workload import agent, scratch

BUDGET_S = 540.0
LIMITS = {2: 1.04, 4: 1.025, 8: 1.015}
# At every step one is being copied, one begins, and the host is a step ahead of the device.
THREE = {"captures_in_flight": 3}
# What PCIe cannot carry in a step is waited for; to skip would be faster, and no snapshot.
WAITING = {"on_busy": "wait"}
LAZY = {"scratch_bytes": 0}
VARIANTS = (
    Variant("device", "copy-on-update", THREE, (2, 4, 8), block_steps=16, limits=LIMITS),
    Variant("waiting", "copy-on-update, waiting", WAITING, (1,), block_steps=16),
    Variant("lazy", "lazy copy with a fence", {**LAZY, **THREE}, (2, 4, 8)),
    Variant("lazy_waiting", "lazy copy with a fence, waiting", {**LAZY, **WAITING}, (1,)),
    Variant("host", "digests on the host", {"digests": "host", **THREE}, intervals=(2,)),
    Variant(
        "eight_bit", "8-bit moments (stand-in)", {**THREE, **WAITING}, (1,), 16, limits={1: 1.08}
    ),
)
PARTS = (
    "machine",
    "none",
    "device",
    "waiting",
    "rewind",
    "lazy",
    "lazy_waiting",
    "host",
    "eight_bit",
    "killed",
    "nvme",
    "none_after",
    "torch_save",
    "dcp",
    "dcp_pinned",
)
_CAPTURE = ("device", "waiting", "rewind", "lazy", "lazy_waiting", "host", "eight_bit")
_RESTORE = ("killed", "nvme")
_BASELINES: dict[str, Callable[[Results, Training], None]] = {
    "torch_save": gpu_baselines.torch_save,
    "dcp": gpu_baselines.async_save,
    "dcp_pinned": gpu_baselines.async_save_pinned,
}
_CONFIG = """
[memory]
slots = {slots}
digest_threads = {digest_threads}
[nvme]
keep_newest = 1
"""
_GIB = 1 << 30


class Run:
    """One run of the chosen parts."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self.options = options
        self.results = results
        self.size = Size.tiny() if options.tiny else Size()
        self.training: Training | None = None

    def all(self) -> None:
        """Every part that was asked for, as long as there is time."""
        self._part("machine", self._machine)
        self._part("none", lambda: self._none("none_before"))
        for name, measured, parts in (
            ("capture", self._capture, _CAPTURE),
            ("restore", self._restore, _RESTORE),
        ):
            if any(part in self.options.parts for part in parts):
                self.results.part(name, measured)
        self._part("none_after", lambda: self._none("none_after"))
        for name, measure in _BASELINES.items():
            self._part(name, lambda measure=measure: measure(self.results, self._trained()))  # type: ignore[misc]

    def _part(self, name: str, action: Callable[[], object]) -> None:
        if name not in self.options.parts:
            return
        if time.monotonic() - self.results.begun_s > self.options.budget_s:
            self.results.problems[name] = "not measured: the time was over"
            return
        self.results.part(name, action)

    def _trained(self) -> Training:
        if self.training is None:
            self.training = Training.start(self.options.device, self.size)
        return self.training

    def _let_go(self) -> None:
        self.training = None
        gc.collect()
        if self.options.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _machine(self) -> None:
        training = self._trained()
        size = training.state_bytes
        self.results.add("state", size, f"{size / 1e9:9.3f} GB", "state_bytes")
        self.results.say()
        gpu_machine.measure(self.results, training.device, size)

    def _none(self, key: str) -> None:
        blocks = 1 if self.options.short else 3
        gpu_intervals.baseline(self.results, self._trained(), key, 16, blocks)

    @contextmanager
    def _agent(self, slots: int) -> Iterator[tuple[str, Path]]:
        """An agent with so many slots; its address and its NVMe directory."""
        with scratch(os.path.abspath(self.options.directory)) as home:
            config = home / "everstep.toml"
            threads = self.options.digest_threads
            config.write_text(_CONFIG.format(slots=slots, digest_threads=threads))
            self.results.count("digest threads of the agent", threads, "digest_threads")
            nvme_dir = home / "nvme"
            with agent(**{"config": str(config), "nvme-dir": str(nvme_dir)}) as address:
                yield address, nvme_dir

    def _capture(self) -> None:
        slots = self._slots()
        self.results.count("slots", slots, "slots")
        with self._agent(slots) as (address, _):
            for variant in VARIANTS:
                self._part(variant.key, lambda v=variant: self._variant(address, v))  # type: ignore[misc]

    def _slots(self) -> int:
        """As asked, or as many as fit, up to one more than captures, flush and commit take."""
        if self.options.slots:
            return int(self.options.slots)
        shm = os.statvfs("/dev/shm")
        image = self._trained().state_bytes + (8 << 20)
        # The trainer itself, and what it reads files into, need memory of the host's, too.
        available = gpu_machine.meminfo("MemAvailable") - image
        free = min(shm.f_bavail * shm.f_frsize - _GIB, available)
        return max(2, min(5, free // image))

    def _variant(self, address: str, variant: Variant) -> None:
        training = self._trained()
        if variant.key == "eight_bit":
            training.eight_bit()
            size = training.state_bytes
            self.results.add("state, 8-bit", size, f"{size / 1e9:9.3f} GB", "state_8_bytes")
        if self.options.short:
            intervals = tuple(i for i in variant.intervals if i <= 2)
            variant = Variant(
                variant.key, variant.name, variant.options, intervals, 8, 2, variant.limits
            )
        speed = self.results.figures.get("d2h_bytes_per_s", 50e9)
        pid = agent_pid(address)
        with gpu_intervals.connected(address, training, variant) as client:
            waited = gpu_intervals.warm(client, training, training.state_bytes / speed, 60.0)
            self.results.count("  until slots are warm", waited, f"{variant.key}_warm_s", "s")
            self.results.say()
            gpu_intervals.measure(self.results, training, client, pid, variant)
            if variant.key == "device":
                gpu_intervals.write_memory(self.results, pid, memory_dir(pid))
                self._part("rewind", lambda: gpu_restore.rewind(self.results, training, client))
            if variant.key == "waiting":
                self._floor(training)

    def _floor(self, training: Training) -> None:
        if "d2h_bytes_per_s" not in self.results.figures:
            return
        floor = gpu_intervals.floor(self.results, training.state_bytes)
        self.results.count("floor of every step, PCIe alone", floor, "floor_every_1")
        inflation = self.results.figures.get("waiting_every_1_inflation")
        if inflation is not None:
            self.results.target("every step, over the floor", inflation / floor, 1.06)

    def _restore(self) -> None:
        """With an agent of its own: while this process lives it holds its rank at the other."""
        slots = min(3, self._slots())
        self._let_go()
        with self._agent(slots) as (address, nvme_dir):
            arguments = ["--agent", address, "--job", gpu_intervals.JOB]
            arguments += ["--device", self.options.device]
            arguments += ["--tiny"] if self.options.tiny else []
            results = self.results
            self._part("killed", lambda: gpu_restore.killed(results, arguments))
            self._part("nvme", lambda: gpu_restore.from_nvme(results, arguments, nvme_dir))


def agent_pid(address: str) -> int:
    """The child that serves this address."""
    socket = address.removeprefix("unix:")
    for process in psutil.Process().children():
        if socket in process.cmdline():
            return process.pid
    raise SystemExit(f"no agent of {socket}")


def memory_dir(pid: int) -> Path:
    """Where an agent's arenas are."""
    words = psutil.Process(pid).cmdline()
    return Path(words[words.index("--memory-dir") + 1])


def arguments() -> Any:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma between them")
    parser.add_argument("--short", action="store_true", help="fewer intervals, shorter blocks")
    parser.add_argument("--out", type=Path, help="JSON, written as the figures come")
    parser.add_argument("--plot", type=Path, help="draw what --out has, as SVG; measure nothing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the logic")
    parser.add_argument("--slots", type=int, default=0, help="0: as many as fit, at most 5")
    parser.add_argument("--digest-threads", type=int, default=2, help="of the agent")
    parser.add_argument("--directory", default=".", help="on the disk to flush to")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="no part begins later")
    options = parser.parse_args()
    options.parts = tuple(options.parts.split(","))
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.plot and not options.out:
        parser.error("--plot draws what is in --out FILE")
    return options


def main() -> None:
    """Run from the command line."""
    options = arguments()
    if options.plot:
        gpu_plot.draw(options.out, options.plot)
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_capture: there is no GPU here, nothing is measured")
        return
    warnings.simplefilter("ignore")
    logging.getLogger("everstep").setLevel(logging.WARNING)
    name = device_name(options.device)
    results = Results("gpu_capture", path=options.out, device=name)
    results.rows.append(("accelerator", name))
    results.resume()
    Run(options, results).all()
    results.print()


if __name__ == "__main__":
    main()
