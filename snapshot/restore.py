"""Filling live tensors from shard images, unit by unit, each checked before it is used.

Owns the way from a located copy of a shard to the tensors that want its bytes. Promises that a
byte reaches a tensor only after the digest of its unit matched, and that every wanted byte was
written or an error is raised. Does not choose the copy (the agent does), and does not know
modules or optimizers (the client does).
"""

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from everstep.kernels.capture import Pieces, restore_units
from everstep.proto.errors import FormatInvalid, ShardCorrupt, StateMismatch
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record
from everstep.snapshot.capture import dtype_name, is_plain
from everstep.snapshot.digest import DIGEST_BYTES, unit_count
from everstep.snapshot.layout import Layout, Leaf
from everstep.snapshot.replicas import gather

_BLOCK_UNITS = 16


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's shard, located: a file, where the image lies in it, and what it should be."""

    rank: int
    path: str
    offset: int
    layout: Layout
    record: Record


@dataclass(slots=True)
class Wanted:
    """A leaf that somebody wants, and the tensor that takes it."""

    name: str
    tensor: torch.Tensor


def find_leaf(layout: Layout, name: str) -> Leaf | None:
    """The leaf of this name, or of the name it is an alias of."""
    wanted = layout.aliases.get(name, name)
    return next((leaf for leaf in layout.leaves if leaf.name == wanted), None)


class Restoration:
    """Copies wanted leaves out of the shards of one snapshot.

    Args:
        shards: All ranks' shards of the snapshot, by rank.
        rank: Whose private leaves are wanted.
    """

    def __init__(self, shards: Mapping[int, Shard], rank: int) -> None:
        self._shards = shards
        self._rank = rank
        self._leaves = {
            holder: {leaf.name: leaf for leaf in shard.layout.leaves}
            for holder, shard in shards.items()
        }
        self._pieces: dict[int, list[tuple[int, int, int]]] = {holder: [] for holder in shards}
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._planned: dict[tuple[str, int], torch.Tensor] = {}

    def plan(self, wanted: Sequence[Wanted]) -> None:
        """Say where each wanted leaf's bytes come from.

        Raises:
            StateMismatch: If dtype or shape of a tensor are not those of its leaf.
            FormatInvalid: If the shards do not hold every byte.
        """
        for item in wanted:
            self._plan_one(item)

    def _plan_one(self, item: Wanted) -> None:
        own = self._shards[self._rank].layout
        name = own.aliases.get(item.name, item.name)
        leaf = self._leaves[self._rank].get(name)
        if leaf is None:
            raise StateMismatch("a leaf is not in the snapshot.", missing=(item.name,))
        tensor = item.tensor
        if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (leaf.dtype, leaf.shape):
            saved = f"{leaf.dtype}{list(leaf.shape)}"
            attached = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
            change = f"{item.name}: {saved} -> {attached}"
            raise StateMismatch("a leaf has another form.", reshaped=(change,))
        first = self._planned.setdefault((name, 0), tensor)
        if first is not tensor:
            if first.data_ptr() != tensor.data_ptr() or first.stride() != tensor.stride():
                self._copies.append((tensor, first))
            return
        target = tensor
        if not is_plain(tensor):
            target = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._staged.append((tensor, target))
        self._add_pieces(leaf, target)

    def _add_pieces(self, leaf: Leaf, target: torch.Tensor) -> None:
        whole_bytes = target.numel() * target.element_size()
        if not whole_bytes:
            return
        holders = {
            holder: [(leaves[leaf.name].start, leaves[leaf.name].stop)]
            for holder, leaves in self._leaves.items()
            if leaf.name in leaves
            and leaves[leaf.name].held_bytes
            and (holder == self._rank or (leaf.replicated and leaves[leaf.name].replicated))
        }
        for holder, start, stop in gather(leaf.name, whole_bytes, holders, own_rank=self._rank):
            held = self._leaves[holder][leaf.name]
            offset = held.offset + start - held.start
            self._pieces[holder].append((target.data_ptr() + start, offset, stop - start))

    def run(self, executor: Executor | None = None) -> int:
        """Copy; return how many bytes were checked.

        Args:
            executor: Spreads the work, which runs without the GIL, over its threads.

        Raises:
            ShardCorrupt: If a unit does not match its digest. Tensors may be partly filled then:
                the caller must not go on with them.
            FormatInvalid: If a file is too short.
        """
        checked = 0
        for rank, shard in self._shards.items():
            pieces = sorted(self._pieces[rank], key=lambda piece: piece[1])
            if pieces:
                checked += _run_shard(shard, Pieces(pieces), pieces, executor)
        failpoint("client.restore.copied")
        with torch.no_grad():
            for tensor, staged in [*self._staged, *self._copies]:
                _fill(tensor, staged)
        return checked


def _fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension] > 1:
            # An expanded tensor repeats itself there, and torch refuses to write to it.
            tensor, value = tensor.narrow(dimension, 0, 1), value.narrow(dimension, 0, 1)
    tensor.copy_(value)


def _run_shard(
    shard: Shard,
    pieces: Pieces,
    table: Sequence[tuple[int, int, int]],
    executor: Executor | None,
) -> int:
    record = shard.record
    units = unit_count(record.image_bytes)
    if record.unit_bytes != UNIT_BYTES or len(record.unit_digests) != units * DIGEST_BYTES:
        raise FormatInvalid(shard.path, "its record does not have one digest a unit")
    blocks = sorted(
        {
            block
            for _, offset, size in table
            for block in range(
                offset // UNIT_BYTES // _BLOCK_UNITS,
                (offset + size - 1) // UNIT_BYTES // _BLOCK_UNITS + 1,
            )
        }
    )
    with _mapped(shard) as memory:
        image = torch.frombuffer(memory, dtype=torch.uint8)
        address = image.data_ptr() + shard.offset % mmap.ALLOCATIONGRANULARITY

        def copy(block: int) -> list[int]:
            first = block * _BLOCK_UNITS
            count = min(_BLOCK_UNITS, units - first)
            return restore_units(
                pieces,
                address,
                record.image_bytes,
                UNIT_BYTES,
                first,
                count,
                record.unit_digests,
            )

        results = executor.map(copy, blocks) if executor is not None else map(copy, blocks)
        bad = [unit for part in results for unit in part]
        del image
    if bad:
        raise ShardCorrupt(f"{shard.path}, rank {shard.rank}", tuple(bad))
    return len(blocks) * _BLOCK_UNITS * UNIT_BYTES


@contextmanager
def _mapped(shard: Shard) -> Iterator[mmap.mmap]:
    """The part of a shard's file that holds its image."""
    begin = shard.offset - shard.offset % mmap.ALLOCATIONGRANULARITY
    descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size < shard.offset + shard.record.image_bytes:
            raise FormatInvalid(shard.path, "is shorter than the image it should hold")
        # MAP_PRIVATE for a writable buffer, which torch.frombuffer wants; nothing is written.
        memory = mmap.mmap(
            descriptor,
            shard.offset - begin + shard.record.image_bytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=begin,
        )
    finally:
        os.close(descriptor)
    with memory:
        yield memory
