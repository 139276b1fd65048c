"""The picture of the optimizers' quality: validation loss against bytes of state a parameter.

Owns how it looks; draws from the JSON that `benchmarks.optim_quality --out` wrote, and only what is
in it. Needs matplotlib.
"""

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#1d3f5e", "#2e8b57", "#c0392b", "#f2b560", "#7d5ba6", "#6b8fb3", "#d98cb3", "#777777")
_MARKS = "osv^DPX*"
_BASE = "AdamW fp32"


def draw(source: Path, target: Path) -> None:
    """Write the picture as SVG.

    Args:
        source: As written by ``--out``.
        target: The picture.
    """
    import matplotlib
    from matplotlib.figure import Figure

    found = json.loads(source.read_text())
    matplotlib.rcParams["svg.hashsalt"] = "everstep"
    figure = Figure(figsize=(9.5, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _codecs(left, found)
    if all("curve" in row for row in found["methods"].values()):
        _curves(right, found)
    else:
        _rates(right, found)
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Byte-level GPT of {found['parameters'] / 1e6:.1f} M parameters, {found['steps']} steps "
        f"of {found['tokens_a_step']} bytes, {found['device']}",
        fontsize=10,
    )
    figure.savefig(target, format="svg", metadata={"Date": None})


def _look(index: int) -> dict[str, Any]:
    return {"color": _COLORS[index % 8], "marker": _MARKS[index % 8]}


def _codecs(axes: "Axes", found: dict[str, Any]) -> None:
    """AdamW's codecs: each seed small, their mean large, over fp32's mean."""
    methods: dict[str, dict[str, Any]] = found["methods"]
    base = statistics.fmean(methods[_BASE]["losses"]) if _BASE in methods else 1.0
    low, high = found["noise_band"]
    if high:
        band = (100 * (low / base - 1), 100 * (high / base - 1))
        axes.axhspan(*band, color=_COLORS[0], alpha=0.08, linewidth=0, label="noise of seeds")
    for index, (name, row) in enumerate(methods.items()):
        if not name.startswith("AdamW"):
            continue
        excess = [100 * (loss / base - 1) for loss in row["losses"]]
        sizes = [row["state_bytes"]] * len(excess)
        axes.plot(sizes, excess, linestyle="", markersize=3, alpha=0.6, **_look(index))
        mean = [statistics.fmean(excess)]
        axes.plot(sizes[:1], mean, linestyle="", markersize=8, label=name, **_look(index))
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xlabel("bytes of optimizer state a parameter")
    axes.set_ylabel("validation loss over fp32's mean, %")
    axes.set_title("AdamW, three seeds at the best rate of each", fontsize=9)


def _curves(axes: "Axes", found: dict[str, Any]) -> None:
    """How the first seed's loss fell."""
    for index, (name, row) in enumerate(found["methods"].items()):
        steps, losses = zip(*row["curve"], strict=True)
        axes.plot(steps, losses, markersize=4, label=name, **_look(index))
    axes.set_xlabel("steps")
    axes.set_ylabel("validation loss, nats a byte")
    axes.set_title("all methods, one seed, a sixth of the validation text", fontsize=9)


def _rates(axes: "Axes", found: dict[str, Any]) -> None:
    """What each rate gave."""
    for index, (name, row) in enumerate(found["methods"].items()):
        rates, losses = zip(*row["grid"], strict=True)
        axes.plot(rates, losses, markersize=5, label=name, **_look(index))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss, nats a byte")
    axes.set_title("all methods, one seed, the rates tried", fontsize=9)
