"""What a trainer of the demo tells the scenario: one JSON object a line, appended to a file.

Owns that file's form. Promises that an entry is in the file when `note` returns, so that a SIGKILL
afterwards does not take it back, and that a reader sees whole entries only. Times are of the
monotonic clock, which all processes of a machine share.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened in a trainer."""

    kind: str
    at_s: float
    facts: dict[str, Any]


class Diary:
    """The writing side."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)

    def note(self, kind: str, **facts: Any) -> None:
        """Append an entry; floats are written so that they read back as the same bits."""
        line = json.dumps({"kind": kind, "at_s": time.monotonic(), **facts}) + "\n"
        os.write(self._descriptor, line.encode())


class Follower:
    """The reading side, which goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0
        self.entries: list[Entry] = []

    def poll(self) -> list[Entry]:
        """The whole entries that have come since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        fresh = [_entry(line) for line in whole.splitlines()]
        self.entries += fresh
        return fresh


def _entry(line: bytes) -> Entry:
    facts = json.loads(line)
    return Entry(facts.pop("kind"), facts.pop("at_s"), facts)
