"""The picture of the optimizers' quality: validation loss against bytes of state a parameter.

Owns how it looks; draws from the JSON that `benchmarks.optim_quality --out` wrote, and only what is
in it. Needs matplotlib.
"""

import json
from pathlib import Path

_COLORS = ("#1d3f5e", "#2e8b57", "#c0392b", "#f2b560", "#7d5ba6", "#6b8fb3", "#d98cb3", "#777777")
_MARKS = "osv^DPX*"


def draw(source: Path, target: Path) -> None:
    """Write the picture as SVG.

    Args:
        source: As written by ``--out``.
        target: The picture.
    """
    import matplotlib
    from matplotlib.figure import Figure

    found = json.loads(source.read_text())
    methods: dict[str, dict[str, object]] = found["methods"]
    matplotlib.rcParams["svg.hashsalt"] = "everstep"
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, row) in enumerate(methods.items()):
        look = {"color": _COLORS[index % 8], "marker": _MARKS[index % 8]}
        losses: list[float] = row["losses"]  # type: ignore[assignment]
        size: float = row["state_bytes"]  # type: ignore[assignment]
        mean = sum(losses) / len(losses)
        left.plot([size] * len(losses), losses, linestyle="", markersize=3, alpha=0.5, **look)
        left.plot([size], [mean], linestyle="", markersize=8, label=name, **look)
        grid: list[tuple[float, float]] = row["grid"]  # type: ignore[assignment]
        base = float(row["rate"])  # type: ignore[arg-type]
        right.plot([r / base for r, _ in grid], [loss for _, loss in grid], markersize=4, **look)
    low, high = found["noise_band"]
    left.axhspan(low, high, color=_COLORS[0], alpha=0.08, linewidth=0)
    left.set_xlabel("bytes of optimizer state a parameter")
    left.set_ylabel("validation loss, nats a byte")
    left.set_title("three seeds at the best rate; band: fp32 and its noise", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    right.set_xscale("log", base=2)
    right.set_xlabel("learning rate over the method's best")
    right.set_title("rates tried, one seed", fontsize=9)
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Byte-level GPT of {found['parameters'] / 1e6:.1f} M parameters, {found['steps']} steps, "
        f"{found['device']}",
        fontsize=10,
    )
    figure.savefig(target, format="svg", metadata={"Date": None})
