"""From a value in the configuration file to a field's, or what is wrong with it.

Owns the spelling of amounts, intervals, paths, addresses and lists of nodes. Promises that each
parser returns a value of its type within its range or raises ValueError with what is wrong and what
to write instead. Does not know which option it parses, nor where the value came from.
"""

import ipaddress
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from everstep.proto.errors import InvalidName
from everstep.proto.ids import checked_name

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
MAX_NODES = 65536
"""More than any cluster has: the bound on what a list of nodes may spell."""


def rule(parse: Callable[[object], Any]) -> Mapping[str, Callable[[object], Any]]:
    """The metadata of an option's field: how its value is parsed."""
    return MappingProxyType({"parse": parse})


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


def is_wildcard(host: str) -> bool:
    """Whether `host` means all addresses of this host, so that nobody can reach it by that."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def format_endpoint(host: str, port: int) -> str:
    """The text that `split_endpoint` takes apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def as_parities(value: object) -> int | None:
    """A number of parities, or None for "auto"."""
    return None if value == "auto" else as_count(0, 16)(value)


def as_peers(value: object) -> tuple[tuple[str, str], ...]:
    """A list of ``NODE=HOST:PORT``, as pairs; no node or address twice."""
    peers = [split_peer(text) for text in _texts(value, '["n1=10.0.0.1:7400"]')]
    _unique("node", (node_id for node_id, _ in peers))
    _unique("address", (address for _, address in peers))
    return tuple(peers)


def split_peer(text: str) -> tuple[str, str]:
    """Return node id and address of ``NODE=HOST:PORT``.

    Raises:
        ValueError: If it is of another form, or nobody could be reached there.
    """
    node_id, equals, address = text.partition("=")
    if not equals:
        raise ValueError(f'{text!r} is not of the form "NODE=HOST:PORT"')
    host, port = split_endpoint(address)
    if not port or is_wildcard(host):
        raise ValueError(f"{text!r} names no agent: nobody can be reached at {address}")
    return _name(node_id), address


def as_labels(value: object) -> tuple[tuple[str, str], ...]:
    """A list of ``KEY=VALUE``, as pairs in ascending order; no key twice."""
    pairs = [text.partition("=") for text in _texts(value, '["rack=a", "power=2"]')]
    for key, equals, domain in pairs:
        if not equals or len(pairs) > 16:
            raise ValueError(f'{key!r} is not one of at most 16 of the form "KEY=VALUE"')
        _name(key)
        _name(domain)
    _unique("label", (key for key, _, _ in pairs))
    return tuple(sorted((key, domain) for key, _, domain in pairs))


def as_nodes_with_port(value: object) -> str:
    """``NODELIST:PORT`` as Slurm writes node lists, ``PORT`` alone, or an empty text."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else as_text(value)
    nodes, _, port = text.rpartition(":")
    if text and not (port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise ValueError(f'{text!r} is not of the form "PORT" or "gpu[001-003]:PORT"')
    if nodes:
        expanded_nodes(nodes)
    return text


def expanded_nodes(text: str) -> tuple[str, ...]:
    """The names that a Slurm node list spells, such as ``gpu[001-003,7],n5``, in its order.

    Raises:
        ValueError: If it is no node list, or names no node or too many, or one twice.
    """
    names: list[str] = []
    # Commas separate, but not those within brackets.
    for part in re.split(r",(?![^\[]*\])", text):
        names += (_name(name) for name in _expanded(part, MAX_NODES - len(names)))
    _unique("node", names)
    return tuple(names)


def _expanded(part: str, room: int) -> list[str]:
    """Expand the first bracket and, with each of its values, those behind it."""
    match = re.fullmatch(r"([^\[\]]*)\[([0-9,-]+)\](.*)", part)
    if match is None:
        if "[" in part or "]" in part:
            raise ValueError(f"{part!r} is no list of nodes, such as gpu[001-003,7]")
        return [part]
    tails = _expanded(match[3], room)
    names: list[str] = []
    for span in match[2].split(","):
        bounds = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", span)
        if bounds is None:
            raise ValueError(f"{span!r} in {part!r} is no range of numbers, such as 001-003")
        first, last = int(bounds[1]), int(bounds[2] or bounds[1])
        count = (last - first + 1) * len(tails)
        if not 0 < count <= room - len(names):
            raise ValueError(f"{span!r} in {part!r} is empty, or the list is too long")
        width = len(bounds[1])
        names += (
            f"{match[1]}{number:0{width}d}{tail}"
            for number in range(first, last + 1)
            for tail in tails
        )
    return names


def _texts(value: object, example: str) -> list[str]:
    if not isinstance(value, list | tuple) or len(value) > MAX_NODES:
        raise ValueError(f"{value!r} is not a list of texts, such as {example}")
    return [as_text(text) for text in value]


def _name(name: str) -> str:
    try:
        return checked_name("node or label", name)
    except InvalidName as error:
        raise ValueError(str(error).rstrip(".")) from error


def _unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} is named twice")
        seen.add(name)
