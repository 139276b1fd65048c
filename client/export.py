"""Writing a snapshot in torch's own formats: the child process of `everstep export`.

Owns ``python -m everstep.client.export``: a located snapshot on standard input (a
`RestoreReply`, as a trainer would get it), one JSON document on standard output. Promises that
every unit is checked before its bytes are used, that the output appears whole or not at all, and
that a file for torch loads with ``weights_only=True``. Holds one rank's whole state in memory.

The state is ``{part: state}``, what each part's ``state_dict()`` returned, tied tensors tied, plus
"rng" (the generators' states) and "everstep" (job, step, rank). An optimizer's state has torch's
own indices again where the order of its parameters can be proven by the digest of their names
that was saved with them; else it stays under the parameters' names, and the report says so.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everstep.client.attachment import decode_torch_value
from everstep.client.saved import Saved
from everstep.proto.agent_pb2 import RestoreReply
from everstep.proto.errors import EverstepError, OutOfSpace, Refused, WriteFailed
from everstep.snapshot import values
from everstep.snapshot.layout import decode
from everstep.snapshot.record import open_record
from everstep.snapshot.restore import Restoration, Shard, Wanted

_RNG = "rng"
_ABOUT = "everstep"
_DCP_MARK = ".metadata"
_THREADS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one export; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m everstep.client.export")
    parser.add_argument("--to", choices=sorted(_WRITERS), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--part", action="append", default=[])
    parser.add_argument("--force", action="store_true")
    asked = parser.parse_args(arguments)
    # Libraries may print; the document must stay alone.
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        shards = read_shards(sys.stdin.buffer.read())
        state, by_name = rebuilt(shards, asked.rank, asked.part)
        write(asked.to, state, asked.output, force=asked.force)
    except EverstepError as error:
        failure = {"type": type(error).__name__, "message": str(error)}
        stdout.write(json.dumps({"error": failure}) + "\n")
        return 2 if isinstance(error, Refused) else 1
    tensors = {id(leaf): leaf for leaf in _leaves(state) if isinstance(leaf, torch.Tensor)}
    report = {
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "optimizers_by_name": by_name,
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


def rebuilt(
    shards: dict[int, Shard], rank: int, parts: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The state of one rank, and the optimizers whose state is still under names.

    Args:
        shards: Of all ranks.
        rank: Whose state, where ranks differ.
        parts: Only these; all, and the generators, if empty.

    Raises:
        Damaged: If a shard's bytes are not what was captured.
    """
    own = shards[rank]
    layouts = {holder: shard.layout for holder, shard in shards.items()}
    records = {holder: shard.record for holder, shard in shards.items()}
    saved = Saved.of(layouts, records, rank)
    chosen = [part for part in own.layout.parts if not parts or part.name in parts]
    names = {part.name for part in chosen}
    tensors = _tensors(shards, rank, saved, names)
    modules = [part.name for part in own.layout.parts if part.kind == "module"]
    state: dict[str, Any] = {}
    by_name = []
    for part in chosen:
        inside = {name: tensors[name] for name in saved.forms_of(part.name)}
        tree = saved.tree(part.name, inside)
        if part.kind == "optimizer":
            order = [name for module in modules for name in _parameters(saved, module)]
            tree, indexed = _indexed(tree, order)
            if not indexed:
                by_name.append(part.name)
        state[part.name] = tree
    if not parts and _RNG in saved.values:
        state[_RNG] = values.decode(saved.values[_RNG], hook=decode_torch_value, where=_RNG)
    if _ABOUT not in state:
        record = own.record
        about = {"job": record.job, "step": record.step, "rank": rank, "world": record.world}
        state[_ABOUT] = {**about, "incarnation": record.incarnation, "producer": record.producer}
    return _loadable(state), by_name


def _tensors(
    shards: dict[int, Shard], rank: int, saved: Saved, parts: set[str]
) -> dict[str, torch.Tensor]:
    """Every tensor of the parts, read and checked; a tied one is one tensor with several names."""
    layout = shards[rank].layout
    aliases = {n: of for n, of in layout.aliases.items() if n.partition("/")[0] in parts}
    wanted = [leaf.name for leaf in layout.leaves if leaf.name.partition("/")[0] in parts]
    wanted += sorted(set(aliases.values()) - set(wanted))
    tensors = {name: saved.forms[name].empty() for name in wanted}
    with (
        ThreadPoolExecutor(_THREADS, "everstep-export") as executor,
        Restoration(shards, rank, executor) as restoration,
    ):
        restoration.plan([Wanted(name, tensor) for name, tensor in tensors.items()])
        restoration.run()
    return tensors | {name: tensors[of] for name, of in aliases.items()}


def _parameters(saved: Saved, module: str) -> list[str]:
    """Names of a module's tensors as an optimizer's state spells them, in the module's order."""
    return [name.replace("/", ".", 1) for name in saved.forms_of(module)]


