"""What people and scripts see: tables, progress, one JSON document.

Owns all output of the CLI. Promises that with ``--json`` standard output holds exactly one JSON
document, that progress and messages go to standard error, and that nothing read from a file can
send control characters to a terminal. Imports rich only when something is shown with it.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int], None]
"""Told how many more bytes are done."""
Meter = Callable[[str, int], AbstractContextManager[Advance]]
"""Shows the progress of something with a title and so many bytes to do."""

_WIDTH_WITHOUT_TERMINAL = 160
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "damaged": "bold red"}


def document(content: object) -> None:
    """Write the one JSON document."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=True) + "\n")
    sys.stdout.flush()


def line(text: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(clean(text) + "\n")


def note(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(clean(text) + "\n")


def failure(kind: str, message: str, *, as_json: bool) -> None:
    """Say that a verb failed: to people on standard error, to scripts as the document."""
    if as_json:
        document({"error": {"type": kind, "message": message}})
    else:
        note(f"error: {message}")


def clean(text: str) -> str:
    """The text without anything a terminal would act on; line breaks stay."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Show a table. Headings that end in ">" are of columns of numbers."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=clean(title), title_justify="left", box=SIMPLE, title_style="bold")
    for heading in headings:
        numbers = heading.endswith(">")
        shown.add_column(
            heading.removesuffix(">"), justify="right" if numbers else "left", overflow="fold"
        )
    for row in rows:
        # Text, not str: rich would read "[...]" in a str as markup.
        texts = [clean("-" if cell is None else str(cell)) for cell in row]
        shown.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in texts))
    _console().print(shown)


def _console(*, to_stderr: bool = False) -> "Console":
    from rich.console import Console

    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH_WITHOUT_TERMINAL
    return console


def meter() -> Meter:
    """A `Meter` on standard error; a silent one where that is no terminal."""
    return _shown if sys.stderr.isatty() else silent


def silent(title: str, total_bytes: int) -> AbstractContextManager[Advance]:
    """A `Meter` that shows nothing."""
    return nullcontext(lambda _: None)


@contextmanager
def _shown(title: str, total_bytes: int) -> Iterator[Advance]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=_console(to_stderr=True), transient=True) as progress:
        task = progress.add_task(clean(title), total=total_bytes or None)
        yield lambda more_bytes: progress.advance(task, more_bytes)


def size(amount_bytes: int | None) -> str | None:
    """An amount of bytes for people."""
    if amount_bytes is None:
        return None
    amount = float(amount_bytes)
    for unit in _SIZES:
        if amount < 1024 or unit == _SIZES[-1]:
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def span(seconds: float | None) -> str | None:
    """A length of time for people."""
    if seconds is None:
        return None
    seconds = max(0.0, seconds)
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def ranks(numbers: Iterable[int]) -> str:
    """Ranks for people: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)


def age(unix_s: float | None) -> float | None:
    """How many seconds ago that was; None if unknown."""
    return max(0.0, time.time() - unix_s) if unix_s else None
