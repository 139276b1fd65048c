"""What the GPU benchmark found so far: the report, and a file that outlives a run cut short.

Owns the file named by ``--out``. Promises that whatever was measured before an error, or before
the machine went away, is in it; that a failed part leaves its reason in `problems` and the other
parts alone; and that figures of an earlier run with the same file are kept where not measured anew.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.report import Report, machine


@dataclass(slots=True)
class Results(Report):
    """A report that is written down as it grows."""

    path: Path | None = None
    device: str = ""
    problems: dict[str, str] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    begun_s: float = field(default_factory=time.monotonic)

    def resume(self) -> None:
        """Take over the figures of earlier runs, if the file has any from this device."""
        if self.path is not None and self.path.exists():
            before = json.loads(self.path.read_text())
            if before.get("device") == self.device:
                self.figures.update(before["figures"])
                self.parts.update(before["parts"])

    def part(self, name: str, action: Callable[[], object]) -> None:
        """Run one part; whatever goes wrong in it is written down and ends nothing else."""
        begun = time.monotonic()
        print(f"# {name}, {begun - self.begun_s:.0f} s after the start", flush=True)
        try:
            action()
        except (Exception, SystemExit) as error:
            self.problems[name] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc(file=sys.stdout)
        self.parts[name] = round(time.monotonic() - begun, 1)
        self.save()

    def count(self, name: str, value: float, key: str, unit: str = "") -> None:
        """A plain number."""
        self.add(name, value, f"{value:12.3f} {unit}".rstrip(), key)

    def times(self, name: str, samples: Sequence[float], key: str) -> float:
        """As `seconds`, and said at once."""
        value = self.seconds(name, samples, key)
        print(f"    {self.rows[-1][0]}: {self.rows[-1][1]}", flush=True)
        return value

    def say(self) -> None:
        """The last line of the table, at once."""
        print(f"    {self.rows[-1][0]}: {self.rows[-1][1]}", flush=True)

    def save(self) -> None:
        """Write everything so far, in one piece."""
        if self.path is None:
            return
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        partial.replace(self.path)

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        # Not super(): a dataclass with slots is another class than the one its methods know.
        return {
            **Report.as_json(self),
            "device": self.device,
            "parts": self.parts,
            "problems": self.problems,
            "measured_unix_s": round(time.time()),
        }


def device_name(device: str) -> str:
    """The accelerator, in words."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else machine()["name"]


def middle(samples: Sequence[float]) -> float:
    """The median, or NaN of nothing."""
    return median(samples) if samples else float("nan")
