"""What the demo shows: progress while it runs, then a table, or one JSON document.

Owns the words and the layout. Promises that the table and the document say the same. Measures and
judges nothing: that is the scenario's.
"""

import statistics
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from everstep.client.demo.scenario import Outcome


class Silent:
    """A watcher that says nothing."""

    def step(self, run: str, step: int) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


class Shown:
    """A watcher with a bar for each run; a context manager.

    Args:
        console: Where; stderr, so that the table can be piped.
        steps: Of each run.
        runs: Their names.
    """

    def __init__(self, console: Console, steps: int, runs: tuple[str, ...]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks = {run: self._progress.add_task(run, total=steps, start=False) for run in runs}

    def __enter__(self) -> "Shown":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, run: str, step: int) -> None:
        """Move the run's bar, back too."""
        task = self._tasks[run]
        if not self._progress.tasks[task].started:
            self._progress.start_task(task)
        self._progress.update(task, completed=step)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text)


def as_document(outcome: Outcome, image: str | None) -> dict[str, Any]:
    """The outcome as what ``--json`` prints."""
    plan, killed = outcome.plan, outcome.killed
    counts = killed.of_kind("closed")[-1].facts
    return {
        "equal": outcome.equal,
        "losses_equal": outcome.losses_equal,
        "first_different_step": outcome.first_difference,
        "weights_equal": outcome.weights_equal,
        "weights_sha256": killed.digest,
        "final_loss": killed.losses()[-1][1],
        "parameters": outcome.parameters,
        "steps": plan.steps,
        "seed": plan.seed,
        "snapshot_interval_steps": plan.interval,
        "snapshot_interval_s": plan.interval * killed.step_s,
        "snapshots_taken_since_last_kill": counts["taken"],
        "snapshots_skipped_since_last_kill": sum(counts["skipped"].values()),
        "stall_median_s": _median(outcome.stalls_s),
        "stall_max_s": max(outcome.stalls_s, default=None),
        "step_median_s": killed.step_s,
        "step_median_left_alone_s": outcome.reference.step_s,
        "kills": [
            {
                "killed": recovery.killed,
                "step": recovery.step,
                "restored_step": recovery.restored_step,
                "lost_steps": recovery.lost_steps,
                "level": recovery.level,
                "recovery_s": recovery.total_s,
                "start_s": recovery.start_s,
                "connect_s": recovery.connect_s,
                "restore_s": recovery.restore_s,
                "first_step_s": recovery.first_step_s,
            }
            for recovery in outcome.recoveries
        ],
        "duration_s": outcome.duration_s,
        "image": image,
    }


def as_table(outcome: Outcome) -> Table:
    """The outcome for people."""
    table = Table(title="everstep demo", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for row in _rows(outcome):
        table.add_row(*row[:2], end_section=len(row) > 2)
    return table


def _rows(outcome: Outcome) -> list[tuple[str, ...]]:
    plan, killed = outcome.plan, outcome.killed
    rows: list[tuple[str, ...]] = [
        ("model", f"byte-level GPT, {outcome.parameters / 1e6:.2f} M"),
        ("steps", f"{plan.steps} of {duration(killed.step_s)}"),
        (
            "a snapshot every",
            f"{plan.interval} steps ({duration(plan.interval * killed.step_s)})",
        ),
        (
            "stall of a snapshot",
            f"{duration(_median(outcome.stalls_s))} median of {len(outcome.stalls_s)}",
            "",
        ),
    ]
    for recovery in outcome.recoveries:
        rows += [
            ("kill -9", f"[bold]{recovery.killed}[/bold] after step {recovery.step}"),
            (
                "restored",
                f"step {recovery.restored_step} from {recovery.level}; "
                f"steps lost: {recovery.lost_steps}",
            ),
            ("from the kill to the first new step", duration(recovery.total_s)),
            ("    new process, import torch, model", duration(recovery.start_s)),
            ("    find or start the agent", duration(recovery.connect_s)),
            ("    restore, digests verified", duration(recovery.restore_s)),
            ("    first step", duration(recovery.first_step_s), ""),
        ]
    return [
        *rows,
        ("every loss equals the run left alone", verdict(outcome.losses_equal)),
        ("final weights and optimizer state do", verdict(outcome.weights_equal)),
    ]


def verdict(equal: bool) -> str:
    """Whether two things are the same."""
    return "[green]yes, bit for bit[/green]" if equal else "[bold red]NO[/bold red]"


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
