"""What is in a shard, in words and numbers, without loading it.

Owns the description that `everstep inspect` shows, as plain data. Promises to read only the
shard's record and layout, or the header of a safetensors file that has neither beside it, and
that sizes from outside are bounded. Verifies no image: `everstep verify` does.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everstep.agent.bare import Place, place_of
from everstep.agent.choosing import copy_of
from everstep.agent.shards import Copy
from everstep.proto.errors import EverstepError, FormatInvalid, Refused
from everstep.snapshot.digest import DIGEST_BYTES
from everstep.snapshot.layout import MAX_HEADER_BYTES, Layout

_SUMMARY_CHARS = 80
_SHARD = re.compile(r"rank-(\d{5,7})\.(?:safetensors|record)")


def inspected(
    path: Path | None,
    place: Callable[[], Place],
    *,
    step: int | None,
    rank: int | None,
    level: str,
) -> dict[str, Any]:
    """The description of what was named.

    Args:
        path: A file or directory; None for an agent's.
        place: Finds what else is meant.
        step: The step; None for the newest.
        rank: The rank; None for the lowest there is.
        level: At this level; empty for the first that has it.

    Raises:
        NothingRecoverable: If there is no such shard.
        FormatInvalid: If it is a file, and no safetensors.
    """
    if path is not None and path.is_file():
        return _file(path)
    with place() as found:
        there = found.at(level)
        return describe(copy_of(there, there.one_job(), step, rank))


def _file(path: Path) -> dict[str, Any]:
    """A shard file with its record and layout, or any other by its header alone."""
    match = _SHARD.fullmatch(path.name)
    if match is not None:
        try:
            with place_of(path.resolve().parent) as place:
                if place.snapshot is not None:
                    return describe(copy_of(place, place.job, None, int(match[1])))
        except EverstepError:
            pass
    return describe_file(path)


def describe(copy: Copy) -> dict[str, Any]:
    """Layout and record of a shard."""
    record, layout = copy.record, copy.layout
    return {
        "job": copy.job,
        "incarnation": copy.snapshot.incarnation,
        "step": copy.snapshot.step,
        "rank": copy.rank,
        "world": record.world,
        "level": copy.level,
        "path": str(copy.path),
        "offset": copy.offset,
        "image_bytes": record.image_bytes,
        "layout_id": record.layout_id,
        "record": {
            "unit_bytes": record.unit_bytes,
            "digests": len(record.unit_digests) // DIGEST_BYTES,
            "captured_unix_s": record.captured_unix_s,
            "producer": record.producer,
        },
        "parts": _parts(layout, [value.path for value in record.values]),
        "leaves": [
            {
                "name": leaf.name,
                "dtype": leaf.dtype,
                "shape": list(leaf.shape),
                "bytes": leaf.whole_bytes,
                "held_bytes": leaf.held_bytes,
                "start": leaf.start,
                "stop": leaf.stop,
                "offset": leaf.offset,
                "replicated": leaf.replicated,
            }
            for leaf in layout.leaves
        ],
        "aliases": layout.aliases,
        "containers": layout.containers,
        "values": [
            {"path": value.path, "chars": len(value.json), "summary": _summary(value.json)}
            for value in record.values
        ],
    }


def _parts(layout: Layout, values: list[str]) -> list[dict[str, Any]]:
    leaves: defaultdict[str, int] = defaultdict(int)
    sizes: defaultdict[str, int] = defaultdict(int)
    for leaf in layout.leaves:
        part = leaf.name.partition("/")[0]
        leaves[part] += 1
        sizes[part] += leaf.held_bytes
    return [
        {
            "name": part.name,
            "kind": part.kind,
            "class_name": part.class_name,
            "per_rank": part.per_rank,
            "leaves": leaves[part.name],
            "values": sum(path.partition("/")[0] == part.name for path in values),
            "held_bytes": sizes[part.name],
        }
        for part in layout.parts
    ]


def _summary(text: str) -> str:
    return text if len(text) <= _SUMMARY_CHARS else text[: _SUMMARY_CHARS - 3] + "..."


def describe_file(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, ours or not, by its header alone.

    Raises:
        FormatInvalid: If it has none.
        Refused: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise FormatInvalid(str(path), "not a safetensors file: its header has no end")
            header = json.loads(file.read(length))
            image_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatInvalid(str(path), f"not a safetensors file: {error}") from error
    try:
        return {
            "path": str(path),
            "image_bytes": image_bytes,
            "metadata": dict(header.pop("__metadata__", {})),
            "leaves": [_entry(name, entry, 8 + length) for name, entry in header.items()],
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatInvalid(str(path), f"its header is not safetensors' ({error!r})") from error


def _entry(name: str, entry: Any, data_start: int) -> dict[str, Any]:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    return {
        "name": name,
        "dtype": str(entry["dtype"]),
        "shape": [int(length) for length in entry["shape"]],
        "bytes": end - begin,
        "held_bytes": end - begin,
        "offset": data_start + begin,
        "replicated": False,
    }
