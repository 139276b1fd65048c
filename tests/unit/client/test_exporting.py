"""What comes out of shards of several ranks: whole tensors, of every form, or nothing."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

from everstep.client.exporting import dcp_directory
from everstep.client.exporting.__main__ import write
from everstep.client.exporting.state import Exported, exported
from everstep.client.exporting.torch_file import write_torch
from everstep.proto.errors import EverstepError, FormatInvalid, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot import consolidating
from everstep.snapshot.consolidating import PieceReader
from everstep.snapshot.layout import Part
from everstep.snapshot.reading import Shard

from .located import PARTS, Rank, as_bytes, flip, located

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "model/rows": torch.randn(7, 5),
        "model/columns": torch.randn(6, 8).bfloat16(),
        "model/shared": torch.randn(UNIT_BYTES // 4 + 11),
        "model/0.bias": torch.tensor(2.5, dtype=torch.float64),
        "model/empty": torch.empty(0, 3),
        "model/complex": torch.randn(3, dtype=torch.complex64),
        "model/flags": torch.tensor([True, False]),
        "model/words": torch.tensor([1, 2**63], dtype=torch.uint64),
        "model/eight": torch.randn(9).to(torch.float8_e4m3fn),
    }


def ranks(whole: dict[str, torch.Tensor]) -> list[Rank]:
    """Two ranks: rows and columns of two tensors, halves of a replica, a stage each."""
    rows, columns, shared = (whole[f"model/{name}"] for name in ("rows", "columns", "shared"))
    half = shared.nbytes // 8 * 4
    plain = [name for name in whole if name not in ("model/rows", "model/columns", "model/shared")]
    return [
        Rank(
            {name: whole[name] for name in plain[:3]} | {"own/seen": torch.zeros(2)},
            {
                "model/rows": ((7, 5), (0, 0), rows[:4]),
                "model/columns": ((6, 8), (0, 0), columns[:, :3]),
            },
            {"model/shared": (shared, 0, half)},
            {"model/tied": "model/shared"},
            {"model/extra": "7", "own/n": "0", "rng": "[1]"},
        ),
        Rank(
            {name: whole[name] for name in plain[3:]} | {"own/seen": torch.ones(2)},
            {
                "model/rows": ((7, 5), (4, 0), rows[4:]),
                "model/columns": ((6, 8), (0, 3), columns[:, 3:]),
            },
            {"model/shared": (shared, half, shared.nbytes)},
            {"model/tied": "model/shared"},
            {"model/other": "8", "own/n": "1", "rng": "[2]"},
        ),
    ]


def save(form: str, shards: dict[int, Shard], output: Path, rank: int = 0, **how: Any) -> Exported:
    state = exported(shards, rank)
    with PieceReader(shards, rank) as reader:
        write(form, state, reader, output, force=False, **how)
    return state


def assert_whole(model: dict[str, Any], whole: dict[str, torch.Tensor]) -> None:
    names = {name.partition("/")[2]: tensor for name, tensor in whole.items()}
    assert model.keys() == names.keys() | {"tied", "extra", "other"}
    for name, tensor in names.items():
        assert (model[name].dtype, model[name].shape) == (tensor.dtype, tensor.shape), name
        assert as_bytes(model[name]) == as_bytes(tensor), name
    assert (model["extra"], model["other"]) == (7, 8)


@pytest.mark.parametrize("mapped", [True, False])
def test_torch_loads_what_ranks_had_parts_of(tmp_path: Path, mapped: bool) -> None:
    whole = tensors()
    shards = located(tmp_path / "shards", *ranks(whole))
    save("torch", shards, tmp_path / "out.pt", rank=1)
    loaded = torch.load(tmp_path / "out.pt", weights_only=True, mmap=mapped)
    assert_whole(loaded["model"], whole)
    assert loaded["model"]["tied"].data_ptr() == loaded["model"]["shared"].data_ptr()
    assert loaded["own"]["n"] == 1
    assert loaded["own"]["seen"].tolist() == [1, 1]
    assert (loaded["everstep"]["step"], loaded["rng"]) == (7, [2])


def test_the_file_is_a_zip_file_like_any_other(tmp_path: Path) -> None:
    save("torch", located(tmp_path / "shards", *ranks(tensors())), tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
        sizes = [info.file_size for info in archive.infolist() if "/data/" in info.filename]
        crcs = [info.CRC for info in archive.infolist() if info.file_size]
    assert sum(size > UNIT_BYTES for size in sizes) == 1, "the tied one is there once"
    assert all(crcs)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("chunk_bytes", [32 << 20, 40])
def test_dcp_loads_what_ranks_had_parts_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool, chunk_bytes: int
) -> None:
    monkeypatch.setattr(dcp_directory, "CHUNK_BYTES", chunk_bytes)
    whole = tensors()
    if chunk_bytes < 100:
        whole["model/shared"] = whole["model/shared"][:32].clone()
    shards = located(tmp_path / "shards", *ranks(whole))
    save("dcp", shards, tmp_path / "out", sharded=sharded)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {".metadata", "__0_0.distcp"} | ({"__1_0.distcp"} if sharded else set())
    fresh = {n.partition("/")[2]: torch.zeros_like(t) for n, t in whole.items()}
    state = {"model": {**fresh, "extra": 0, "other": 0}}
    state["model"]["tied"] = torch.zeros_like(fresh["shared"])
    checkpoint.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_whole(state["model"], whole)
    assert torch.equal(state["model"]["tied"], whole["model/shared"])


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_damage_leaves_nothing(tmp_path: Path, form: str) -> None:
    shards = located(tmp_path / "shards", *ranks(tensors()))
    leaf = next(leaf for leaf in shards[1].layout.leaves if leaf.name == "model/rows")
    flip(shards[1], leaf.offset + 3)
    with pytest.raises(ShardCorrupt, match="rank 1"):
        save(form, shards, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_part_that_nobody_holds_is_an_error(tmp_path: Path) -> None:
    whole = tensors()
    first, second = ranks(whole)
    second.blocks = {"model/rows": ((7, 5), (5, 0), whole["model/rows"][5:])}
    shards = located(tmp_path / "shards", first, second)
    with pytest.raises(FormatInvalid, match="model/rows"):
        save("torch", shards, tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_blocks_that_overlap_are_an_error(tmp_path: Path) -> None:
    whole = tensors()
    first, second = ranks(whole)
    second.blocks = {"model/rows": ((7, 5), (3, 0), whole["model/rows"][3:])}
    with pytest.raises(FormatInvalid, match="overlap"):
        exported(located(tmp_path / "shards", first, second), 0)


def test_what_other_ranks_have_for_themselves_is_left_out_and_named(tmp_path: Path) -> None:
    first = Rank({"model/w": torch.zeros(2)})
    others = [Rank({"model/w": torch.ones(2), "model/r": torch.ones(n)}) for n in (2, 2)]
    state = exported(located(tmp_path / "shards", first, *others), 0)
    assert state.tree["model"].keys() == {"w"}
    assert state.left_out == ["model/r"]
    assert exported(located(tmp_path / "shards", first, *others), 2).left_out == []


def test_an_empty_container_gives_way_to_what_other_ranks_have_in_it(tmp_path: Path) -> None:
    parts = (*PARTS, Part("optimizer", "optimizer", "torch.optim.SGD"))
    groups = {"optimizer/param_groups": '[{"lr":0.1,"params":"0:"}]'}
    first = Rank(values={"optimizer/state": "{}", **groups}, parts=parts)
    second = Rank(
        {"optimizer/state/model.w/m": torch.ones(2)},
        values={"optimizer/state/model.w/step": "3", **groups},
        parts=parts,
    )
    tree = exported(located(tmp_path / "shards", first, second), 0).tree["optimizer"]
    assert tree["state"]["model.w"].keys() == {"m", "step"}


def test_pieces_are_small_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolidating, "PIECE_BYTES", 64)
    whole = tensors()
    shards = located(tmp_path / "shards", *ranks(whole))
    found = consolidating.Whole.of({r: s.layout for r, s in shards.items()}, 0, ["model"])
    with PieceReader(shards, 0) as reader:
        for name in ("model/rows", "model/columns", "model/complex", "model/0.bias"):
            pieces = [bytes(piece) for piece in reader.pieces(found.tensors[name])]
            assert max(map(len, pieces)) <= 64
            assert b"".join(pieces) == as_bytes(whole[name]), name


def test_a_file_that_torch_has_written_otherwise_is_not_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = located(tmp_path / "shards", *ranks(tensors()))
    state = exported(shards, 0)
    monkeypatch.setattr(Exported, "tensors", property(lambda _: []))
    with PieceReader(shards, 0) as reader, pytest.raises(EverstepError, match="storages more"):
        write_torch(state, reader, tmp_path / "out.pt", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
