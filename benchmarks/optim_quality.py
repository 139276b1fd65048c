"""What compressed state costs in loss: a byte-level GPT, learning rates tuned, three seeds.

``python -m benchmarks.optim_quality [--device D] [--jobs N] [--short] [--out JSON] [--plot SVG]``
Each method is run at every rate of its grid with one seed, then at the best of them with three
other seeds; the text, the weights at the start and the batches are the same for all. A difference
to fp32 counts as noise up to twice its standard error, from the seeds' deviations of the methods
that are compared. Gradients are clipped to a norm of 1 for all. Steps of the optimizer are timed
alone, after all runs. With ``--plot`` and an ``--out`` that exists, nothing is run: the picture is
drawn from the file.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.optim_quality_model import FULL, SHORT, ByteGpt, Outcome, Size, texts, train
from benchmarks.report import Report, machine

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
"""AdamW's, as GPTs are trained; with 0.999 and so few steps, luck decides at the best rates."""
ADAMW_RATE = 4e-3
"""Of what Muon leaves to AdamW."""

Optimizers = list[torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        make: The optimizers for a model and a learning rate.
        grid: Rates to try.
        compared_with: The row that it should be as good as.
        within: As a share of that row's loss; None: within the seeds' noise.
    """

    make: Callable[[torch.nn.Module, float], Optimizers]
    grid: tuple[float, ...]
    compared_with: str | None = None
    within: float | None = None


def _torch_adamw(model: torch.nn.Module, rate: float) -> Optimizers:
    return [torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, fused=True)]


def _planned(
    method: str, codec: str, decay: float = WEIGHT_DECAY
) -> Callable[[torch.nn.Module, float], Optimizers]:
    def make(model: torch.nn.Module, rate: float) -> Optimizers:
        from everstep.client.optim.plan import plan

        made = plan(model, method, codec)
        options: dict[str, dict[str, Any]] = {method: {"lr": rate, "weight_decay": decay}}
        if method == "Muon":
            options["AdamW"] = {"lr": ADAMW_RATE, "weight_decay": WEIGHT_DECAY}
        if "AdamW" in options:
            options["AdamW"]["betas"] = BETAS
        return made.optimizers(**options)

    return make


_ADAMW_GRID = (2e-3, 4e-3, 8e-3)
_LION_GRID = (5e-5, 1e-4, 2e-4)
_MUON_GRID = (2e-2, 4e-2, 8e-2)

METHODS: dict[str, Method] = {
    "AdamW fp32": Method(_torch_adamw, _ADAMW_GRID),
    "AdamW int8": Method(_planned("AdamW", "int8"), _ADAMW_GRID, "AdamW fp32"),
    "AdamW fp8": Method(_planned("AdamW", "fp8"), _ADAMW_GRID, "AdamW fp32"),
    "AdamW 4-bit": Method(_planned("AdamW", "4bit"), _ADAMW_GRID, "AdamW fp32", within=0.01),
    "AdamW dynamic": Method(_planned("AdamW", "dynamic"), _ADAMW_GRID, "AdamW fp32"),
    "AdamW bf16": Method(_planned("AdamW", "bf16"), _ADAMW_GRID, "AdamW fp32"),
    "Lion int8": Method(_planned("Lion", "int8", 3 * WEIGHT_DECAY), _LION_GRID),
    "Muon int8": Method(_planned("Muon", "int8"), _MUON_GRID),
}

_COMPARED = {name for name, method in METHODS.items() if method.compared_with} | {"AdamW fp32"}

_held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}


def _text(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    if device not in _held:
        train_text, held_out = texts()
        _held[device] = (train_text.to(device), held_out.to(device))
    return _held[device]


def _job(name: str, rate: float, seed: int, device: str, size: Size) -> Outcome:
    """One run, in a process of the pool."""
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    method = METHODS[name]
    return train(lambda model: method.make(model, rate), size, seed, _text(device))


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    if torch.cuda.device_count() > 1:
        number = multiprocessing.current_process()._identity[0]
        torch.cuda.set_device(number % torch.cuda.device_count())


def step_seconds(method: Method, rate: float, device: str, size: Size, rounds: int) -> list[float]:
    """Times of the optimizers' steps alone, gradients standing."""
    torch.manual_seed(0)
    model = ByteGpt(size).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizers = method.make(model, rate)
    times = []
    for round_ in range(rounds + 10):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        if round_ >= 10:
            times.append(time.perf_counter() - begun)
    return times


class Runs:
    """The pool, and what has come out of it."""

    def __init__(self, device: str, size: Size, jobs: int) -> None:
        self.device, self.size = device, size
        sys.path.append(str(Path(__file__).resolve().parents[1]))  # the new processes' path
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // jobs)
        self.pool = ProcessPoolExecutor(
            jobs, mp_context=context, initializer=_start, initargs=(threads,)
        )

    def all(
        self, wanted: Sequence[tuple[str, float, int]]
    ) -> dict[tuple[str, float, int], Outcome]:
        """Run what is wanted; a run that fails is told and left out."""
        begun = time.perf_counter()
        futures: dict[Future[Outcome], tuple[str, float, int]] = {
            self.pool.submit(_job, name, rate, seed, self.device, self.size): (name, rate, seed)
            for name, rate, seed in wanted
        }
        found = {}
        for future in as_completed(futures):
            name, rate, seed = key = futures[future]
            at = f"{time.perf_counter() - begun:6.1f} s  {name:<14} rate {rate:g} seed {seed}"
            problem = future.exception()
            if problem is not None:
                print(f"{at}  FAILED: {type(problem).__name__}: {problem}", file=sys.stderr)
                continue
            found[key] = future.result()
            taken = found[key].seconds
            print(f"{at}  loss {found[key].loss:.4f}  {taken:.1f} s", file=sys.stderr, flush=True)
        return found


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else 99.0


def measure(
    names: Sequence[str], device: str, size: Size, jobs: int, seeds: int, grid: int
) -> dict[str, Any]:
    """Everything, as `--out` writes it."""
    runs = Runs(device, size, jobs)
    grids = {name: _middle(METHODS[name].grid, grid) for name in names}
    tried = runs.all([(name, rate, 0) for name in names for rate in grids[name]])
    best: dict[str, float] = {}
    for name in names:
        losses = {
            rate: tried[name, rate, 0].loss for rate in grids[name] if (name, rate, 0) in tried
        }
        if losses:
            best[name] = min(losses, key=lambda rate: _finite(losses[rate]))
    wanted = [(name, rate, seed) for name, rate in best.items() for seed in range(1, seeds + 1)]
    final = runs.all(wanted)
    runs.pool.shutdown()
    methods: dict[str, Any] = {}
    for name, rate in best.items():
        outcomes = [final[key] for key in wanted if key[0] == name and key in final]
        if not outcomes:
            continue
        times = step_seconds(METHODS[name], rate, device, size, 50)
        methods[name] = {
            "rate": rate,
            "grid": [(r, _finite(tried[n, r, s].loss)) for n, r, s in tried if n == name],
            "losses": [outcome.loss for outcome in outcomes],
            "curve": outcomes[0].curve,
            "state_bytes": outcomes[0].state_bytes,
            "step_s": statistics.median(times),
        }
        methods[name]["grid"].sort()
        methods[name]["parameters"] = outcomes[0].parameters
    where = torch.cuda.get_device_name() if device == "cuda" else machine()["name"]
    return {
        "benchmark": "optim_quality",
        "machine": machine(),
        "device": where,
        "steps": size.steps,
        "tokens_a_step": size.batch * size.context,
        "parameters": next(iter(methods.values()))["parameters"],
        "methods": methods,
        "noise_band": _band(methods),
    }


def _middle(grid: tuple[float, ...], count: int) -> tuple[float, ...]:
    left = (len(grid) - count + 1) // 2
    return grid[max(0, left) : max(0, left) + count]


def deviation(methods: dict[str, Any]) -> float:
    """Of one seed's loss, from all rows that are compared with each other."""
    compared = [row["losses"] for name, row in methods.items() if name in _COMPARED]
    spread = [statistics.variance(losses) for losses in compared if len(losses) > 1]
    return math.sqrt(statistics.fmean(spread)) if spread else 0.0


def _noise(methods: dict[str, Any], name: str, other: str) -> float:
    """Twice the standard error of the difference of two rows."""
    counts = [len(methods[row]["losses"]) for row in (name, other)]
    return 2 * deviation(methods) * math.sqrt(sum(1 / count for count in counts))


def _band(methods: dict[str, Any]) -> tuple[float, float]:
    if "AdamW fp32" not in methods:
        return (0.0, 0.0)
    mean = statistics.fmean(methods["AdamW fp32"]["losses"])
    noise = _noise(methods, "AdamW fp32", "AdamW fp32")
    return (mean - noise, mean + noise)


def report(found: dict[str, Any]) -> Report:
    """The table and the goals."""
    table = Report("optim_quality")
    methods = found["methods"]
    for name, row in methods.items():
        losses = row["losses"]
        mean = statistics.fmean(losses)
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        text = (
            f"{mean:.4f} +- {spread:.4f} (n={len(losses)})   "
            f"{row['state_bytes']:6.3f} B/parameter   "
            f"{row['step_s'] * 1e3:7.3f} ms/step   rate {row['rate']:g}"
        )
        key = name.lower().replace(" ", "_").replace("-", "")
        table.add(name, mean, text, f"{key}_loss")
        table.figures[f"{key}_state_bytes"] = row["state_bytes"]
        table.figures[f"{key}_step_s"] = row["step_s"]
    table.figures["seed_deviation"] = deviation(methods)
    for name, row in methods.items():
        other = METHODS[name].compared_with
        if other is None or other not in methods:
            continue
        reference = statistics.fmean(methods[other]["losses"])
        excess = statistics.fmean(row["losses"]) - reference
        share = METHODS[name].within
        if share is None:
            table.target(f"{name}: loss above {other}", excess, _noise(methods, name, other))
        else:
            table.target(f"{name}: loss over {other}", 1 + excess / reference, 1 + share)
    return table


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=0, help="processes at once")
    parser.add_argument("--short", action="store_true", help="a minute on a CPU, for its logic")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--grid", type=int, default=3, help="rates to try, at most three")
    parser.add_argument("--only", default="", help="methods whose names contain one of these")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if not (options.plot and options.out and options.out.exists()):
        size = SHORT if options.short else FULL
        if options.steps:
            size = Size(**{**_fields(size), "steps": options.steps})
        names = [name for name in METHODS if any(o in name for o in options.only.split(","))]
        jobs = options.jobs or (12 if options.device == "cuda" else 1)
        seeds, grid = (2, 1) if options.short else (options.seeds, options.grid)
        found = measure(names, options.device, size, jobs, seeds, grid)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))
        report(found).print()
    if options.plot:
        from benchmarks.optim_quality_plot import draw

        draw(options.out, options.plot)


def _fields(size: Size) -> dict[str, int]:
    return {name: getattr(size, name) for name in Size.__slots__}


if __name__ == "__main__":
    main()
