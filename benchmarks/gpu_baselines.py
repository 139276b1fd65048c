"""What users have today, on the same model: torch.save and dcp.async_save, to tmpfs.

Owns these two, each as its users would call it: the whole state, the call's own stall, then
training until it is written. Promises that the stall begins with an idle device, so that no step
is counted in it. torch.distributed.checkpoint's staging with pinned and shared memory, on a thread
of its own, must be complete before the optimizer's step; that wait is its stall, too.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_results import Results
from benchmarks.gpu_workload import Training
from benchmarks.workload import scratch

WRITTEN_LIMIT_S = 60.0
_ROW_STEPS = 4


def torch_save(results: Results, training: Training) -> None:
    """Once; its trainer waits for all of it."""
    with scratch("/dev/shm") as directory:
        training.pace.synchronize()
        begun = time.perf_counter()
        torch.save(training.state(), directory / "state.pt")
        results.times("stall, torch.save to tmpfs", [time.perf_counter() - begun], "torch_save")


def async_save(results: Results, training: Training) -> None:
    """dcp.async_save as it is by default: staged in pageable memory while the trainer waits."""
    with _group(), scratch("/dev/shm") as directory:
        _saves(results, training, directory, "dcp.async_save", "dcp", lambda: None, saves=1)


def async_save_pinned(results: Results, training: Training) -> None:
    """dcp.async_save with all that its stager offers; a second save reuses it, or a new one."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stagers: list[Any] = []

    def stager() -> Any:
        stagers.append(DefaultStager(StagingOptions(True, True, True, True)))
        return stagers[-1]

    with _group(), scratch("/dev/shm") as directory:
        try:
            name = "dcp.async_save, pinned shared staging"
            _saves(results, training, directory, name, "dcp_pinned", stager, saves=2)
        finally:
            for one in stagers:
                one.close()
    gc.collect()


def _saves(
    results: Results,
    training: Training,
    directory: Path,
    name: str,
    key: str,
    make_stager: Callable[[], Any],
    saves: int,
) -> None:
    stager = make_stager()
    for number in range(1, saves + 1):
        numbered = f"{key}_{number}" if saves > 1 else key
        label = f"{name}, save {number}" if saves > 1 else name
        target = directory / f"save-{number}"
        try:
            _save(results, training, target, label, numbered, stager)
        except Exception as error:
            if number == 1:
                raise
            results.problems[f"{numbered}, same stager"] = f"{type(error).__name__}: {error}"[:500]
            stager = make_stager()
            _save(results, training, target, f"{label}, new stager", numbered, stager)


def _save(
    results: Results, training: Training, target: Path, name: str, key: str, stager: Any
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    none = [training.steps(_ROW_STEPS) for _ in range(2)]
    training.pace.synchronize()
    begun = time.perf_counter()
    model, optimizer = get_state_dict(training.model, training.optimizer)
    more = {} if stager is None else {"async_stager": stager}
    response: Any = dcp.async_save(
        {"model": model, "optimizer": optimizer}, checkpoint_id=str(target), **more
    )
    del model, optimizer
    stall = time.perf_counter() - begun
    staged = getattr(response, "staging_completion", None)
    written = getattr(response, "upload_completion", response)
    waited = [0.0]

    def await_staging() -> None:
        at = time.perf_counter()
        if staged is not None:
            staged.result()
        waited[0] += time.perf_counter() - at

    training.before_update.append(await_staging)
    try:
        times = _until(training, written)
    finally:
        training.before_update.remove(await_staging)
    written_s = time.perf_counter() - begun
    left = written.result(timeout=WRITTEN_LIMIT_S)
    del left
    results.times(f"stall, {name}", [stall + waited[0]], f"{key}_stall")
    step = results.times("  a step while it writes", times, f"{key}_step")
    plain = results.times("  a step before it", none, f"{key}_none")
    results.count("  of that", step / plain, f"{key}_inflation")
    results.say()
    steps = len(times) * _ROW_STEPS
    text = f"{written_s:9.2f} s, {steps} steps"
    results.add("  until it is written", written_s, text, f"{key}_written_s")
    results.say()
    results.figures[f"{key}_written_steps"] = steps
    # What taking them back to back costs: no interval below so many steps is possible.
    spent = sum(times) * _ROW_STEPS + stall
    results.figures[f"{key}_whole_inflation"] = spent / (plain * steps)


def _until(training: Training, written: Any) -> list[float]:
    """Step times, row by row, until it is written; at least one row."""
    deadline = time.monotonic() + WRITTEN_LIMIT_S
    times: list[float] = []
    while not times or (not written.done() and time.monotonic() < deadline):
        times.append(training.steps(_ROW_STEPS))
    return times


@contextmanager
def _group() -> Iterator[None]:
    import torch.distributed as distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()
