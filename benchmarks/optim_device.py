"""Optimizer steps on one GPU against the bandwidth that their bytes allow.

``python -m benchmarks.optim_device [--parameters N ...] [--rounds N] [--tune] [--only NAME ...]``.
First every codec and method is stepped on odd shapes and compared, bit for bit, with the torch
reference on the same device. Then sets of tensors are stepped: those of a language model with
50 M and 500 M parameters, and 50 M in thousands of small ones. A figure is the median of several
CUDA event times, as bytes a second over those of a copy within the device (which reads and
writes). torch's fused AdamW stands beside, and bitsandbytes and torchao where they are installed.
Before, other layouts of the work are timed (``--tune``: nothing else).
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.report import Report
from everstep.client.optim import methods, reference
from everstep.kernels import optimizer_triton
from everstep.kernels.optimizer_kinds_triton import Launch
from everstep.kernels.optimizer_work import METHODS, CodedState, Work

DEVICE = torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16
SECOND = ("v", "h")
LAYOUTS = (
    *(Launch(2048, 4), Launch(1024, 4), Launch(512, 4), Launch(1024, 4, 2), Launch(512, 4, 4)),
    *(Launch(1024, 4, 4), Launch(512, 2), Launch(1024, 8)),
)
TUNED = ("int8", "4bit", "fp8")
_HEAD_START_CYCLES = 2_000_000
"""About a millisecond: the host enqueues all that is timed meanwhile, or the device would wait for
it at the first launch, a twentieth of some figures."""


@dataclass(frozen=True, slots=True)
class Case:
    """An optimizer as it is run.

    Attributes:
        method: One of `METHODS`.
        codec: "fp32", "bf16" or one that has roles, without its role.
        block: Of the codec.
        parameter: Type of the parameters.
        gradient: Type of the gradients.
        corrected: Whether parameters are bf16 with a correction.
        seed: Not 0: stochastic rounding.
        target: What part of the bandwidth is to be reached; 0: no matter.
    """

    method: str
    codec: str
    block: int = 0
    parameter: torch.dtype = FP32
    gradient: torch.dtype = FP32
    corrected: bool = False
    seed: int = 0
    target: float = 0.0


assert methods.METHODS  # importing them enters their arithmetic in the reference
CASES = {
    "int8": Case("adam", "int8", 64, target=0.85),
    "4bit": Case("adam", "fourbit", 128, target=0.85),
    "fp8": Case("adam", "fp8", 128, target=0.85),
    "lion_int8": Case("lion", "int8", 64),
    "fp32": Case("adam", "fp32"),
    "bf16": Case("adam", "bf16"),
    "dynamic": Case("adam", "dynamic", 256),
    "master": Case("adam", "int8", 64, BF16, BF16, corrected=True),
    "random": Case("adam", "int8", 64, BF16, BF16, seed=0x1234_5678_9ABC),
}


def full_name(codec: str, state: str) -> str:
    """The codec's name in the role of a state."""
    if codec in ("fp32", "bf16", "bf16_int8"):
        return codec
    return codec + ("_second" if state in SECOND else "_signed")


