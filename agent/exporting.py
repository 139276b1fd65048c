"""Taking a snapshot out of Everstep, as files that others read.

Owns `everstep export`: safetensors is written here, in bounded memory; torch's formats by a child
process of the client package, since the agent's side never imports torch. Promises that every
digest was checked before the first byte is written, and each unit again as it is copied; that the
output appears whole or not at all; and that nothing is overwritten unasked.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from everstep.agent.choosing import Chosen, checked_rank
from everstep.agent.display import Meter
from everstep.agent.shards import Copy, UnitReader
from everstep.proto import errors
from everstep.proto.agent_pb2 import RestoreReply, ShardLocation
from everstep.proto.errors import EverstepError, FormatInvalid, Refused
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.layout import Layout, Leaf, LeafSpec, pack
from everstep.snapshot.replicas import gather
from everstep.snapshot.tree import split
from everstep.storage.directory import storage_error

FORMATS = ("safetensors", "torch", "dcp")


def check_output(output: Path, *, force: bool) -> None:
    """See, before long work, that the output can be written.

    Raises:
        Refused: If it exists, or its directory does not.
    """
    if not output.parent.is_dir():
        raise Refused(f"{output.parent} is not a directory. Nothing was written.")
    if output.is_symlink() or (output.exists() and not force):
        raise Refused(f"{output} exists. Say --force to replace it; nothing was written.")


def export_safetensors(
    chosen: Chosen, rank: int, parts: Sequence[str], output: Path, meter: Meter
) -> dict[str, Any]:
    """Write all tensors as one safetensors file, replicated ones put together.

    Args:
        chosen: What to write.
        rank: Whose tensors, where ranks differ.
        parts: Only these; the names of a single one lose its prefix.
        output: The file.
        meter: Shows the progress.

    Returns:
        What was written: "tensors", "bytes" and "omitted_values".

    Raises:
        Refused: If there is no such part, or the output is a directory.
        ShardCorrupt: If a copy has changed since it was checked. Nothing is left behind.
        OutOfSpace: If it does not fit. Nothing is left behind.
    """
    own = chosen.copies[checked_rank(chosen, rank)]
    if output.is_dir():
        raise Refused(f"{output} is a directory; name a file. Nothing was written.")
    wanted = _wanted(own.layout, parts)
    known = {leaf.name: leaf for leaf in own.layout.leaves}
    specs = [
        LeafSpec(name, known[of].dtype, known[of].shape, 0, known[of].whole_bytes)
        for name, of in wanted.items()
    ]
    packed = pack((), specs, {}, {})
    _published(
        output, packed, chosen, {name: known[of] for name, of in wanted.items()}, rank, meter
    )
    chosen_parts = set(parts or (part.name for part in own.layout.parts))
    paths = [value.path.partition("/")[0] for value in own.record.values]
    return {
        "tensors": len(specs),
        "bytes": packed.image_bytes,
        "omitted_values": sum(part in chosen_parts for part in paths),
    }


def _wanted(layout: Layout, parts: Sequence[str]) -> dict[str, str]:
    """For each name in the output, the leaf it stands for. Tied tensors appear under each name:
    whoever loads the file by name finds what a state_dict would have had."""
    check_parts(layout, parts)
    leaves = {leaf.name: leaf.name for leaf in layout.leaves} | layout.aliases
    prefix = f"{parts[0]}/" if len(parts) == 1 else ""
    return {
        _plain(name.removeprefix(prefix)) if prefix else name: of
        for name, of in leaves.items()
        if not parts or name.partition("/")[0] in parts
    }


def _plain(path: str) -> str:
    """A state_dict's key as it was, for a path of one key; any other path unchanged."""
    keys = split(path)
    return keys[0] if len(keys) == 1 and isinstance(keys[0], str) else path


def check_parts(layout: Layout, parts: Sequence[str]) -> None:
    """See that the parts exist.

    Raises:
        Refused: If one does not.
    """
    known = [part.name for part in layout.parts]
    for part in parts:
        if part not in known:
            raise Refused(
                f"the snapshot has no part {part!r}, only {', '.join(known)}. Nothing was written."
            )


