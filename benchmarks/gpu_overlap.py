"""What the parts of a capture cost beside a training: copies, digests and clones, by themselves.

``python -m benchmarks.gpu_overlap [--rounds N]``. The training of `benchmarks.gpu_capture`, without
client or agent. Each sample is two steps: behind the mark at their beginning digests and clones are
launched and half of the state is copied off the device, behind the first update the other half,
from clones. The parts, together and alone, and on several streams, take turns in random order; a
figure is the median of what two steps took longer than two with nothing beside them. Copies all go
to one small pinned buffer: their speed is that of PCIe, and nothing is kept.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

import numpy
import torch
from numpy.typing import NDArray

from benchmarks.gpu_results import device_name
from benchmarks.gpu_workload import Size, Training
from benchmarks.report import Report
from everstep.kernels import xxh3_triton
from everstep.kernels.cuda_runtime import CudaRuntime
from everstep.kernels.xxh3_triton import LANES, UNIT_BYTES

COPY_UNITS = 32
PINNED_COPIES = 16
WINDOW_SHARE = 0.5
Rows = NDArray[numpy.uint64]


@dataclass(slots=True)
class Way:
    """One combination of parts.

    Attributes:
        name: Of its line.
        key: Of its figure.
        copies: Whether the state is copied off the device.
        digests: Whether units are digested.
        clones: Whether half of them are cloned by the same pass.
        stream: Where: "own", of the training's priority; "first", of a higher one; "training".
        samples: Milliseconds of two steps.
    """

    name: str
    key: str
    copies: bool = False
    digests: bool = False
    clones: bool = False
    stream: str = "own"
    samples: list[float] = field(default_factory=list)


def ways() -> list[Way]:
    """All that is measured; the first is the reference."""
    return [
        Way("nothing", "none"),
        Way("copies", "copies", copies=True),
        Way("digests", "digests", digests=True),
        Way("digests and clones", "clones", digests=True, clones=True),
        Way("all", "all", copies=True, digests=True, clones=True),
        Way("all, digests first", "all_first", True, True, True, "first"),
        Way("all, digests in the training's stream", "all_training", True, True, True, "training"),
    ]


class Overlap:
    """The training, and the work of a capture of its state."""

    def __init__(self, training: Training, runtime: CudaRuntime) -> None:
        self._training = training
        self._runtime = runtime
        device = training.device
        states = training.optimizer.state.values()
        tensors = [p.detach() for p in training.model.parameters()]
        tensors += [t for state in states for t in state.values() if t.nbytes >= UNIT_BYTES]
        runs = [list(_units(tensor)) for tensor in tensors]
        units = [address for run in runs for address in run]
        self._addresses = torch.tensor(units, dtype=torch.int64, device=device)
        self._found = torch.empty((len(units), LANES), dtype=torch.int64, pin_memory=True)
        window = int(len(units) * WINDOW_SHARE)
        size = (len(units) - window) * UNIT_BYTES
        self._scratch = torch.empty(size, dtype=torch.uint8, device=device)
        clones = list(_units(self._scratch))
        placed = [0] * window + clones
        self._clones = torch.tensor(placed, dtype=torch.int64, device=device)
        size = PINNED_COPIES * COPY_UNITS * UNIT_BYTES
        self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._window = self._rows(_first(runs, window))
        self._drains = self._rows([clones])
        self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._streams = {
            "own": torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
            "first": torch.cuda.Stream(device, priority=-1),  # type: ignore[no-untyped-call]
            "training": torch.cuda.current_stream(device),
        }
        self.state_bytes = len(units) * UNIT_BYTES

    def two_steps(self, way: Way) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue two steps with a capture beside them; the marks around them."""
        begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begun.record()
        if way.copies:
            self._copy(self._window)
        if way.digests:
            self._digest(way)
        self._training.before_update = [lambda: self._await(way)]
        self._step()
        self._training.before_update = []
        if way.copies:
            self._copy(self._drains)
        self._step()
        self._await(way)
        ended.record()
        return begun, ended

    def _step(self) -> None:
        self._training.step()
        self._training.pace.stepped()

    def _copy(self, rows: Rows) -> None:
        self._copying.wait_stream(torch.cuda.current_stream())
        self._runtime.copy_async(rows, self._copying.cuda_stream)

    def _digest(self, way: Way) -> None:
        stream = self._streams[way.stream]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            clones = self._clones if way.clones else None
            xxh3_triton.accumulate(self._addresses, self._found, 16, clones=clones)

    def _await(self, way: Way) -> None:
        """The update waits for all that reads what it changes."""
        for stream in (self._copying, self._streams[way.stream]):
            torch.cuda.current_stream().wait_stream(stream)

    def _rows(self, runs: Sequence[Sequence[int]]) -> Rows:
        """Copies of units, a run of neighbours by one."""
        rows: list[tuple[int, int, int]] = []
        for run in runs:
            for start in range(0, len(run), COPY_UNITS):
                count = min(COPY_UNITS, len(run) - start)
                place = len(rows) % PINNED_COPIES * COPY_UNITS * UNIT_BYTES
                rows.append((self._pinned.data_ptr() + place, run[start], count * UNIT_BYTES))
        return numpy.array(rows, dtype=numpy.uint64)


def _units(tensor: torch.Tensor) -> range:
    """The addresses of a tensor's whole units."""
    begin = tensor.data_ptr()
    return range(begin, begin + tensor.nbytes // UNIT_BYTES * UNIT_BYTES, UNIT_BYTES)


def _first(runs: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """The first so many units."""
    found: list[Sequence[int]] = []
    for run in runs:
        found.append(run[: max(0, count)])
        count -= len(run)
    return [run for run in found if run]


def measure(overlap: Overlap, measured: Sequence[Way], rounds: int) -> None:
    """Fill in the samples; the first round is left out."""
    pick = random.Random(0)
    for number in range(rounds + 1):
        order = list(measured)
        pick.shuffle(order)
        marks = [(way, *overlap.two_steps(way)) for way in order]
        torch.cuda.synchronize()
        if number:
            for way, begun, ended in marks:
                way.samples.append(begun.elapsed_time(ended))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=13)
    options = parser.parse_args()
    runtime = CudaRuntime.find()
    if runtime is None or not torch.cuda.is_available():
        print("gpu_overlap: there is no GPU here, nothing is measured")
        return
    report = Report("gpu_overlap")
    report.rows.append(("accelerator", device_name("cuda")))
    overlap = Overlap(Training.start("cuda", Size()), runtime)
    report.add("state", overlap.state_bytes, f"{overlap.state_bytes / 1e9:9.2f} GB", "state_bytes")
    measured = ways()
    measure(overlap, measured, options.rounds)
    nothing = median(measured[0].samples)
    report.add("two steps", nothing / 1e3, f"{nothing:9.2f} ms", "two_steps_s")
    for way in measured[1:]:
        more = median(way.samples) - nothing
        low, _, high = (each - nothing for each in quantiles(way.samples, n=4))
        text = f"{more:9.2f} ms more, {more / nothing:.2%}   (quartiles {low:.2f} to {high:.2f})"
        report.add(f"  {way.name}", more / 1e3, text, f"{way.key}_s")
    report.print()


if __name__ == "__main__":
    main()
