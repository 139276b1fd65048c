"""Step time with a snapshot every N steps, beside steps without, in turns.

Owns the measurement of our own capture in all its variants. Promises that each block of steps with
snapshots has a block without right before it, in the same process with the same client attached;
that the snapshots of a block's last steps are still being copied when its clock stops, as those of
the block before were when it began (some steps are taken first); and that skips, drops, stalls,
device memory and CPU time are counted over exactly the measured blocks.
"""

import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.gpu_results import Results, middle
from benchmarks.gpu_workload import Training

JOB = "gpu-bench"
NVME_INTERVAL = 20
_WARM_STEPS = 6
_WAYS = ("window", "scratch", "direct")
_NONE_STEPS = 16


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to take snapshots.

    Attributes:
        key: In the figures.
        name: In the table.
        options: For `everstep.connect`.
        intervals: Steps between snapshots, each measured.
        block_steps: Steps of a block; at least two intervals.
        limits: Of the inflation, by interval.
    """

    key: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    intervals: tuple[int, ...] = (1, 2, 4, 8)
    block_steps: int = 8
    blocks: int = 3
    limits: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class Blocks:
    """The samples of one variant at one interval."""

    ours: list[float] = field(default_factory=list)
    none: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    taken: int = 0
    committed: int = 0
    dropped: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)
    ways: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0
    none_peak_bytes: int = 0
    agent_cpu_s: float = 0.0
    own_cpu_s: float = 0.0
    none_cpu_s: float = 0.0
    threads_cpu_s: float = 0.0
    elapsed_s: float = 0.0
    update_wait_s: float = 0.0

    def count(self, handles: list[Any]) -> None:
        """What the snapshots of one block have come to."""
        self.taken += sum(not handle.skipped for handle in handles)
        self.skipped += sum(bool(handle.skipped) for handle in handles)
        self.dropped += sum(bool(handle.dropped) for handle in handles)
        self.committed += sum(handle.done() for handle in handles)
        self.reasons += [handle.skipped or handle.dropped for handle in handles]


def baseline(results: Results, training: Training, key: str, steps: int, blocks: int) -> None:
    """Steps with nothing attached at all."""
    training.steps(_WARM_STEPS)
    _reset_peak(training.device)
    times = [training.steps(steps) for _ in range(blocks)]
    results.times(f"a step, {key.replace('_', ' ')}", times, key)
    peak = _peak(training.device)
    results.add("  its device memory, peak", peak, f"{peak / 1e9:9.2f} GB", f"{key}_peak_bytes")


@contextmanager
def connected(address: str, training: Training, variant: Variant) -> Iterator[Any]:
    """A client for one variant, its arena reserved."""
    import everstep

    client = everstep.connect(
        JOB, agent=address, nvme_interval=NVME_INTERVAL, rank=0, world=1, **variant.options
    )
    try:
        client.attach(**training.objects())
        yield client
    finally:
        client.close(timeout=0)


def warm(client: Any, training: Training, state_s: float, limit_s: float) -> float:
    """Snapshot, waiting for each, until all slots seem to be pinned; returns the seconds it took.

    A slot that is not pinned yet is copied to in a slower way. Slots are taken in turns, so some
    quick snapshots in a row are the sign. The first one reserves them, which the limit leaves out.
    """
    begun = time.monotonic()
    client.snapshot(training.steps_done).wait(timeout=300.0)
    limit_s += time.monotonic() - begun
    quick = 0
    while quick < 6 and time.monotonic() - begun < limit_s:
        training.steps(1)
        training.pace.synchronize()
        at = time.perf_counter()
        handle = client.snapshot(training.steps_done)
        if handle.skipped:
            time.sleep(0.05)
            continue
        handle.wait(timeout=120.0)
        quick = quick + 1 if time.perf_counter() - at < 2 * state_s + 0.3 else 0
    return time.monotonic() - begun


def measure(
    results: Results, training: Training, client: Any, agent_pid: int, variant: Variant
) -> None:
    """All intervals of a variant, for whose client the slots are warm."""
    for interval in variant.intervals:
        found = Blocks()
        steps = max(variant.block_steps, 2 * interval)
        for _ in range(variant.blocks):
            _block(found, training, client, agent_pid, interval, steps)
        _write(results, variant, interval, found)
        results.save()


def _block(
    found: Blocks, training: Training, client: Any, agent_pid: int, interval: int, steps: int
) -> None:
    measured: list[Any] = []
    recording = False

    def after(step: int) -> None:
        if step % interval:
            return
        if measured:
            found.stalls.append(client.stats.last_stall_s)
        handle = client.snapshot(step)
        if recording:
            measured.append(handle)

    training.steps(2)
    _reset_peak(training.device)
    cpu = own_cpu_s()
    found.none.append(training.steps(_NONE_STEPS))
    found.none_cpu_s += (own_cpu_s() - cpu) * steps / _NONE_STEPS
    found.none_peak_bytes = max(found.none_peak_bytes, _peak(training.device))
    # To a step that the interval divides, so that each block has equally many snapshots.
    training.steps(interval - training.steps_done % interval)
    training.steps(max(_WARM_STEPS // interval, 2) * interval, after)
    process = psutil.Process(agent_pid)
    agent_cpu, cpu, threads = sum(process.cpu_times()[:2]), own_cpu_s(), threads_cpu_s()
    begun = time.perf_counter()
    ways, waited = _ways(client), client.stats.update_wait_s
    recording = True
    found.ours.append(training.steps(steps, after))
    found.elapsed_s += time.perf_counter() - begun
    found.own_cpu_s += own_cpu_s() - cpu
    found.threads_cpu_s += threads_cpu_s() - threads
    found.agent_cpu_s += sum(process.cpu_times()[:2]) - agent_cpu
    found.peak_bytes = max(found.peak_bytes, _peak(training.device))
    settle(measured)
    found.count(measured)
    found.ways += _ways(client) - ways
    found.update_wait_s += client.stats.update_wait_s - waited


def _ways(client: Any) -> Counter[str]:
    """By which way bytes have left the live leaves so far."""
    return Counter({way: getattr(client.stats, f"{way}_bytes") for way in _WAYS})


def settle(handles: list[Any]) -> None:
    """Wait until nothing is being copied, and the outcome of each is known; bounded."""
    deadline = time.monotonic() + 60.0
    for handle in handles[-1:]:
        if not handle.skipped:
            handle.wait(timeout=60.0)
    while time.monotonic() < deadline:
        if all(handle.skipped or handle.dropped or handle.done() for handle in handles):
            return
        time.sleep(0.005)


def _write(results: Results, variant: Variant, interval: int, found: Blocks) -> None:
    key, name = f"{variant.key}_every_{interval}", f"{variant.name}, every {interval}"
    step = results.times(f"a step, {name}", found.ours, key)
    none = results.times("  without, in turns", found.none, f"{key}_none")
    results.count("  over no snapshots", step / none, f"{key}_inflation")
    results.say()
    results.add(
        "  snapshots",
        found.taken,
        f"{found.taken} taken, {found.committed} committed, {found.skipped} skipped, "
        f"{found.dropped} dropped",
        f"{key}_taken",
    )
    results.say()
    for reason in sorted({reason for reason in found.reasons if reason}):
        results.rows.append(("    because", reason[:120]))
        results.say()
    for count in ("committed", "skipped", "dropped"):
        results.figures[f"{key}_{count}"] = getattr(found, count)
    if found.stalls:
        results.times("  stall of the training thread", found.stalls, f"{key}_stall")
        results.figures[f"{key}_stall_max_s"] = max(found.stalls)
    # Shares, for captures that were under way when it began are counted, too.
    shares = {way: found.ways[way] / max(1, found.ways.total()) for way in _WAYS}
    text = ", ".join(f"{share:.0%} {way}" for way, share in shares.items())
    results.rows.append(("  of each snapshot", text))
    results.say()
    for way, share in shares.items():
        results.figures[f"{key}_{way}_share"] = share
    waited_s = found.update_wait_s / max(1, found.taken)
    text = f"{waited_s * 1e3:9.2f} ms a snapshot, on the device"
    results.add("  updates waited for copies", waited_s, text, f"{key}_update_wait_s")
    results.say()
    _write_costs(results, key, found)
    if interval in variant.limits:
        results.target(f"{name}, over no snapshots", step / none, variant.limits[interval])
    results.target(f"{name}, skipped or dropped", found.skipped + found.dropped, 0)


def _write_costs(results: Results, key: str, found: Blocks) -> None:
    peak, more = found.peak_bytes, found.peak_bytes - found.none_peak_bytes
    text = f"{peak / 1e9:9.2f} GB, {more / 1e9:.2f} GB more than without"
    results.add("  device memory, peak", peak, text, f"{key}_peak_bytes")
    results.figures[f"{key}_more_device_bytes"] = more
    taken, elapsed = max(1, found.taken), max(found.elapsed_s, 1e-9)
    own = found.own_cpu_s - found.none_cpu_s
    results.add(
        "  CPU, agent",
        found.agent_cpu_s / taken,
        f"{found.agent_cpu_s / taken:9.3f} s a snapshot, {found.agent_cpu_s / elapsed:.2f} cores",
        f"{key}_agent_cpu_s",
    )
    results.add(
        "  CPU, trainer, more than without",
        own / taken,
        f"{own / taken:9.3f} s a snapshot, of it {found.threads_cpu_s / taken:.3f} in our threads",
        f"{key}_own_cpu_s",
    )
    results.figures[f"{key}_threads_cpu_s"] = found.threads_cpu_s / taken


def own_cpu_s() -> float:
    """CPU time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def threads_cpu_s() -> float:
    """CPU time so far of the living threads that are Everstep's own."""
    ours = {t.native_id for t in threading.enumerate() if t.name.startswith("everstep")}
    threads = psutil.Process().threads()
    return float(sum(t.user_time + t.system_time for t in threads if t.id in ours))


def write_memory(results: Results, agent_pid: int, memory_dir: Path) -> None:
    """What lies in memory for all of this."""
    files = [path.stat() for path in memory_dir.rglob("*") if path.is_file()]
    held = sum(stat.st_blocks * 512 for stat in files)
    results.add("all slots, in memory_dir", held, f"{held / 1e9:9.2f} GB", "arena_bytes")
    resident = psutil.Process(agent_pid).memory_info()
    own = resident.rss - resident.shared
    results.add("agent's own memory", own, f"{own / 1e6:9.1f} MB", "agent_bytes")


def floor(results: Results, state_bytes: int) -> float:
    """Step time over no snapshots if PCIe alone bounded a snapshot at every step."""
    none = [
        value
        for key, value in results.figures.items()
        if key in ("none_before_s", "waiting_every_1_none_s", "none_after_s")
    ]
    copy_s = state_bytes / results.figures["d2h_bytes_per_s"]
    return max(1.0, copy_s / middle(none))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
