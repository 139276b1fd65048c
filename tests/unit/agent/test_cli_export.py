"""`export` from directories alone: what comes out, loaded by the public library."""

import json
import tracemalloc
from pathlib import Path

import pytest
from safetensors import safe_open

from everstep.agent import choosing, display, exporting, shards
from everstep.agent.bare import place_of
from everstep.proto.errors import ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.storage.nvme import NvmeLevel

from . import saved as saved_module
from .saved import HALF, Cli, Saved


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of everything in a safetensors file, as the public library reads it."""
    found = {}
    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        forms = {name: file.get_slice(name) for name in names}
        data = path.read_bytes()
        header_bytes = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + header_bytes])
        for name in names:
            begin, end = entries[name]["data_offsets"]
            content = data[8 + header_bytes + begin : 8 + header_bytes + end]
            found[name] = (forms[name].get_dtype(), forms[name].get_shape(), content)
    return found


def test_export_puts_replicas_together(cli: Cli, saved: Saved) -> None:
    outcome = cli("export", saved.nvme, "out", "--to", "safetensors", "--rank", 1, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.document["step"] == 5
    assert outcome.document["omitted_values"] == 1
    whole = ("F32", [2 * HALF // 4], saved.whole)
    assert tensors(saved.root / "out") == {
        "model/w": whole,
        "model/tied": whole,
        "model/a~1b": ("BF16", [2], b"half"),
        "extra/local": ("F32", [1, 2], saved.local(5, 1)),
        "extra/empty": ("I64", [0, 3], b""),
    }


def test_export_of_one_part_has_the_names_of_its_state_dict(cli: Cli, in_memory: Path) -> None:
    words = ("export", in_memory / "gpt", "out", "--to", "safetensors", "--part", "model")
    assert cli(*words).status == 0
    assert tensors(Path("out")).keys() == {"w", "tied", "a/b"}
    assert cli(*words, "--part", "extra", "--force").status == 0
    assert tensors(Path("out")).keys() >= {"model/w", "extra/local"}


def test_export_overwrites_only_when_told(cli: Cli, saved: Saved) -> None:
    Path("out").write_bytes(b"precious")
    words = ("export", saved.nvme, "out", "--to", "safetensors")
    outcome = cli(*words)
    assert outcome.status == 2
    assert "--force" in outcome.err
    assert Path("out").read_bytes() == b"precious"
    assert cli(*words, "--force").status == 0
    assert "model/w" in tensors(Path("out"))
    assert not list(Path().glob(".*")), "no half-written file is left"


def test_export_refuses_damage_and_falls_back_only_unasked(cli: Cli, saved: Saved) -> None:
    saved.flip(5, 1)
    words = ("export", saved.nvme, "out", "--to", "safetensors")
    named = cli(*words, "--step", 5)
    assert named.status == 1
    assert str(saved.file(5, 1)) in named.err
    assert not Path("out").exists()
    newest = cli(*words, "--json")
    assert newest.status == 0
    assert newest.document["step"] == 3
    assert len(newest.document["rejected"]) == 1
    assert "warning: not used: step 5" in newest.err
    assert tensors(Path("out"))["extra/local"][2] == saved.local(3, 0)


def test_export_takes_each_shard_from_the_level_that_has_it_whole(
    saved: Saved, in_memory: Path
) -> None:
    saved.flip(5, 1)
    with place_of(saved.nvme) as disk, place_of(in_memory) as memory:
        disk.stores += memory.stores
        chosen = choosing.choose(disk, "gpt", None, display.silent)
    assert chosen.snapshot.step == 5
    assert {rank: copy.level for rank, copy in chosen.copies.items()} == {0: "nvme", 1: "memory"}
    assert len(chosen.rejected) == 1


def test_a_copy_that_rots_while_it_is_exported_leaves_nothing(saved: Saved) -> None:
    with place_of(saved.nvme) as place:
        chosen = choosing.choose(place, "gpt", None, display.silent)
    saved.flip(5, 1)
    output = saved.root / "out"
    with pytest.raises(ShardCorrupt):
        exporting.export_safetensors(chosen, 0, (), output, display.silent)
    assert not output.exists()
    assert not list(saved.root.glob(".out*"))


def test_an_export_does_not_hold_the_state_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_REMEMBERED_UNITS", 2)
    monkeypatch.setattr(saved_module, "HALF", 24 * UNIT_BYTES)
    saved = Saved(tmp_path, whole=bytes(48 * UNIT_BYTES), steps=(1,))
    with NvmeLevel(saved.nvme, write_threads=1, direct=False) as level:
        saved.store(level)
    tracemalloc.start()
    try:
        with place_of(saved.nvme) as place:
            chosen = choosing.choose(place, "gpt", None, display.silent)
            exporting.export_safetensors(chosen, 0, (), tmp_path / "out", display.silent)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out").stat().st_size > 2 * 48 * UNIT_BYTES
    assert peak_bytes < 16 * UNIT_BYTES
