"""Safetensors, written tensor by tensor.

Owns the three forms: one file, several with a Hugging Face index, and each rank's file as it is.
Promises bounded memory whatever the state's size, that each unit is checked before its bytes are
written, and that the output appears whole or not at all: it is made beside its place, flushed, and
renamed. Needs no torch.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.agent.display import Advance, Meter
from everstep.proto.errors import Refused
from everstep.snapshot.consolidating import PieceReader, tensor_bytes
from everstep.snapshot.layout import Layout, LeafSpec, pack
from everstep.snapshot.reading import Shard
from everstep.snapshot.reshard import Tensor
from everstep.storage.directory import storage_error

INDEX = "model.safetensors.index.json"
_OURS = re.compile(
    rf"{re.escape(INDEX)}|model-[0-9]{{5,}}-of-[0-9]{{5,}}\.safetensors|rank-[0-9]{{5}}\.safetensors"
)


@dataclass(frozen=True, slots=True)
class Writing:
    """What all forms have in common.

    Attributes:
        shards: All ranks', located.
        rank: Whose state, where ranks differ.
        output: The file or directory.
        meter: Shows the progress.
        force: Replace a directory of such files.
    """

    shards: Mapping[int, Shard]
    rank: int
    output: Path
    meter: Meter
    force: bool


def write_file(writing: Writing, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """All tensors in one file.

    Raises:
        Refused: If the output is a directory.
        ShardCorrupt: If a unit does not match its digest. Nothing is left behind.
        OutOfSpace: If it does not fit. Likewise.
    """
    output = writing.output
    if output.is_dir():
        raise Refused(f"{output} is a directory; name a file. Nothing was written.")
    packed = _packed(tensors)
    partial = _partial(output)
    try:
        with (
            PieceReader(writing.shards, writing.rank) as reader,
            writing.meter(f"writing {output.name}", packed.image_bytes) as advance,
        ):
            _write(partial, _image(packed, tensors, reader), packed.image_bytes, advance)
        partial.replace(output)
        _sync_directory(output.parent)
    except OSError as error:
        raise storage_error(str(output), packed.image_bytes, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return {"tensors": len(tensors), "bytes": packed.image_bytes, "files": 1}


def write_indexed(
    writing: Writing, tensors: Mapping[str, Tensor], shard_bytes: int
) -> dict[str, Any]:
    """The tensors in order, in files of about so many bytes, and which is where.

    Raises:
        Refused: If the output is there, and is not a directory of such files.
        ShardCorrupt: If a unit does not match its digest. Nothing is left behind.
        OutOfSpace: If it does not fit. Likewise.
    """
    groups = list(_grouped(tensors, shard_bytes))
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    total = sum(map(tensor_bytes, tensors.values()))
    files = [_packed(group) for group in groups]
    with _directory(writing, total) as (partial, advance):
        with PieceReader(writing.shards, writing.rank) as reader:
            for name, group, packed in zip(names, groups, files, strict=True):
                data = _image(packed, group, reader)
                _write(partial / name, data, packed.image_bytes, advance)
        placed = {n: file for file, group in zip(names, groups, strict=True) for n in group}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        text = json.dumps(index, indent=2).encode()
        _write(partial / INDEX, [text], len(text), lambda _: None)
    written = sum(packed.image_bytes for packed in files)
    return {"tensors": len(tensors), "bytes": written, "files": len(groups) + 1}


def write_images(writing: Writing) -> dict[str, Any]:
    """Each rank's image as it was captured.

    Raises:
        Refused: If the output is there, and is not a directory of such files.
        ShardCorrupt: If a unit does not match its digest. Nothing is left behind.
        OutOfSpace: If it does not fit. Likewise.
    """
    shards = writing.shards
    total = sum(shard.record.image_bytes for shard in shards.values())
    with _directory(writing, total) as (partial, advance):
        with PieceReader(shards, writing.rank) as reader:
            for rank, shard in shards.items():
                file = partial / f"rank-{rank:05}.safetensors"
                _write(file, reader.image(rank), shard.record.image_bytes, advance)
    tensors = sum(leaf.held_bytes > 0 for s in shards.values() for leaf in s.layout.leaves)
    return {"tensors": tensors, "bytes": total, "files": len(shards)}


def _grouped(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in order, as many as fit: at least one, and one group even if there are none."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor_bytes(tensor) > limit:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor_bytes(tensor)
    yield group


def _packed(tensors: Mapping[str, Tensor]) -> Layout:
    specs = [
        LeafSpec(name, tensor.dtype, tensor.shape, 0, tensor_bytes(tensor))
        for name, tensor in tensors.items()
    ]
    return pack((), specs, {}, {})


def _image(
    packed: Layout, tensors: Mapping[str, Tensor], reader: PieceReader
) -> Iterator[bytes | memoryview]:
    """The bytes of a file, in order."""
    yield packed.header
    for leaf in sorted(packed.leaves, key=lambda leaf: (leaf.offset, leaf.held_bytes)):
        yield from reader.pieces(tensors[leaf.name])


def _write(path: Path, data: Iterable[bytes | memoryview], size: int, advance: Advance) -> None:
    """A new file, on the disk when this returns."""
    with path.open("xb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
        file.truncate(size)
        for piece in data:
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]
            advance(len(piece))
        os.fsync(file.fileno())


@contextmanager
def _directory(writing: Writing, needed_bytes: int) -> Iterator[tuple[Path, Advance]]:
    """A directory to write to, which takes its place at the end."""
    output, partial = writing.output, _partial(writing.output)
    _check_replaceable(output, force=writing.force)
    try:
        partial.mkdir()
        with writing.meter(f"writing {output.name}", needed_bytes) as advance:
            yield partial, advance
        _sync_directory(partial)
        _check_replaceable(output, force=writing.force)
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
        _sync_directory(output.parent)
    except OSError as error:
        raise storage_error(str(output), needed_bytes, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(output: Path, *, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise Refused(f"{output} exists by now. Say --force to replace it; nothing was written.")
    ours = output.is_dir() and all(_OURS.fullmatch(path.name) for path in output.iterdir())
    if not ours:
        raise Refused(
            f"{output} is there and holds other things than such files, so --force does not "
            "replace it. Nothing was written."
        )


def _partial(output: Path) -> Path:
    return output.parent / f".{output.name}.{os.getpid()}.partial"


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
