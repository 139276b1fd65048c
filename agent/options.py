"""From a value in the configuration file to a field's, or what is wrong with it.

Owns the spelling of amounts, intervals, paths and addresses. Promises that each parser returns a
value of its type within its range or raises ValueError with what is wrong and what to write
instead. Does not know which option it parses, nor where the value came from.
"""

import ipaddress
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
ALIGNMENT_BYTES = 4096
"""What O_DIRECT needs of offsets and lengths, on every device we know of."""
_BYTE_UNITS: dict[str, int] = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_TIME_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class Interval:
    """How often a level takes a snapshot; at most one of the two is set, none means off."""

    every_steps: int = 0
    """Each step that this divides."""
    every_s: float = 0.0
    """The first snapshot after so many seconds."""

    @property
    def off(self) -> bool:
        """Whether the level takes none by itself."""
        return not self.every_steps and not self.every_s

    def __str__(self) -> str:
        if self.every_steps:
            return f"{self.every_steps} steps"
        return f"{self.every_s:g} s" if self.every_s else "off"


def as_text(value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text; put it in quotes")
    return value


def as_choice(*choices: str) -> Callable[[object], str]:
    """One of `choices`."""

    def parse(value: object) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return as_text(value)

    return parse


def as_flag(value: object) -> bool:
    """True or false, and nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _within(value: float, low: float, high: float, unit: str = "") -> None:
    if not low <= value <= high:
        raise ValueError(f"{value:,}{unit} is not between {low:,} and {high:,}")


def as_count(low: int, high: int) -> Callable[[object], int]:
    """A whole number from `low` to `high`."""

    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{value!r} is not a whole number")
        _within(value, low, high)
        return value

    return parse


def as_seconds(low: float, high: float) -> Callable[[object], float]:
    """A number of seconds from `low` to `high`."""

    def parse(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
            raise ValueError(f"{value!r} is not a number of seconds")
        _within(value, low, high, " s")
        return float(value)

    return parse


def as_bytes(low: int, high: int) -> Callable[[object], int]:
    """An amount from `low` to `high`, as a number or as "512 MiB" (1024) or "512 MB" (1000)."""

    def parse(value: object) -> int:
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[2] not in _BYTE_UNITS:
            raise ValueError(f'{value!r} is no amount of bytes; write 4096 or "512 MiB"')
        whole, _, fraction = match[1].partition(".")
        unit = _BYTE_UNITS[match[2]]
        amount = int(whole) * unit + (int(float(f"0.{fraction}") * unit) if fraction else 0)
        _within(amount, low, high, " bytes")
        return amount

    return parse


def as_interval(value: object) -> Interval:
    """Steps, a time, or "off"."""
    if value == "off":
        return Interval()
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is not None and match[2] in {"step", "steps"} and match[1].isdecimal():
        steps = int(match[1])
        _within(steps, 1, 1 << 40, " steps")
        return Interval(every_steps=steps)
    if match is not None and match[2] in _TIME_UNITS_S:
        every_s = float(match[1]) * _TIME_UNITS_S[match[2]]
        _within(every_s, 1, 365 * 86400, " s")
        return Interval(every_s=every_s)
    raise ValueError(f'{value!r} is no interval; write "100 steps", "60 s", "5 min" or "off"')


def as_path(value: object) -> Path:
    """An absolute path, without its dots and doubled slashes."""
    text = str(value) if isinstance(value, Path) else as_text(value)
    if not os.path.isabs(text) or "\0" in text:
        raise ValueError(f"{text!r} is not an absolute path; write it out in full, without ~")
    return Path(os.path.normpath(text))


def as_path_or_none(value: object) -> Path | None:
    """An absolute path, or None for an empty text."""
    return None if value == "" else as_path(value)


def as_uids(value: object) -> frozenset[int]:
    """A list of user ids."""
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError(f"{value!r} is not a list of user ids, such as [1000, 1001]")
    return frozenset(as_count(0, 2**32 - 2)(uid) for uid in value)


def as_endpoint(value: object) -> str:
    """`HOST:PORT` or an empty text."""
    text = as_text(value)
    if text:
        split_endpoint(text)
    return text


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        ValueError: If it is of another form.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+)):([0-9]{1,5})", endpoint)
    if match is None or int(match[3]) > 65535:
        raise ValueError(f'{endpoint!r} is not of the form "HOST:PORT"')
    return match[1] or match[2], int(match[3])


def is_loopback(host: str) -> bool:
    """Whether only this host can reach `host`. Other names than localhost are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
