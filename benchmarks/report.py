"""Tables, targets and the JSON line that every benchmark ends with."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Target:
    """A ratio that is to hold.

    Attributes:
        name: What is compared with what.
        value: As measured.
        limit: What it must not exceed, or, with `at_least`, must reach.
        at_least: Which of the two.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it holds."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(slots=True)
class Report:
    """What one benchmark found."""

    name: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def add(self, name: str, value: float, text: str, key: str) -> None:
        """One line of the table, and its figure."""
        self.rows.append((name, text))
        self.figures[key] = value

    def seconds(self, name: str, samples: Sequence[float], key: str) -> float:
        """A line with the median of several times, and their range; returns the median."""
        median = statistics.median(samples)
        low, high = min(samples), max(samples)
        spread = f"{median * 1e3:9.1f} ms   ({low * 1e3:.1f} to {high * 1e3:.1f}, n={len(samples)})"
        self.add(name, median, spread, key + "_s")
        return median

    def target(self, name: str, value: float, limit: float, *, at_least: bool = False) -> None:
        """A ratio with what it should be."""
        self.targets.append(Target(name, value, limit, at_least))

    def print(self) -> None:
        """The table, and last the JSON line."""
        width = max(len(name) for name, _ in self.rows + [(t.name, "") for t in self.targets])
        print(f"{self.name}, on {machine()['name']}")
        for name, text in self.rows:
            print(f"  {name:<{width}}  {text}")
        for target in self.targets:
            sign = ">=" if target.at_least else "<="
            verdict = "met" if target.met else "MISSED"
            text = f"{target.value:9.3f}   {sign} {target.limit:g}: {verdict}"
            print(f"  {target.name:<{width}}  {text}")
        print(json.dumps(self.as_json()), flush=True)

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "benchmark": self.name,
            "machine": machine(),
            "figures": {key: round(value, 6) for key, value in self.figures.items()},
            "targets": [
                {
                    "name": target.name,
                    "value": round(target.value, 4),
                    "limit": target.limit,
                    "at_least": target.at_least,
                    "met": target.met,
                }
                for target in self.targets
            ],
        }


def machine() -> dict[str, Any]:
    """Where this was measured."""
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": f"{model}, {cores} cores, {memory >> 30} GiB",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
