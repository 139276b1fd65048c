"""The picture of the GPU benchmark: extra step time against the interval of snapshots.

Owns how it looks; draws from the file that `benchmarks.gpu_capture --out` wrote, and only what is
in it. Needs matplotlib. Lines with marks are measured at each mark; dashed ones are computed from
one measured save as `cost of a save / (interval x step)`, from the smallest interval at which the
save before it is over.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEASURED = (
    ("device", "Everstep, copy-on-update", "#1d3f5e", "o"),
    ("eight_bit", "Everstep, 8-bit moments (bytes of that size)", "#2e8b57", "s"),
    ("host", "Everstep, digests on the host", "#6b8fb3", "v"),
    ("lazy", "lazy copy, fence before the update", "#f2b560", "^"),
)
_AT_EVERY_STEP = {"device": "waiting", "lazy": "lazy_waiting"}
"""Where PCIe cannot carry a snapshot in a step, the step waits instead of skipping it."""
_INTERVALS = (1, 2, 4, 8)
_LAST = 512
_RED, _PURPLE, _PINK, _GREY = "#c0392b", "#7d5ba6", "#d98cb3", "#777777"
_LEAST = 2e-4
"""Below what can be told apart from nothing; an axis of powers of ten has no zero."""


def draw(source: Path, target: Path) -> None:
    """Write the picture as SVG.

    Args:
        source: As written by ``--out``.
        target: The picture.
    """
    import matplotlib
    from matplotlib.figure import Figure

    found = json.loads(source.read_text())
    figures: dict[str, float] = found["figures"]
    matplotlib.rcParams["svg.hashsalt"] = "everstep"
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for key, label, color, mark in _MEASURED:
        _measured(axes, figures, key, label, color, mark)
    _floor(axes, figures)
    _computed(axes, figures)
    _dress(axes, found)
    figure.savefig(target, format="svg", metadata={"Date": None})


def _measured(
    axes: "Axes", figures: dict[str, float], key: str, label: str, color: str, mark: str
) -> None:
    names = {
        interval: f"{_AT_EVERY_STEP.get(key, key) if interval == 1 else key}_every_{interval}"
        for interval in _INTERVALS
    }
    points = [
        (interval, max(_LEAST, figures[f"{name}_inflation"] - 1))
        for interval, name in names.items()
        if f"{name}_inflation" in figures
    ]
    if points:
        intervals, extra = zip(*points, strict=True)
        axes.plot(intervals, extra, color=color, marker=mark, label=label)


def _floor(axes: "Axes", figures: dict[str, float]) -> None:
    if "floor_every_1" in figures:
        extra = max(_LEAST, figures["floor_every_1"] - 1)
        axes.plot(
            [1], [extra], color=_GREY, marker="_", markersize=16, linestyle="", label="PCIe alone"
        )


def _computed(axes: "Axes", figures: dict[str, float]) -> None:
    step = figures.get("none_after_s") or figures.get("none_before_s")
    if step and "torch_save_s" in figures:
        _dashed(axes, figures["torch_save_s"] / step, 1, "torch.save to tmpfs", _RED)
    for key, label, color in (
        ("dcp", "dcp.async_save, default", _PURPLE),
        ("dcp_pinned_2", "dcp.async_save, pinned shared staging", _PINK),
    ):
        steps = figures.get(f"{key}_written_steps")
        if steps:
            cost = (figures[f"{key}_whole_inflation"] - 1) * steps
            _dashed(axes, cost, int(steps), label, color)


def _dashed(axes: "Axes", cost_steps: float, first: int, label: str, color: str) -> None:
    """A save that costs so many steps' time, from the interval on at which it can be repeated."""
    intervals = [n for n in (first, *(1 << power for power in range(12))) if first <= n <= _LAST]
    if cost_steps <= 0 or not intervals:
        return
    intervals.sort()
    extra = [max(_LEAST, cost_steps / n) for n in intervals]
    axes.plot(intervals, extra, color=color, linestyle="--", linewidth=1.5, label=label)
    axes.plot(intervals[:1], extra[:1], color=color, marker="|", markersize=9, label="_nolegend_")


def _dress(axes: "Axes", found: dict[str, Any]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([1 << power for power in range(10)], [str(1 << p) for p in range(10)])
    ticks = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
    axes.set_yticks(ticks, [f"{tick * 100:g} %" for tick in ticks])
    axes.set_xlabel("a snapshot every so many steps")
    axes.set_ylabel("extra step time")
    size = found["figures"].get("state_bytes", 0) / 1e9
    axes.set_title(f"Snapshots of {size:.1f} GB of training state, {found['device']}")
    axes.grid(visible=True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