def _indexed(tree: dict[str, Any], order: list[str]) -> tuple[dict[str, Any], bool]:
    """An optimizer's tree with torch's indices, if the order of its parameters can be proven.

    A group says how many parameters it has, and a digest of their names in order (see
    `attachment.grouping`). Two orders are tried: that of the state, which is the order of the
    groups unless some parameter has never had a gradient, and that of the modules' tensors.
    """
    groups, state = tree["param_groups"], tree["state"]
    counts = [int(str(group["params"]).partition(":")[0]) for group in groups]
    known = set(state)
    candidates = ([*state], [name for name in order if name in known], order)
    for names in candidates:
        if len(names) != sum(counts) or not known <= set(names):
            continue
        begins = [sum(counts[:index]) for index in range(len(counts))]
        slices = [names[at : at + n] for at, n in zip(begins, counts, strict=True)]
        if all(_digest(s) == group["params"] for s, group in zip(slices, groups, strict=True)):
            index_of = {name: index for index, name in enumerate(names)}
            return {
                **tree,
                "state": {index_of[name]: entry for name, entry in state.items()},
                "param_groups": [
                    {**group, "params": [index_of[name] for name in members]}
                    for group, members in zip(groups, slices, strict=True)
                ],
            }, True
    return tree, False


def _digest(names: Sequence[str]) -> str:
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
    return f"{len(names)}:{digest}"


def _loadable(thing: Any) -> Any:
    """The state without what ``weights_only=True`` refuses: arrays become tensors, and so on."""
    if isinstance(thing, dict):
        mapping: type[dict[Any, Any]] = OrderedDict if isinstance(thing, OrderedDict) else dict
        return mapping((key, _loadable(value)) for key, value in thing.items())
    if type(thing) in (list, tuple, set, frozenset):
        kind = set if isinstance(thing, frozenset) else type(thing)
        return kind(_loadable(item) for item in thing)
    if isinstance(thing, range):
        return list(thing)
    if isinstance(thing, slice):
        return (thing.start, thing.stop, thing.step)
    if isinstance(thing, np.generic):
        return _loadable(np.asarray(thing)).item()
    return _from_numpy(thing) if isinstance(thing, np.ndarray) else thing


def _from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array as a tensor: times as their counts, and long floats, which torch lacks, rounded."""
    if array.dtype.kind in "mM":
        array = array.astype(np.int64)
    elif array.dtype.kind in "fc":
        longest = np.float64 if array.dtype.kind == "f" else np.complex128
        array = array.astype(min(array.dtype.newbyteorder("="), np.dtype(longest)))
    native = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))


def _leaves(thing: Any) -> Iterator[Any]:
    if isinstance(thing, dict):
        for value in thing.values():
            yield from _leaves(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _leaves(value)
    else:
        yield thing


def write(form: str, state: dict[str, Any], output: Path, *, force: bool) -> None:
    """Write a state.

    Args:
        form: "torch" or "dcp".
        state: What `rebuilt` returned.
        output: The file or directory; appears whole or not at all.
        force: Replace what is there, if it is of the same kind.

    Raises:
        Refused: If it is there and not to be replaced. It is untouched.
        OutOfSpace: If it does not fit. Nothing is left behind.
        WriteFailed: If the device fails. Nothing is left behind.
    """
    _WRITERS[form](state, output, force)


def _write_torch(state: dict[str, Any], output: Path, force: bool) -> None:
    if output.is_dir():
        raise Refused(f"{output} is a directory; name a file. Nothing was written.")
    partial = _partial(output)
    try:
        with partial.open("xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _check_loadable(partial)
        _check_absent(output, force)
        partial.replace(output)
    except (OSError, RuntimeError) as error:
        raise _write_error(output, state, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_loadable(path: Path) -> None:
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # Whatever it is that torch's reader raises: the file must not be handed out.
        raise Refused(
            f"torch.load(weights_only=True) would refuse this state: {error} Nothing was written; "
            "--part leaves out the part it is in."
        ) from error


def _write_dcp(state: dict[str, Any], output: Path, force: bool) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    partial = _partial(output)
    try:
        with warnings.catch_warnings():
            # It says that it saves in a single process, which is what no_dist asks for.
            warnings.simplefilter("ignore", UserWarning)
            save(state, checkpoint_id=partial, no_dist=True)
        _check_absent(output, force)
        if output.exists():
            _remove_dcp(output)
        partial.rename(output)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise _write_error(output, state, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(output: Path) -> Path:
    return output.parent / f".{output.name}.{os.getpid()}.partial"


def _check_absent(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise Refused(f"{output} exists by now. Say --force to replace it; nothing was written.")


def _remove_dcp(output: Path) -> None:
    """Make room where an older checkpoint is; anything else is not ours to delete."""
    if not (output / _DCP_MARK).is_file():
        raise Refused(
            f"{output} is there and is no distributed checkpoint, so --force does not replace it. "
            "Nothing was written."
        )
    shutil.rmtree(output)


def _write_error(output: Path, state: dict[str, Any], error: BaseException) -> EverstepError:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    needed = sum(leaf.nbytes for leaf in _leaves(state) if isinstance(leaf, torch.Tensor))
    free = shutil.disk_usage(output.parent).free
    # torch's writer reports a full disk as a RuntimeError without a cause.
    if free < needed:
        return OutOfSpace(str(output), needed, free)
    return WriteFailed(str(output), cause if isinstance(cause, OSError) else OSError(str(error)))


_WRITERS: dict[str, Callable[[dict[str, Any], Path, bool], None]] = {
    "torch": _write_torch,
    "dcp": _write_dcp,
}

if __name__ == "__main__":
    sys.exit(main())
