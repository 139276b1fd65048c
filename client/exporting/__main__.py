"""The process: arguments and standard input in, one JSON document out."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from everstep.client.exporting.dcp_directory import write_dcp
from everstep.client.exporting.placeholders import Placeholders
from everstep.client.exporting.state import Exported, exported
from everstep.client.exporting.torch_file import write_torch
from everstep.proto.agent_pb2 import RestoreReply
from everstep.proto.errors import EverstepError, Refused
from everstep.snapshot.consolidating import PieceReader
from everstep.snapshot.layout import decode
from everstep.snapshot.reading import Shard
from everstep.snapshot.record import open_record

_WRITERS: dict[str, Callable[..., None]] = {"torch": write_torch, "dcp": write_dcp}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one export; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m everstep.client.exporting")
    parser.add_argument("--to", choices=sorted(_WRITERS), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--part", action="append", default=[])
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--force", action="store_true")
    asked = parser.parse_args(arguments)
    # Libraries may print; the document must stay alone.
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        shards = read_shards(sys.stdin.buffer.read())
        state = exported(shards, asked.rank, asked.part, decode=asked.decode)
        with PieceReader(shards, asked.rank) as reader:
            write(asked.to, state, reader, asked.output, force=asked.force, sharded=asked.sharded)
    except EverstepError as error:
        failure = {"type": type(error).__name__, "message": str(error)}
        stdout.write(json.dumps({"error": failure}) + "\n")
        return 2 if isinstance(error, Refused) else 1
    report = {
        "tensors": len(state.tensors),
        "bytes": state.nbytes,
        "optimizers_by_name": state.by_name,
        "left_out": state.left_out,
    }
    stdout.write(json.dumps(report) + "\n")
    return 0


def read_shards(data: bytes) -> dict[int, Shard]:
    """The located shards of a snapshot, by rank.

    Raises:
        FormatInvalid: If a record or layout is damaged.
    """
    shards = {}
    for found in RestoreReply.FromString(data).shards:
        where = f"{found.path}, rank {found.rank}"
        layout = decode(found.layout, where)
        record = open_record(found.record, where)
        shards[found.rank] = Shard(found.rank, found.path, found.offset, layout, record)
    return shards


def write(
    form: str,
    state: Exported,
    reader: PieceReader,
    output: Path,
    *,
    force: bool,
    sharded: bool = False,
) -> None:
    """Write a state.

    Args:
        form: "torch" or "dcp".
        state: What `exported` returned.
        reader: Has the bytes of its placeholders.
        output: The file or directory; appears whole or not at all.
        force: Replace what is there, if it is of the same kind.
        sharded: Keep apart what ranks had parts of, if the form can.

    Raises:
        Refused: If it is there and not to be replaced. It is untouched.
        OutOfSpace: If it does not fit. Nothing is left behind.
        ShardCorrupt: If a unit is damaged. Nothing is left behind.
        WriteFailed: If the device fails. Nothing is left behind.
    """
    _WRITERS[form](state, reader, output, force=force, sharded=sharded)


def plain(tree: dict[str, object]) -> Exported:
    """A state of ordinary tensors, to be written as one."""
    return Exported(tree, Placeholders(0), [], [])


if __name__ == "__main__":
    sys.exit(main())
