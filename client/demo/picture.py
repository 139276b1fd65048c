"""The demo's picture: the loss curve of the killed run, drawn over that of the run left alone.

Owns how it looks. Needs matplotlib (the extra ``everstep[demo]``), which nothing else does: without
it there is no picture, and no error.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from everstep.client.demo.scenario import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE_NAME = "everstep-demo.png"
_PALE, _DARK, _RED = "#f2b560", "#1d3f5e", "#c0392b"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(outcome: Outcome, path: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _curves(axes, outcome)
    _kills(axes, outcome)
    equal = "equal, bit for bit" if outcome.equal else "NOT equal"
    axes.set_title(f"Two runs of {outcome.plan.steps} steps: losses and final weights are {equal}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a byte)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def _curves(axes: "Axes", outcome: Outcome) -> None:
    steps, losses = zip(*outcome.reference.losses(), strict=True)
    axes.plot(steps, losses, color=_PALE, linewidth=4.5, label="left alone, without Everstep")
    label = "killed twice, restored"
    for life in _lives(outcome.killed.losses()):
        steps, losses = zip(*life, strict=True)
        axes.plot(steps, losses, color=_DARK, linewidth=1, label=label)
        label = "_nolegend_"


def _lives(losses: list[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    """The run's losses, split where a new process went back to the snapshot."""
    lives: list[list[tuple[int, float]]] = [[losses[0]]]
    for (before, _), (step, loss) in itertools.pairwise(losses):
        if step <= before:
            lives.append([])
        lives[-1].append((step, loss))
    return lives


def _kills(axes: "Axes", outcome: Outcome) -> None:
    for number, recovery in enumerate(outcome.recoveries):
        axes.axvline(recovery.step, color=_RED, linestyle="--", linewidth=1)
        axes.axvspan(recovery.restored_step, recovery.step, color=_RED, alpha=0.15, linewidth=0)
        text = (
            f"kill -9 {recovery.killed} after step {recovery.step}\n"
            f"back from {recovery.level} at step {recovery.restored_step}, "
            f"{recovery.total_s:.1f} s later"
        )
        late = recovery.step > outcome.plan.steps / 2
        axes.annotate(
            text,
            # One below the other, and inwards, so that they meet neither each other nor an edge.
            (recovery.step, 0.97 - 0.12 * number),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-5 if late else 5, 0),
            textcoords="offset points",
            horizontalalignment="right" if late else "left",
            verticalalignment="top",
            color=_RED,
            fontsize=8,
        )
