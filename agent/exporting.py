"""Taking a snapshot out of Everstep, as files that others read.

Owns `everstep export`: safetensors is written by `agent/exporting_safetensors.py`, in bounded
memory; torch's formats by a child process of the client package, since the agent's side never
imports torch. Promises that every digest was checked before the first byte is written, and each
unit again as it is copied; that the output appears whole or not at all; and that nothing is
overwritten unasked.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everstep.agent.children import report_of
from everstep.agent.choosing import Chosen, checked_rank
from everstep.agent.display import Meter
from everstep.agent.exporting_safetensors import Writing, write_file, write_images, write_indexed
from everstep.agent.shards import Copy
from everstep.proto.agent_pb2 import RestoreReply, ShardLocation
from everstep.proto.errors import Refused
from everstep.snapshot.consolidating import Whole, part_names
from everstep.snapshot.reading import Shard
from everstep.snapshot.tree import split

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


def check_options(
    form: str,
    parts: Sequence[str],
    shard_bytes: int | None,
    *,
    sharded: bool,
    decode: bool = False,
) -> None:
    """See that the options go together.

    Raises:
        Refused: If they do not; says what does.
    """
    if shard_bytes is not None and (form != "safetensors" or sharded):
        raise Refused(
            "--shard-bytes is for --to safetensors alone: several files and their index. dcp is "
            "written in pieces anyway. Nothing was written."
        )
    if decode and form != "torch":
        raise Refused(
            "--decode is for --to torch alone, whose files optimizers load. Nothing was written."
        )
    if sharded and form == "torch":
        raise Refused(
            "torch.save has no form for a rank's part of a tensor: say --sharded with --to dcp or "
            "--to safetensors, or leave it out. Nothing was written."
        )
    if sharded and form == "safetensors" and parts:
        raise Refused(
            "--sharded copies each rank's file as it is: leave --part out, or --sharded. Nothing "
            "was written."
        )


def export_safetensors(
    chosen: Chosen,
    rank: int,
    parts: Sequence[str],
    output: Path,
    meter: Meter,
    *,
    shard_bytes: int | None = None,
    sharded: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write all tensors as safetensors, what ranks share or have parts of put together.

    Args:
        chosen: What to write.
        rank: Whose tensors, where ranks differ.
        parts: Only these; the names of a single one lose its prefix.
        output: The file; or the directory, if there are several.
        meter: Shows the progress.
        shard_bytes: Several files, each with tensors of about so many bytes, and an index.
        sharded: Each rank's file as it is.
        force: Replace a directory that holds such files.

    Returns:
        What was written: "tensors", "bytes", "files", "omitted_values" and "left_out".

    Raises:
        Refused: If there is no such part, or the output is of another kind.
        ShardCorrupt: If a copy has changed since it was checked. Nothing is left behind.
        OutOfSpace: If it does not fit. Nothing is left behind.
    """
    own = chosen.copies[checked_rank(chosen, rank)]
    check_parts(chosen, rank, parts)
    shards = {holder: _shard(copy) for holder, copy in chosen.copies.items()}
    writing = Writing(shards, rank, output, meter, force=force)
    if sharded:
        return write_images(writing)
    whole = Whole.of({holder: shard.layout for holder, shard in shards.items()}, rank, parts)
    prefix = f"{parts[0]}/" if len(parts) == 1 else ""
    tensors = {
        _plain(name.removeprefix(prefix)) if prefix else name: tensor
        for name, tensor in whole.tensors.items()
    }
    if shard_bytes is None:
        written = write_file(writing, tensors)
    else:
        written = write_indexed(writing, tensors, shard_bytes)
    chosen_parts = set(parts or part_names({r: s.layout for r, s in shards.items()}, rank))
    paths = [value.path.partition("/")[0] for value in own.record.values]
    return {
        **written,
        "omitted_values": sum(part in chosen_parts for part in paths),
        "left_out": list(whole.left_out),
    }


def _shard(copy: Copy) -> Shard:
    return Shard(copy.rank, str(copy.path), copy.offset, copy.layout, copy.record, copy.level)


def _plain(path: str) -> str:
    """A state_dict's key as it was, for a path of one key; any other path unchanged."""
    keys = split(path)
    return keys[0] if len(keys) == 1 and isinstance(keys[0], str) else path


def check_parts(chosen: Chosen, rank: int, parts: Sequence[str]) -> None:
    """See that the parts exist.

    Raises:
        Refused: If one does not.
    """
    known = part_names({holder: copy.layout for holder, copy in chosen.copies.items()}, rank)
    for part in parts:
        if part not in known:
            raise Refused(
                f"the snapshot has no part {part!r}, only {', '.join(known)}. Nothing was written."
            )


def export_by_child(
    chosen: Chosen,
    rank: int,
    parts: Sequence[str],
    output: Path,
    form: str,
    *,
    force: bool,
    sharded: bool = False,
    decode: bool = False,
) -> dict[str, Any]:
    """Have the client package write one of torch's formats.

    Args:
        chosen: What to write.
        rank: Whose state, where ranks differ.
        parts: Only these; empty for all.
        output: The file or directory.
        form: "torch" or "dcp".
        force: Replace what is there.
        sharded: Each rank's part of a tensor by itself.
        decode: Optimizer state that is held in codes becomes fp32.

    Returns:
        What the child says it has written.

    Raises:
        Refused: If torch is not installed here, or the child refused.
        EverstepError: Whatever else the child ran into. Nothing is left behind.
    """
    check_parts(chosen, checked_rank(chosen, rank), parts)
    arguments = ["--to", form, "--rank", str(rank), "--output", str(output)]
    arguments += [word for part in parts for word in ("--part", part)]
    arguments += ["--force"] if force else []
    arguments += ["--sharded"] if sharded else []
    arguments += ["--decode"] if decode else []
    return report_of(
        "everstep.client.exporting",
        arguments,
        f"--to {form}",
        ", or --to safetensors",
        _located(chosen).SerializeToString(),
    )


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
