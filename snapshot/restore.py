"""Filling live tensors from the shards of one snapshot.

Owns the way from located copies to the tensors that want their bytes: which rank's shard gives
which range, and the tensors that no flat copy can fill. Promises that `verify` has seen every
byte that `run` will use, that a byte reaches a tensor only after the digest of its unit matched,
and that every wanted byte is written or an error is raised. Does not choose the copy (the agent
does), and does not know modules or optimizers (the client does).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch

from everstep.proto.errors import StateMismatch
from everstep.proto.failpoint import failpoint
from everstep.snapshot.capture import dtype_name, is_plain
from everstep.snapshot.layout import Leaf
from everstep.snapshot.reading import Range, Shard, ShardReader
from everstep.snapshot.replicas import gather

__all__ = ["Restoration", "Shard", "Wanted"]


@dataclass(slots=True)
class Wanted:
    """A leaf that somebody wants, and the tensor that takes it."""

    name: str
    tensor: torch.Tensor


class Restoration:
    """Copies wanted leaves out of the shards of one snapshot. Use as a context manager.

    Args:
        shards: All ranks' shards of the snapshot, by rank.
        rank: Whose private leaves are wanted.
        executor: Spreads the work, which runs without the GIL, over its threads.
    """

    def __init__(
        self, shards: Mapping[int, Shard], rank: int, executor: Executor | None = None
    ) -> None:
        self._shards = shards
        self._rank = rank
        self._executor = executor
        self._leaves = {
            holder: {leaf.name: leaf for leaf in shard.layout.leaves}
            for holder, shard in shards.items()
        }
        self._pieces: dict[int, list[tuple[int, int, int]]] = {holder: [] for holder in shards}
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._planned: dict[str, torch.Tensor] = {}
        self._readers: dict[int, ShardReader] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Restoration":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def verify(self, names: Iterable[str]) -> None:
        """Check every unit that holds a byte of these leaves; touch no tensor.

        Raises:
            ShardCorrupt: If a unit does not match its digest.
            FormatInvalid: If a file is too short, or the shards do not hold every byte.
        """
        ranges: dict[int, list[Range]] = {}
        for leaf in filter(None, map(self._leaf, dict.fromkeys(names))):
            for holder, offset, _, size in self._sources(leaf):
                ranges.setdefault(holder, []).append((offset, offset + size))
        for holder, wanted in ranges.items():
            self._reader(holder).verify(wanted)

    def plan(self, wanted: Sequence[Wanted]) -> None:
        """Say which tensor takes which leaf.

        Raises:
            StateMismatch: If dtype or shape of a tensor are not those of its leaf.
            FormatInvalid: If the shards do not hold every byte.
        """
        for item in wanted:
            self._plan_one(item)

    def run(self) -> None:
        """Fill the tensors.

        Raises:
            ShardCorrupt: If a unit does not match its digest (any more, after `verify`). Tensors
                may be partly filled then: the caller must not go on with them.
        """
        for holder, pieces in self._pieces.items():
            if pieces:
                self._reader(holder).copy(pieces)
        failpoint("client.restore.copied")
        with torch.no_grad():
            for tensor, staged in [*self._staged, *self._copies]:
                _fill(tensor, staged)

    def _reader(self, holder: int) -> ShardReader:
        if holder not in self._readers:
            reader = ShardReader(self._shards[holder], self._executor)
            self._readers[holder] = self._stack.enter_context(reader)
        return self._readers[holder]

    def _leaf(self, name: str) -> Leaf | None:
        aliases = self._shards[self._rank].layout.aliases
        return self._leaves[self._rank].get(aliases.get(name, name))

    def _plan_one(self, item: Wanted) -> None:
        leaf = self._leaf(item.name)
        if leaf is None:
            raise StateMismatch("a leaf is not in the snapshot.", missing=(item.name,))
        tensor = item.tensor
        if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (leaf.dtype, leaf.shape):
            saved = f"{leaf.dtype}{list(leaf.shape)}"
            attached = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
            change = f"{item.name}: {saved} -> {attached}"
            raise StateMismatch("a leaf has another form.", reshaped=(change,))
        first = self._planned.get(leaf.name)
        if first is not None:
            if first.data_ptr() != tensor.data_ptr() or first.stride() != tensor.stride():
                self._copies.append((tensor, first))
            return
        self._planned[leaf.name] = target = tensor
        if not is_plain(tensor):
            target = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._staged.append((tensor, target))
        for holder, offset, start, size in self._sources(leaf):
            self._pieces[holder].append((target.data_ptr() + start, offset, size))

    def _sources(self, leaf: Leaf) -> Iterator[tuple[int, int, int, int]]:
        """(rank, offset in its image, offset in the leaf, bytes) of what makes up a leaf."""
        if not leaf.whole_bytes:
            return
        holders = {
            holder: [(leaves[leaf.name].start, leaves[leaf.name].stop)]
            for holder, leaves in self._leaves.items()
            if leaf.name in leaves
            and leaves[leaf.name].held_bytes
            and (holder == self._rank or (leaf.replicated and leaves[leaf.name].replicated))
        }
        for holder, start, stop in gather(
            leaf.name, leaf.whole_bytes, holders, own_rank=self._rank
        ):
            held = self._leaves[holder][leaf.name]
            yield holder, held.offset + start - held.start, start, stop - start


def _fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension] > 1:
            # An expanded tensor repeats itself there, and torch refuses to write to it.
            tensor, value = tensor.narrow(dimension, 0, 1), value.narrow(dimension, 0, 1)
    tensor.copy_(value)
