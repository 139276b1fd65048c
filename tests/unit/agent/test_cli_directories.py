"""`list`, `inspect` and `verify` on directories alone: output, exit status, damage."""

import shutil
from pathlib import Path

import pytest

from everstep.proto.ids import UNIT_BYTES
from everstep.storage.nvme import NvmeLevel

from .saved import HALF, WORLD, Cli, Saved


@pytest.mark.parametrize("where", ["nvme", "nvme/gpt", "."])
def test_list_of_a_bare_directory(cli: Cli, saved: Saved, where: str) -> None:
    outcome = cli("list", where, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    rows = outcome.document["snapshots"]
    assert [(row["job"], row["level"], row["step"]) for row in rows] == [
        ("gpt", "nvme", 3),
        ("gpt", "nvme", 5),
    ]
    size = sum(len(saved.image(5, rank)) for rank in range(WORLD))
    about = {"incarnation": 1, "world": 2, "ranks": [0, 1], "bytes": size, "committed": True}
    assert rows[1].items() >= about.items()
    shown = cli("list", where)
    assert shown.status == 0
    assert "0-1 of 2" in shown.out


def test_list_of_one_step(cli: Cli, saved: Saved) -> None:
    rows = cli("list", saved.file(3, 0).parent, "--json").document["snapshots"]
    assert [row["step"] for row in rows] == [3]


def test_list_of_a_memory_directory(cli: Cli, in_memory: Path) -> None:
    for where in (in_memory, in_memory / "gpt"):
        rows = cli("list", where, "--json").document["snapshots"]
        assert [(row["level"], row["step"], row["committed"]) for row in rows] == [
            ("memory", 3, True),
            ("memory", 5, True),
        ]


def test_what_was_never_committed_is_listed_as_such(cli: Cli, saved: Saved) -> None:
    (saved.file(5, 0).parent / "commit").unlink()
    rows = cli("list", saved.nvme, "--json").document["snapshots"]
    assert [(row["step"], row["committed"]) for row in rows] == [(3, True), (5, False)]
    assert cli("verify", saved.nvme, "--json").document["intact"], "it promises nothing"


def test_a_lost_record_makes_a_snapshot_in_memory_uncommitted(cli: Cli, in_memory: Path) -> None:
    next(in_memory.glob("gpt/rank-00001-*.record")).unlink()
    rows = cli("list", in_memory, "--json").document["snapshots"]
    assert sorted((row["ranks"], row["committed"]) for row in rows) == [
        ([0], False),
        ([0, 1], True),
    ]


def test_verify_of_whole_directories(cli: Cli, saved: Saved, in_memory: Path) -> None:
    for where in (saved.nvme, saved.nvme / "gpt", in_memory):
        outcome = cli("verify", where, "--json")
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.document["intact"]
        assert len(outcome.document["shards"]) == 4
        assert [one["step"] for one in outcome.document["usable"]] == [5, 3]
    assert "4 shard(s)" in cli("verify", saved.nvme).out


@pytest.mark.parametrize("at", [0, UNIT_BYTES, -1])
def test_a_flipped_bit_is_found_and_what_remains_is_named(cli: Cli, saved: Saved, at: int) -> None:
    saved.flip(5, 1, at=at)
    outcome = cli("verify", saved.nvme)
    assert outcome.status == 1
    assert str(saved.file(5, 1)) in outcome.err
    assert "can still restore step 3 from nvme" in outcome.err
    document = cli("verify", saved.nvme, "--json").document
    assert [(one["step"], one["rank"]) for one in document["damaged"]] == [(5, 1)]
    assert [one["step"] for one in document["usable"]] == [3]
    assert cli("verify", saved.nvme, "--step", 3).status == 0


def test_a_flipped_bit_in_an_arena_is_found(cli: Cli, saved: Saved, in_memory: Path) -> None:
    (arena,) = in_memory.glob("gpt/rank-00000-g000001-*.arena")
    data = bytearray(arena.read_bytes())
    data[len(saved.image(3, 0)) - 1] ^= 1
    arena.write_bytes(data)
    document = cli("verify", in_memory, "--json").document
    assert [(one["step"], one["rank"]) for one in document["damaged"]] == [(3, 0)]


@pytest.mark.parametrize("victim", ["image", "record", "both", "layout", "commit", "short"])
def test_whatever_is_missing_or_ruined_fails_verification(
    cli: Cli, saved: Saved, victim: str
) -> None:
    step = saved.file(5, 0).parent
    layout = saved.nvme / "gpt/layouts" / saved.layout(0).layout_id
    match victim:
        case "image":
            saved.file(5, 0).unlink()
        case "record":
            (step / "rank-00000.record").write_bytes(b"not a record")
        case "both":
            saved.file(5, 0).unlink()
            (step / "rank-00000.record").unlink()
        case "layout":
            layout.unlink()
        case "commit":
            (step / "commit").write_bytes(b"not a commit")
        case "short":
            saved.file(5, 0).write_bytes(saved.image(5, 0)[:-1])
    outcome = cli("verify", saved.nvme, "--json")
    assert outcome.status == 1
    document = outcome.document
    assert document["damaged"] or document["problems"]
    usable = [] if victim == "layout" else [3]
    assert [one["step"] for one in document["usable"]] == usable
    assert cli("list", saved.nvme).status == 0, "one bad file hides no other"


def test_a_step_that_is_nowhere_is_status_1(cli: Cli, saved: Saved) -> None:
    for words in (("verify",), ("inspect",), ("export", "--to", "safetensors")):
        verb, *options = words
        output = ["out"] if verb == "export" else []
        outcome = cli(verb, saved.nvme, *output, *options, "--step", 4)
        assert outcome.status == 1, words
        assert "step 4" in outcome.err


def test_inspect_describes_a_shard(cli: Cli, saved: Saved) -> None:
    document = cli("inspect", saved.nvme, "--step", 3, "--rank", 1, "--json").document
    about = {"job": "gpt", "step": 3, "rank": 1, "world": 2, "level": "nvme"}
    assert document.items() >= about.items()
    assert document["path"] == str(saved.file(3, 1))
    leaves = {leaf["name"]: leaf for leaf in document["leaves"]}
    assert (
        leaves["model/w"].items()
        >= {
            "dtype": "float32",
            "shape": [2 * HALF // 4],
            "bytes": 2 * HALF,
            "held_bytes": HALF,
            "start": HALF,
            "stop": 2 * HALF,
            "replicated": True,
        }.items()
    )
    assert document["aliases"] == {"model/tied": "model/w"}
    assert document["record"]["digests"] == -(-len(saved.image(3, 1)) // UNIT_BYTES)
    assert document["record"]["producer"] == "a test"
    assert {"path": "extra/tokens", "chars": 1, "summary": "7"} in document["values"]
    parts = {part["name"]: part for part in document["parts"]}
    assert (parts["model"]["leaves"], parts["model"]["values"]) == (2, 0)
    assert (parts["extra"]["leaves"], parts["extra"]["values"]) == (2, 1)


def test_inspect_takes_the_newest_and_every_kind_of_path(
    cli: Cli, saved: Saved, in_memory: Path
) -> None:
    file = saved.file(3, 1)
    for path, step, rank in (
        (saved.nvme, 5, 0),
        (saved.nvme / "gpt", 5, 0),
        (file.parent, 3, 0),
        (file, 3, 1),
        (file.with_suffix(".record"), 3, 1),
        (in_memory, 5, 0),
    ):
        document = cli("inspect", path, "--json").document
        assert (document["step"], document["rank"]) == (step, rank), path
        assert "model/w" in cli("inspect", path).out


def test_inspect_of_a_file_alone_shows_its_header(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(saved.image(3, 0))
    document = cli("inspect", alone, "--json").document
    assert "record" not in document
    names = [leaf["name"] for leaf in document["leaves"]]
    assert f"model/w[0:{HALF // 4}]" in names
    assert "nothing can be verified" in cli("inspect", alone).out


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x09" + bytes(7) + b'{"a":null'],
)
def test_inspect_of_something_else_is_status_1(cli: Cli, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.bin").write_bytes(content)
    outcome = cli("inspect", "other.bin")
    assert (outcome.status, outcome.out) == (1, "")
    assert "safetensors" in outcome.err


def test_a_snapshot_over_the_disks_of_two_nodes(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    """Each disk has one rank, as the agents of two nodes leave them: together they are whole."""
    other = tmp_path / "other"
    with NvmeLevel(other, write_threads=1, direct=False) as level:
        saved.store_ranks(level, [1])
    shutil.rmtree(saved.nvme)
    with NvmeLevel(saved.nvme, write_threads=1, direct=False) as level:
        saved.store_ranks(level, [0])
    both = ("--nvme-dir", saved.nvme, "--nvme-dir", other)
    planned = cli("recover", "--dry-run", *both, "--json")
    assert (planned.status, planned.document["chosen"]["step"]) == (0, 5)
    assert [one["further_losses"] for one in planned.document["snapshots"]] == [0, 0]
    assert "rank 0, from nvme" in cli("recover", "--dry-run", *both).out
    one = cli("recover", "--dry-run", *both[:2], "--json")
    assert (one.status, one.document["chosen"]) == (1, None)
    assert "rank 1: no intact copy is in reach" in one.document["snapshots"][0]["missing"][0]
    for words in (both, both[:2]):
        assert cli("verify", *words).status == 0, "what should be there is there, and intact"
    rows = cli("list", *both, "--json").document["cluster"]["snapshots"]
    assert [(row["step"], row["recoverable"]) for row in rows] == [(5, True), (3, True)]
    saved.flip(5, 0)
    damaged = cli("verify", *both, "--json")
    assert damaged.status == 1
    assert [(one["step"], one["rank"]) for one in damaged.document["damaged"]] == [(5, 0)]
    assert [one["step"] for one in damaged.document["usable"]] == [3]


def test_a_node_whose_disk_lacks_its_own_rank_is_damaged(
    cli: Cli, saved: Saved, tmp_path: Path
) -> None:
    with NvmeLevel(tmp_path / "other", write_threads=1, direct=False) as level:
        saved.store_ranks(level, [1])
    (tmp_path / "other/gpt/step-000000000005/rank-00001.safetensors").unlink()
    document = cli("verify", tmp_path / "other", "--json").document
    assert [(one["step"], one["rank"]) for one in document["damaged"]] == [(5, 1)]


def test_memory_and_disk_of_one_node_count_as_one(
    cli: Cli, saved: Saved, in_memory: Path, tmp_path: Path
) -> None:
    words = ("recover", "--dry-run", "--json", "--nvme-dir", saved.nvme)
    (first, *_) = cli(*words, "--memory-dir", in_memory).document["snapshots"]
    assert (first["levels"], first["further_losses"]) == (["memory"], 0)
    with NvmeLevel(tmp_path / "other", write_threads=1, direct=False) as level:
        saved.store(level)
    apart = ("--memory-dir", in_memory, "--nvme-dir", tmp_path / "other")
    (first, *_) = cli(*words, *apart).document["snapshots"]
    assert first["further_losses"] == 2, "three directories in two unlike lists: three nodes"
    twice = cli(*words, "--nvme-dir", saved.nvme / "gpt")
    assert twice.status == 2
    assert "twice" in twice.document["error"]["message"]
