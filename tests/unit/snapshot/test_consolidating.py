"""Boxes that follow each other in memory, and one reader for shards without number."""

import math
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.proto.errors import ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot import consolidating
from everstep.snapshot.consolidating import PieceReader, Whole, boxes
from everstep.snapshot.reshard import Box

from .shards import Folder, bits, flip, some


@given(st.lists(st.integers(0, 7), max_size=4), st.sampled_from([1, 2, 4, 8]), st.integers(1, 200))
def test_boxes_are_the_tensor_cut_in_order(shape: list[int], itemsize: int, limit: int) -> None:
    whole = numpy.arange(math.prod(shape)).reshape(shape)
    offset = tuple(range(3, 3 + len(shape)))
    found: list[int] = []
    for box in boxes(Box(offset, tuple(shape)), itemsize, limit):
        assert box.elements * itemsize <= max(limit, itemsize)
        begins = [at - base for at, base in zip(box.offset, offset, strict=True)]
        index = tuple(slice(b, b + n) for b, n in zip(begins, box.shape, strict=True))
        found += whole[index].reshape(-1).tolist()
    assert found == whole.reshape(-1).tolist()


def test_all_bytes_come_out_and_damage_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consolidating, "_OPEN_SHARDS", 1)
    monkeypatch.setattr(consolidating, "_REMEMBERED_UNITS", 1)
    tensors = some()
    made = Folder(tmp_path, "memory")
    shared = ("t/large", "t/half")
    shards = {rank: made.shard(tensors, rank, 3, replicated=shared) for rank in range(3)}
    whole = Whole.of({rank: shard.layout for rank, shard in shards.items()}, 1)
    with PieceReader(shards, 1) as reader:
        for name, tensor in tensors.items():
            data = b"".join(bytes(piece) for piece in reader.pieces(whole.tensors[name]))
            assert data == bits(tensor), name
        image = b"".join(bytes(piece) for piece in reader.image(2))
        assert image == Path(shards[2].path).read_bytes()[shards[2].offset :]
    flip(shards[0], shards[0].layout.leaves[0].offset + 2 * UNIT_BYTES)
    with PieceReader(shards, 1) as reader, pytest.raises(ShardCorrupt, match="rank 0"):
        list(reader.pieces(whole.tensors["t/large"]))
