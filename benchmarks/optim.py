"""Step time and state bytes of every optimizer and codec, against torch's fused AdamW.

``python -m benchmarks.optim [--parameters 10,50] [--rounds N] [--peers PYTHON]``. All optimizers
step the same parameters and gradients in turns, the reference between any two of them; a row's
ratio is the median, over rounds, of its time over the mean of the two references beside it. Before
each step is a pause, since OpenMP's threads, which the reference uses, spin for some milliseconds
after their work and would take a core from whatever comes next (``--pause-ms 0`` shows it). The
shapes are those of a small Llama. bitsandbytes and torchao, where PYTHON (default: this one) can
import them, have a process each and a reference of their own in it: two OpenMP libraries in one
process wait in each other's way, and OMP_WAIT_POLICY=PASSIVE is the best that they do.
"""

import argparse
import gc
import importlib
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Report

WIDTH, HIDDEN = 512, 1376
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN + 2 * WIDTH
WARM = 3
PAUSE_S = 0.02

Parameters = list[torch.nn.Parameter]
Make = Callable[[Parameters], Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row is to reach.

    Attributes:
        ratio: Of its step's time to the reference's.
        state_bytes: A parameter.
    """

    ratio: float
    state_bytes: float


GOALS = {
    "AdamW int8": Goal(1.1, 2.15),
    "Lion int8": Goal(1.0, 1.1),
    "AdamW 4bit": Goal(1.5, 1.1),
}

PEERS = {
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "bitsandbytes Lion8bit": ("bitsandbytes.optim", "Lion8bit"),
    "torchao AdamW8bit": ("torchao.optim", "AdamW8bit"),
    "torchao AdamW4bit": ("torchao.optim", "AdamW4bit"),
    "torchao AdamWFp8": ("torchao.optim", "AdamWFp8"),
}
PEER_TIMEOUT_S = 900


def parameters_of(millions: int) -> Parameters:
    """Parameters with gradients: an embedding, layers of a Llama, and a norm."""
    layers = max(1, round((millions * 1_000_000 - 1024 * WIDTH) / LAYER))
    shapes: list[tuple[int, ...]] = [(1024, WIDTH)]
    for _ in range(layers):
        shapes += [(WIDTH, WIDTH)] * 4
        shapes += [(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN), (WIDTH,), (WIDTH,)]
    shapes.append((WIDTH,))
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, generator=generator) * 1e-3
        made.append(parameter)
    return made


def reference(parameters: Parameters) -> torch.optim.Optimizer:
    """What all are compared with."""
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def ours(name: str, **options: object) -> Make:
    """An optimizer of this package."""

    def make(parameters: Parameters) -> torch.optim.Optimizer:
        from everstep.client.optim.methods import method_named

        make_one: Callable[..., torch.optim.Optimizer] = method_named(name)
        return make_one(parameters, lr=1e-5, **options)

    return make


def in_bf16(make: Make) -> Make:
    """With parameters and gradients of its own, in bf16."""

    def made(parameters: Parameters) -> torch.optim.Optimizer:
        halves = []
        for parameter in parameters:
            half = torch.nn.Parameter(parameter.detach().bfloat16())
            assert parameter.grad is not None
            half.grad = parameter.grad.bfloat16()
            halves.append(half)
        return make(halves)

    return made


class Together:
    """Muon for hidden matrices and AdamW for the rest, stepped as one."""

    def __init__(self, parameters: Parameters) -> None:
        from everstep.client.optim.methods import method_named

        hidden = [p for p in parameters[1:] if p.ndim == 2]
        rest = [parameters[0], *(p for p in parameters if p.ndim < 2)]
        self.both = [method_named("Muon")(hidden, lr=1e-5), method_named("AdamW")(rest, lr=1e-5)]
        self.param_groups = [group for one in self.both for group in one.param_groups]

    def step(self) -> None:
        """Both."""
        for one in self.both:
            one.step()

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        """Of both."""
        return {p: state for one in self.both for p, state in one.state.items()}


def candidates() -> dict[str, Make]:
    """The rows, in order."""
    rows: dict[str, Make] = {
        "torch AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-5, foreach=True),
        "torch SGD momentum fused": lambda p: torch.optim.SGD(p, lr=1e-5, momentum=0.9, fused=True),
    }
    for codec in ("fp32", "bf16", "bf16+8", "int8", "fp8", "4bit", "dynamic"):
        rows[f"AdamW {codec}"] = ours("AdamW", codec=codec)
    master = ours("AdamW", codec="int8", master="bf16_int8")
    rows["AdamW int8, bf16 weights + master"] = in_bf16(master)
    rows["AdamW int8, clipped"] = ours("AdamW", codec="int8", clip_norm=1.0)
    for name in ("Lion", "SGD", "Adam", "AdEMAMix", "EXAdam", "AdamP", "SGDSaI", "Sophia", "SPAM"):
        options = {"momentum": 0.9} if name == "SGD" else {}
        rows[f"{name} int8"] = ours(name, codec="int8", **options)
    rows["Lion 4bit"] = ours("Lion", codec="4bit")
    rows["Muon + AdamW int8"] = Together
    rows["compress(torch AdamW fused) int8"] = _compressed
    return rows


SLOW = ("Muon + AdamW int8", "compress(torch AdamW fused) int8")
"""Measured at the first size only."""


def _compressed(parameters: Parameters) -> torch.optim.Optimizer:
    from everstep.client.optim.compress import compress

    return compress(reference(parameters), codec="int8")


def seconds(optimizer: Any, pause_s: float = PAUSE_S) -> float:
    """Of one step, once OpenMP's threads of the step before have stopped spinning."""
    time.sleep(pause_s)
    begun = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - begun


@dataclass(slots=True)
class Row:
    """What was measured of one optimizer.

    Attributes:
        ratios: To the references beside it, one a round.
        times: Of its steps.
        references: Of the reference's steps.
        state_bytes: A parameter.
    """

    ratios: list[float]
    times: list[float]
    references: list[float]
    state_bytes: float


def state_bytes(optimizer: Any) -> float:
    """Bytes of tensors in the state, a parameter."""
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    parts = [part for t in tensors if isinstance(t, torch.Tensor) for part in _parts(t)]
    size = sum(part.numel() * part.element_size() for part in parts)
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return size / count


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor holds: torchao's are of others, and say that they are fp32."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def measure(makes: dict[str, Make], millions: int, rounds: int, pause_s: float) -> dict[str, Row]:
    """All in turns; those that cannot be made are told and left out."""
    parameters = parameters_of(millions)
    plain = reference(parameters)
    made = {}
    for name, make in makes.items():
        try:
            optimizer = make(parameters)
            for _ in range(WARM):
                optimizer.step()
            made[name] = optimizer
        except Exception as problem:
            print(f"{name}: left out: {type(problem).__name__}: {problem}", file=sys.stderr)
    for _ in range(WARM):
        plain.step()
    rows = {name: Row([], [], [], state_bytes(optimizer)) for name, optimizer in made.items()}
    for _ in range(rounds):
        before = seconds(plain, pause_s)
        for name, optimizer in made.items():
            taken, after = seconds(optimizer, pause_s), seconds(plain, pause_s)
            row = rows[name]
            row.times.append(taken)
            row.references.append(after)
            row.ratios.append(taken / ((before + after) / 2))
            before = after
    return rows


def peer(name: str, millions: int, rounds: int) -> None:
    """In a process of its own: one peer against its own reference; prints JSON."""
    module, kind = PEERS[name]
    parameters = parameters_of(millions)
    plain = reference(parameters)
    for _ in range(WARM + rounds // 2):
        plain.step()
    references = [seconds(plain) for _ in range(rounds)]
    made = getattr(importlib.import_module(module), kind)(parameters, lr=1e-5)
    for _ in range(WARM):
        made.step()
    times = [seconds(made) for _ in range(rounds)]
    after = [seconds(plain) for _ in range(rounds)]
    middle = statistics.median(references)
    row = {
        "times": times,
        "references": references,
        "after": statistics.median(after),
        "ratios": [taken / middle for taken in times],
        "state_bytes": state_bytes(made),
    }
    print(json.dumps(row))


def peers(python: str, millions: int, rounds: int) -> dict[str, Row]:
    """Each in its process; those that cannot be imported are left out."""
    found = {}
    for name in PEERS:
        command = ["env", "OMP_WAIT_POLICY=PASSIVE", python, "-m", "benchmarks.optim"]
        command += ["--peer", name, "--parameters", str(millions), "--rounds", str(rounds)]
        root = Path(__file__).resolve().parents[1]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PEER_TIMEOUT_S, cwd=root
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: left out: not done in {PEER_TIMEOUT_S} s", file=sys.stderr)
            continue
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["?"])[-1]
            print(f"{name}: left out: {last}", file=sys.stderr)
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        found[name] = Row(row["ratios"], row["times"], row["references"], row["state_bytes"])
    return found


def tell(report: Report, rows: dict[str, Row], millions: int) -> None:
    """Rows and goals of one size."""
    references = [taken for row in rows.values() for taken in row.references]
    if not references:
        return
    report.seconds(f"{millions} M: torch AdamW fused", references, f"{millions}m_reference")
    for name, row in rows.items():
        ratio = statistics.median(row.ratios)
        key = f"{millions}m_{name.lower().replace(' ', '_').replace(',', '')}"
        best = min(row.times) / min(row.references)
        text = (
            f"{ratio:7.2f}x  {statistics.median(row.times) * 1e3:8.1f} ms  best over best "
            f"{best:6.2f}x  {row.state_bytes:6.3f} B/parameter"
        )
        report.add(f"{millions} M: {name}", ratio, text, f"{key}_ratio")
        report.figures[f"{key}_best_ratio"] = best
        report.figures[f"{key}_s"] = statistics.median(row.times)
        report.figures[f"{key}_state_bytes"] = row.state_bytes
        if name in GOALS:
            report.target(f"{millions} M: {name}: time", ratio, GOALS[name].ratio)
            limit = GOALS[name].state_bytes
            report.target(f"{millions} M: {name}: bytes", row.state_bytes, limit)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", default="10,50", help="millions, comma-separated")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pause-ms", type=float, default=PAUSE_S * 1e3, help="before each step")
    parser.add_argument("--only", default="", help="rows that contain one of these")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="none: no peers")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("everstep").setLevel(logging.ERROR)
    sizes = [int(size) for size in options.parameters.split(",")]
    if options.peer:
        peer(options.peer, sizes[0], options.rounds)
        return
    report = Report("optim")
    only = options.only.split(",")
    rows = {name: make for name, make in candidates().items() if any(o in name for o in only)}
    for millions in sizes:
        if millions != sizes[0]:
            rows = {name: make for name, make in rows.items() if name not in SLOW}
        found = measure(rows, millions, options.rounds, options.pause_ms / 1e3)
        tell(report, found, millions)
        gc.collect()
        if options.peers != "none" and millions == sizes[0]:
            few = max(3, options.rounds // 3)
            for name, row in peers(options.peers, millions, few).items():
                tell_peer(report, name, row, millions)
    report.print()


def tell_peer(report: Report, name: str, row: Row, millions: int) -> None:
    """A row that has a reference of its own."""
    ratio = statistics.median(row.ratios)
    key = f"{millions}m_{name.lower().replace(' ', '_')}"
    text = (
        f"{ratio:7.2f}x  {statistics.median(row.times) * 1e3:8.1f} ms  over its own reference's "
        f"{statistics.median(row.references) * 1e3:.1f} ms  {row.state_bytes:6.3f} B/parameter"
    )
    report.add(f"{millions} M: {name}", ratio, text, f"{key}_ratio")
    report.figures[f"{key}_state_bytes"] = row.state_bytes


if __name__ == "__main__":
    main()