def state_of(codec: str, block: int, shape: tuple[int, int]) -> CodedState:
    """A state of zeros."""
    if codec in ("fp32", "bf16"):
        kind = FP32 if codec == "fp32" else BF16
        return CodedState(codec, 0, torch.zeros(shape, dtype=kind, device=DEVICE))
    if codec == "bf16_int8":
        codes = torch.zeros(shape, dtype=BF16, device=DEVICE)
        return CodedState(codec, 0, codes, None, torch.zeros_like(codes, dtype=torch.int8))
    rows, row = shape
    width = -(-row // 2) if codec.startswith("fourbit") else row
    kind = torch.int8 if codec == "int8_signed" else torch.uint8
    codes = torch.zeros((rows, width), dtype=kind, device=DEVICE)
    parts = (2,) if codec.startswith("fp8") else ()
    scales = torch.zeros((rows, -(-row // block), *parts), device=DEVICE)
    return CodedState(codec, block, codes, scales)


def work_of(case: Case, shape: tuple[int, int]) -> Work:
    """One tensor with random values and a state of zeros."""
    generator = torch.Generator(DEVICE).manual_seed(shape[0] * 7 + shape[1])

    def noise(kind: torch.dtype, size: float) -> torch.Tensor:
        values = torch.empty(shape, device=DEVICE).normal_(generator=generator)
        return values.mul_(size).to(kind)

    names = METHODS[case.method]
    directed = "direction" in case.method or case.method == "apply"
    correction = torch.zeros(shape, dtype=torch.int8, device=DEVICE) if case.corrected else None
    return Work(
        rows=shape[0],
        row=shape[1],
        parameter=noise(case.parameter, 0.02),
        gradient=None if case.method == "apply" else noise(case.gradient, 1e-3),
        states=tuple(
            state_of(full_name(case.codec, name), case.block, shape) for name in names.states
        ),
        scalars=scalars_of(case.method, 1),
        correction=correction,
        direction=noise(FP32, 1.0) if directed else None,
        seed=case.seed,
    )


def scalars_of(method: str, step: int) -> tuple[float, ...]:
    """Numbers as an optimizer would pass them."""
    known = {
        "step_size": 1e-3 / (1 - 0.9**step), "decay": 1 - 1e-5, "b1": 0.9, "c1": 0.1, "b2": 0.999,
        "c2": 0.001, "root": (1 - 0.999**step) ** -0.5, "eps": 1e-8, "momentum": 0.9, "y": 1.0,
        "b3": 0.9999, "c3": 0.0001, "inverse1": 1 / (1 - 0.9**step), "alpha": 5.0,
        "inverse2": 1 / (1 - 0.999**step), "b1t": 0.5, "b2t": 0.5, "rho": 0.04, "theta": 50.0,
    }  # fmt: skip
    numbers = [known.get(name, 0.0) for name in METHODS[method].scalars]
    return tuple(torch.tensor(numbers, dtype=FP32).tolist())


def tensors_of(work: Work) -> Iterator[tuple[str, torch.Tensor]]:
    """All that a step may write, with names."""
    named = [("parameter", work.parameter), ("correction", work.correction)]
    named.append(("direction", work.direction))
    for place, state in enumerate(work.states):
        named += [(f"codes {place}", state.codes), (f"scales {place}", state.scales)]
        named.append((f"correction {place}", state.correction))
    yield from ((name, tensor) for name, tensor in named if tensor is not None)


def differences(found: Work, expected: Work) -> list[str]:
    """Which tensors have other bits; which NaN it is does not count."""
    told = []
    for (name, left), (_, right) in zip(tensors_of(found), tensors_of(expected), strict=True):
        same = left == right
        if left.is_floating_point():
            size = torch.int32 if left.element_size() == 4 else torch.int16
            same = (left.view(size) == right.view(size)) | (left.isnan() & right.isnan())
        if not bool(same.all()):
            told.append(f"{name}: {int((~same).sum())} of {same.numel()}")
    return told


SHAPES = ((8, 1024), (3, 300), (5, 129), (1, 70_001), (33, 260))


def make_special(works: list[Work]) -> None:
    """Gradients that are huge, tiny, zero, infinite, NaN."""
    for work in works:
        if work.gradient is not None:
            flat = work.gradient.view(-1)
            flat[-1], flat[130:140], flat[7] = 1e-30, 0.0, 1e4
    for work, place, value in ((works[1], 40, torch.inf), (works[2], 200, torch.nan)):
        if work.gradient is not None:
            work.gradient.view(-1)[place] = value


def check_bits(case: Case, name: str) -> list[str]:
    """Step odd shapes three times, with special gradients among them; returns what is wrong."""
    works = [work_of(case, shape) for shape in SHAPES]
    make_special(works)
    expected = copy.deepcopy(works)
    scale = torch.tensor(0.7, device=DEVICE)
    ours = optimizer_triton.Table(works, case.method)
    theirs = reference.Table(expected, case.method)
    wrong = []
    for step in range(1, 4):
        for work in (*works, *expected):
            work.scalars = scalars_of(case.method, step)
            work.seed = case.seed and case.seed + step
        ours.refresh(works)
        ours.step(scale, None)
        theirs.step(scale, None)
        for work, other in zip(works, expected, strict=True):
            wrong += [
                f"{name} {work.rows} x {work.row}, step {step}, {text}"
                for text in differences(work, other)
            ]
        if wrong:
            break
    return wrong


def check_all(report: Report) -> None:
    """Every case, and every method with int8; a difference is a line and a figure."""
    cases = dict(CASES)
    cases |= {f"{method}": Case(method, "int8", 64) for method in METHODS}
    begun = time.perf_counter()
    wrong: list[str] = []
    for name, case in cases.items():
        try:
            found = check_bits(case, name)
        except Exception as error:  # the other cases are still of interest
            found = [f"{name}: {type(error).__name__}: {error}"]
        print(f"  bits of {name}: {'; '.join(found[:6]) or 'same'}", flush=True)
        wrong += found
    took = time.perf_counter() - begun
    report.add("tensors that differ", len(wrong), f"{len(wrong)} in {took:.0f} s", "different")


def model_shapes(parameters: int) -> list[tuple[int, int]]:
    """Of a language model with about so many parameters."""
    width, layers = (512, 8) if parameters < 200_000_000 else (1536, 12)
    layer = [(width, width)] * 4 + [(4 * width, width)] * 2 + [(width, 4 * width), (1, width)]
    shapes = layer * layers
    left = parameters - sum(rows * row for rows, row in shapes)
    return [(left // width, width), *shapes]


def small_shapes(parameters: int) -> list[tuple[int, int]]:
    """Thousands of small tensors."""
    some = [(64, 64), (128, 96), (1, 4096), (32, 288), (256, 64)]
    size = sum(rows * row for rows, row in some)
    return some * (parameters // size)


def bytes_of(works: list[Work]) -> int:
    """What one step must move: gradients are read, all else is read and written."""
    moved = 0
    for work in works:
        moved += 0 if work.gradient is None else work.gradient.nbytes
        moved += sum(2 * tensor.nbytes for _, tensor in tensors_of(work))
    return moved


def timed(call: Callable[[], object], rounds: int, each: int = 1) -> float:
    """Seconds of one call: the median of several turns, of `each` calls."""
    for _ in range(2):
        call()
    samples = []
    for _ in range(rounds):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START_CYCLES)
        begun.record()
        for _ in range(each):
            call()
        ended.record()
        ended.synchronize()
        samples.append(begun.elapsed_time(ended) / 1e3 / each)
    return statistics.median(samples)


def copy_rate(rounds: int) -> float:
    """Bytes a second of a copy within the device, read and written ones."""
    source = torch.empty(1 << 28, dtype=FP32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), rounds)


def run_case(
    report: Report, name: str, label: str, shapes: list[tuple[int, int]], rate: float, rounds: int
) -> None:
    """One optimizer on one set of tensors."""
    case = CASES[name]
    works = [work_of(case, shape) for shape in shapes]
    count = sum(work.parameter.numel() for work in works)
    table = optimizer_triton.Table(works, case.method)
    for step in range(1, 4):  # codes as in training, not all zero
        for work in works:
            work.scalars = scalars_of(case.method, step)
        table.refresh(works)
        table.step()
    moved = bytes_of(works)
    took = timed(table.step, rounds, 4)
    share = moved / took / rate
    torch.cuda.synchronize()
    numbers = scalars_of(case.method, 4)
    for work in works:
        work.scalars = numbers
    host = time.perf_counter()
    table.refresh(works)
    table.step()
    host = time.perf_counter() - host
    text = (
        f"{took * 1e3:8.3f} ms {moved / count:6.2f} B/parameter {moved / took / 1e12:5.2f} TB/s "
        f"{share:6.1%} of a copy; host {host * 1e6:.0f} us"
    )
    print(f"  {label} {name}: {text}", flush=True)
    report.add(f"{label} {name}", share, text, f"{label}_{name}")
    if case.target:
        report.target(f"{label}, {name}: part of a copy", share, case.target, at_least=True)


def run_others(
    report: Report, label: str, shapes: list[tuple[int, int]], rate: float, rounds: int
) -> None:
    """The optimizers of others."""
    parameters = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    made: dict[str, Callable[[], Any]] = {
        "torch fused AdamW": lambda: torch.optim.AdamW(parameters, fused=True)
    }
    try:
        import bitsandbytes

        made["bitsandbytes AdamW8bit"] = lambda: bitsandbytes.optim.AdamW8bit(parameters)
    except Exception as error:
        print(f"  bitsandbytes: {type(error).__name__}")
    try:
        from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

        for kind in (AdamW8bit, AdamW4bit, AdamWFp8):
            made[f"torchao {kind.__name__}"] = lambda kind=kind: kind(parameters)
    except Exception as error:
        print(f"  torchao: {type(error).__name__}")
    for name, make in made.items():
        try:
            took = timed(make().step, rounds, 2)
        except Exception as error:
            print(f"  {label} {name}: {type(error).__name__}: {error}")
            continue
        report.add(f"{label} {name}", took, f"{took * 1e3:8.3f} ms", f"{label}_{name}_s")
        print(f"  {label} {name}: {took * 1e3:.3f} ms", flush=True)


def tune(report: Report, names: list[str], rate: float, rounds: int) -> None:
    """Every layout of the work."""
    shapes = model_shapes(50_000_000)
    for name in names:
        case = CASES[name]
        works = [work_of(case, shape) for shape in shapes]
        moved = bytes_of(works)
        for layout in LAYOUTS:
            begun = time.perf_counter()
            table = optimizer_triton.Table(works, case.method, layout)
            for _ in range(3):
                table.step()
            torch.cuda.synchronize()
            compiled = time.perf_counter() - begun
            took = timed(table.step, rounds, 4)
            key = f"{name}_{layout.elements}_{layout.warps}_{layout.tiles}"
            text = f"{took * 1e3:8.3f} ms {moved / took / rate:6.1%}"
            print(f"  {key}: {text} (first {compiled:.1f} s)", flush=True)
            report.add(key, moved / took / rate, text, key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, nargs="*", default=[50_000_000, 500_000_000])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-tune", action="store_true")
    arguments = parser.parse_args()
    report = Report("optim_device")
    rate = copy_rate(arguments.rounds)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    report.add("copy", rate, f"{rate / 1e12:.3f} TB/s", "copy_bytes_per_s")
    if not arguments.no_check and not arguments.tune:
        check_all(report)
    if not arguments.no_tune:
        tune(report, arguments.only or list(TUNED), rate, arguments.rounds)
    if arguments.tune:
        report.print()
        return
    sets = {f"{count // 1_000_000}M": model_shapes(count) for count in arguments.parameters}
    sets["small"] = small_shapes(50_000_000)
    for label, shapes in sets.items():
        for name in arguments.only or CASES:
            run_case(report, name, label, shapes, rate, arguments.rounds)
            torch.cuda.empty_cache()
        run_others(report, label, shapes, rate, arguments.rounds)
        torch.cuda.empty_cache()
    report.print()


if __name__ == "__main__":
    main()