def _published(
    output: Path, packed: Layout, chosen: Chosen, sources: dict[str, Leaf], rank: int, meter: Meter
) -> None:
    partial = output.parent / f".{output.name}.{os.getpid()}.partial"
    try:
        with partial.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, packed.image_bytes))
            with meter(f"writing {output.name}", packed.image_bytes) as advance:
                for data in _image(packed, chosen, sources, rank):
                    file.write(data)
                    advance(len(data))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
        _sync_directory(output.parent)
    except OSError as error:
        raise storage_error(str(output), packed.image_bytes, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _image(
    packed: Layout, chosen: Chosen, sources: dict[str, Leaf], rank: int
) -> Iterator[bytes | memoryview]:
    """The bytes of the output, in order."""
    leaves = {
        holder: {leaf.name: leaf for leaf in copy.layout.leaves}
        for holder, copy in chosen.copies.items()
    }
    yield packed.header
    with ExitStack() as stack:
        readers = {
            holder: stack.enter_context(UnitReader(copy)) for holder, copy in chosen.copies.items()
        }
        for target in sorted(packed.leaves, key=lambda leaf: (leaf.offset, leaf.held_bytes)):
            source = sources[target.name]
            for holder, start, stop in _pieces(source, leaves, rank):
                held = leaves[holder][source.name]
                yield from _range(readers[holder], held.offset + start - held.start, stop - start)


def _pieces(
    source: Leaf, leaves: dict[int, dict[str, Leaf]], rank: int
) -> list[tuple[int, int, int]]:
    """From which ranks the bytes of a leaf come. Only equal leaves count as replicas."""
    form = (source.dtype, source.shape, source.replicated)
    holders = {}
    for holder, known in leaves.items():
        held = known.get(source.name)
        if held is None or (held.dtype, held.shape, held.replicated) != form:
            continue
        if holder == rank or source.replicated:
            holders[holder] = [(held.start, held.stop)]
    return gather(source.name, source.whole_bytes, holders, own_rank=rank)


def _range(reader: UnitReader, offset: int, size: int) -> Iterator[memoryview]:
    end = offset + size
    while offset < end:
        index, begin = divmod(offset, UNIT_BYTES)
        piece = memoryview(reader.unit(index))[begin : begin + end - offset]
        yield piece
        offset += len(piece)


def export_by_child(
    chosen: Chosen, rank: int, parts: Sequence[str], output: Path, form: str, *, force: bool
) -> dict[str, Any]:
    """Have the client package write one of torch's formats.

    Args:
        chosen: What to write.
        rank: Whose state, where ranks differ.
        parts: Only these; empty for all.
        output: The file or directory.
        form: "torch" or "dcp".
        force: Replace what is there.

    Returns:
        What the child says it has written.

    Raises:
        Refused: If torch is not installed here, or the child refused.
        EverstepError: Whatever else the child ran into. Nothing is left behind.
    """
    check_parts(chosen.copies[checked_rank(chosen, rank)].layout, parts)
    if importlib.util.find_spec("torch") is None:
        raise Refused(
            f"--to {form} needs torch, which {sys.executable} does not have. Use an environment "
            "that has it, or --to safetensors. Nothing was written."
        )
    command = [
        sys.executable,
        "-P",
        "-m",
        "everstep.client.export",
        "--to",
        form,
        "--rank",
        str(rank),
    ]
    command += ["--output", str(output), *(word for part in parts for word in ("--part", part))]
    if force:
        command.append("--force")
    ended = subprocess.run(
        command, input=_located(chosen).SerializeToString(), stdout=subprocess.PIPE, check=False
    )
    return _reply(ended.stdout, ended.returncode)


def _located(chosen: Chosen) -> RestoreReply:
    """The copies as the agent would tell a trainer."""

    def location(rank: int, copy: Copy) -> ShardLocation:
        return ShardLocation(
            rank=rank,
            level=copy.level,
            path=str(copy.path),
            offset=copy.offset,
            image_bytes=copy.record.image_bytes,
            record=copy.record_envelope,
            layout=copy.layout_envelope,
        )

    return RestoreReply(
        found=True,
        incarnation=chosen.snapshot.incarnation,
        step=chosen.snapshot.step,
        shards=[location(rank, copy) for rank, copy in sorted(chosen.copies.items())],
    )


def _reply(stdout: bytes, status: int) -> dict[str, Any]:
    try:
        reply = json.loads(stdout)
        error = reply.get("error")
    except (ValueError, AttributeError):
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        raise FormatInvalid("the export's child process", f"it ended {how}, see above") from None
    if error is None:
        return dict(reply)
    raise _as_raised(str(error.get("type")), str(error.get("message")))


def _as_raised(name: str, message: str) -> EverstepError:
    """The child's error, of the group that its class belongs to: that decides our exit status."""
    kind = getattr(errors, name, EverstepError)
    for group in (errors.Refused, errors.Retryable):
        if isinstance(kind, type) and issubclass(kind, group):
            return group(message)
    return errors.Damaged(message)
