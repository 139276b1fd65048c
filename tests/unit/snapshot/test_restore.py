"""Tensors are filled with checked bytes, or not at all."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from everstep.proto.errors import FormatInvalid, ShardCorrupt, StateMismatch
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.reading import Shard
from everstep.snapshot.restore import Restoration, Wanted

from .shards import Folder, Tensors, bits, flip, needs, some


@pytest.fixture(params=["memory", "nvme"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(tmp_path, request.param)


def restore(shards: Mapping[int, Shard], wanted: Tensors, rank: int = 0) -> None:
    with ThreadPoolExecutor(2) as executor, Restoration(shards, rank, executor) as restoration:
        restoration.verify(needs(wanted))
        restoration.plan([Wanted(name, tensor) for name, tensor in wanted.items()])
        restoration.run()


def test_all_leaves(folder: Folder) -> None:
    tensors = some()
    live = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    restore({0: folder.shard(tensors)}, live)
    assert {n: bits(t) for n, t in live.items()} == {n: bits(t) for n, t in tensors.items()}


def test_one_leaf_and_nothing_else(folder: Folder) -> None:
    tensors = some()
    live = {"t/odd": torch.zeros(7, 5, dtype=torch.float64)}
    restore({0: folder.shard(tensors)}, live)
    assert bits(live["t/odd"]) == bits(tensors["t/odd"])


def test_tensors_that_no_flat_copy_can_fill(folder: Folder) -> None:
    value = torch.randn(12, 12, dtype=torch.complex64)
    column = torch.randn(12, 1).expand(12, 5)
    tensors = {"t/a": value, "t/b": value, "t/c": value, "t/d": column, "t/e": column}
    negated = torch.zeros(12, 5, dtype=torch.complex64).conj().imag
    live = {
        "t/a": torch.zeros_like(value).t(),
        "t/b": torch.zeros_like(value).conj(),
        "t/c": torch.zeros(24, 24, dtype=torch.complex64)[::2, ::2],
        "t/d": torch.zeros(12, 1).expand(12, 5),
        "t/e": negated,
    }
    assert negated.is_neg()
    restore({0: folder.shard(tensors)}, live)
    assert {n: bits(t) for n, t in live.items()} == {n: bits(t) for n, t in tensors.items()}


def test_aliases_are_one_leaf(folder: Folder) -> None:
    weight = torch.randn(30)
    shard = folder.shard({"t/a": weight}, aliases={"t/b": "t/a", "t/c": "t/a"})
    tied, own = torch.zeros(30), torch.zeros(10, 3).t().reshape(30)
    restore({0: shard}, {"t/b": tied, "t/a": tied, "t/c": own})
    assert bits(tied) == bits(own) == bits(weight)


def test_replicas_come_from_all_ranks(folder: Folder) -> None:
    torch.manual_seed(1)
    replicas = {
        "t/w": torch.randn(300_001),
        "t/v": torch.randn(70_000).half(),
        "t/b": torch.randn(9),
    }
    shards = {}
    for rank in range(3):
        own = {"t/own": torch.full((50,), float(rank))}
        shards[rank] = folder.shard({**replicas, **own}, rank, 3, tuple(replicas))
        held = sum(leaf.held_bytes for leaf in shards[rank].layout.leaves if leaf.replicated)
        assert held < 600_000
    for rank in range(3):
        live = {name: torch.zeros_like(tensor) for name, tensor in replicas.items()}
        live["t/own"] = torch.zeros(50)
        restore(shards, live, rank)
        assert {n: bits(live[n]) for n in replicas} == {n: bits(t) for n, t in replicas.items()}
        assert live["t/own"].tolist() == [rank] * 50


def test_a_rank_that_is_missing_is_named(folder: Folder) -> None:
    replicas = {"t/w": torch.randn(300_000)}
    shards = {0: folder.shard(replicas, 0, 2, ("t/w",))}
    live = torch.zeros(300_000)
    with pytest.raises(FormatInvalid, match="no rank holds"):
        restore(shards, {"t/w": live})
    assert not live.any()


def test_a_flipped_bit_is_found_before_anything_is_touched(folder: Folder) -> None:
    tensors = some()
    live = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    shard = folder.shard(tensors)
    large = next(leaf for leaf in shard.layout.leaves if leaf.name == "t/large")
    flip(shard, large.offset + 17 * UNIT_BYTES)
    unit = (large.offset + 17 * UNIT_BYTES) // UNIT_BYTES
    with pytest.raises(ShardCorrupt) as raised:
        restore({0: shard}, live)
    assert raised.value.units == (unit,)
    assert shard.path in raised.value.where
    assert not any(tensor.any() for tensor in live.values())


def test_a_bit_that_flips_after_the_check_reaches_no_tensor(folder: Folder) -> None:
    """The unit is checked again right before its bytes are used."""
    tensors = {"t/x": torch.randn(40 * UNIT_BYTES // 4)}
    live = torch.zeros_like(tensors["t/x"])
    shard = folder.shard(tensors)
    with Restoration({0: shard}, 0) as restoration:
        restoration.verify(needs(["t/x"]))
        (leaf,) = shard.layout.leaves
        flip(shard, leaf.offset + leaf.held_bytes - 1)
        restoration.plan([Wanted("t/x", live)])
        with pytest.raises(ShardCorrupt):
            restoration.run()
    assert not live[-1000:].any()


def test_a_unit_that_is_not_wanted_may_be_damaged(folder: Folder) -> None:
    tensors = some()
    shard = folder.shard(tensors)
    flip(shard, shard.record.image_bytes - 1)
    (last,) = [
        x for x in shard.layout.leaves if x.offset + x.held_bytes == shard.record.image_bytes
    ]
    assert last.name == "t/scalar"
    live = torch.zeros_like(tensors["t/odd"])
    restore({0: shard}, {"t/odd": live})
    assert bits(live) == bits(tensors["t/odd"])


def test_a_file_that_is_too_short(folder: Folder) -> None:
    shard = folder.shard(some())
    path = Path(shard.path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatInvalid, match="shorter"):
        restore({0: shard}, {"t/odd": torch.zeros(7, 5, dtype=torch.float64)})


def test_a_record_without_digests(folder: Folder) -> None:
    shard = folder.shard(some())
    shard.record.unit_digests = shard.record.unit_digests[:-1]
    with pytest.raises(FormatInvalid, match="digest"):
        restore({0: shard}, {"t/odd": torch.zeros(7, 5, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("name", "tensor", "field"),
    [
        ("t/odd", torch.zeros(5, 7, dtype=torch.float64), "reshaped"),
        ("t/odd", torch.zeros(7, 5), "reshaped"),
        ("t/none", torch.zeros(1), "missing"),
    ],
)
def test_a_tensor_that_does_not_fit(
    folder: Folder, name: str, tensor: torch.Tensor, field: str
) -> None:
    with pytest.raises(StateMismatch) as raised:
        restore({0: folder.shard(some())}, {name: tensor})
    assert name in getattr(raised.value, field)[0]
    assert not tensor.any()
