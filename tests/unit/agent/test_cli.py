"""The verbs on directories alone: output, exit status, damage; and usage errors of all verbs."""

import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from everstep.agent import choosing, display, exporting, shards
from everstep.agent.bare import place_of
from everstep.agent.cli import app
from everstep.agent.exits import exit_status
from everstep.kernels.digest import digest_units
from everstep.proto import errors
from everstep.proto.envelope import seal
from everstep.proto.errors import ShardCorrupt
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.proto.state_pb2 import Commit, CommittedShard, Record, Value
from everstep.snapshot.layout import Layout, LeafSpec, Part, encode, pack
from everstep.snapshot.record import record_digest, seal_record
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel

VERBS = (
    "agent",
    "status",
    "list",
    "recover",
    "verify",
    "inspect",
    "export",
    "gc",
    "doctor",
    "demo",
)
OF_AN_AGENT = {
    "status": (),
    "list": (),
    "inspect": ("--job", "gpt"),
    "verify": (),
    "export": ("--job", "gpt", "--to", "safetensors", "out.safetensors"),
    "gc": ("--dry-run",),
}
HALF = 3 * UNIT_BYTES // 2 + 4096
WORLD = 2


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@dataclass
class Saved:
    """Two steps of two ranks, as two trainers with one replicated and one local tensor leave
    them, in the levels under `root`."""

    root: Path
    whole: bytes = field(default_factory=lambda: random.Random(0).randbytes(2 * HALF))
    steps: tuple[int, ...] = (3, 5)

    def layout(self, rank: int) -> Layout:
        start, stop = rank * HALF, (rank + 1) * HALF
        leaves = [
            LeafSpec("model/w", "float32", (2 * HALF // 4,), start, stop, replicated=True),
            LeafSpec("model/a~1b", "bfloat16", (2,), 0, 4),
            LeafSpec("extra/local", "complex64", (1,), 0, 8),
            LeafSpec("extra/empty", "int64", (0, 3), 0, 0),
        ]
        parts = (Part("model", "module", "torch.nn.Linear"), Part("extra", "tree", "dict"))
        return pack(parts, leaves, {"model/tied": "model/w"}, {})

    def local(self, step: int, rank: int) -> bytes:
        return f"{step:04}{rank:04}".encode()

    def image(self, step: int, rank: int) -> bytes:
        layout = self.layout(rank)
        image = bytearray(layout.image_bytes)
        image[: len(layout.header)] = layout.header
        content = {
            "model/w": self.whole[rank * HALF : (rank + 1) * HALF],
            "model/a~1b": b"half",
            "extra/local": self.local(step, rank),
            "extra/empty": b"",
        }
        for leaf in layout.leaves:
            image[leaf.offset : leaf.offset + leaf.held_bytes] = content[leaf.name]
        return bytes(image)

    def record(self, step: int, rank: int) -> bytes:
        image = self.image(step, rank)
        return seal_record(
            Record(
                job="gpt",
                incarnation=1,
                step=step,
                rank=rank,
                world=WORLD,
                layout_id=self.layout(rank).layout_id,
                image_bytes=len(image),
                unit_bytes=UNIT_BYTES,
                unit_digests=digest_units(image, UNIT_BYTES),
                values=[Value(path="extra/tokens", json="7"), Value(path="rng", json="[1]")],
                captured_unix_s=1.8e9,
                producer="a test",
            )
        )

    def store(self, level: MemoryLevel | NvmeLevel) -> None:
        for step in self.steps:
            snapshot = SnapshotId(1, step)
            commit = Commit(
                job="gpt", incarnation=1, step=step, world=WORLD, committed_unix_s=1.8e9
            )
            level.begin("gpt", snapshot)
            for rank in range(WORLD):
                layout, record = self.layout(rank), self.record(step, rank)
                image = self.image(step, rank)
                level.put_layout("gpt", layout.layout_id, encode(layout))
                level.store("gpt", snapshot, rank, memoryview(image), record)
                commit.shards.append(
                    CommittedShard(
                        rank=rank,
                        layout_id=layout.layout_id,
                        image_bytes=len(image),
                        record_digest=record_digest(record),
                    )
                )
            level.commit("gpt", snapshot, seal("commit", commit.SerializeToString()))

    @property
    def nvme(self) -> Path:
        return self.root / "nvme"

    def file(self, step: int, rank: int) -> Path:
        return self.nvme / "gpt" / f"step-{step:012}" / f"rank-{rank:05}.safetensors"

    def flip(self, step: int, rank: int, *, at: int = -1) -> None:
        data = bytearray(self.file(step, rank).read_bytes())
        data[at] ^= 1
        self.file(step, rank).write_bytes(data)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a verb, far from any agent of this user."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"EVERSTEP_HOME": str(tmp_path / "home"), "EVERSTEP_AGENT": None})

    def run(*words: object, answer: str | None = None) -> Outcome:
        result = runner.invoke(app, [str(word) for word in words], input=answer)
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


Cli = Callable[..., Outcome]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    saved = Saved(tmp_path)
    with NvmeLevel(saved.nvme, write_threads=1, direct=False) as level:
        saved.store(level)
    return saved


@pytest.fixture
def in_memory(tmp_path: Path, saved: Saved) -> Path:
    root = tmp_path / "memory"
    saved.store(MemoryLevel(root, keep_free_bytes=0))
    return root


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples_and_json(cli: Cli, verb: str) -> None:
    outcome = cli(verb, "--help")
    assert outcome.status == 0
    assert f"\n  Examples:\n    everstep {verb}" in outcome.out
    assert "--json" in outcome.out


def test_these_are_all_verbs(cli: Cli) -> None:
    commands = cli("--help").out.partition("Commands:\n")[2]
    assert tuple(line.split()[0] for line in commands.splitlines() if line.strip()) == VERBS


def test_the_version(cli: Cli) -> None:
    outcome = cli("--version")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("everstep ")


@pytest.mark.parametrize(
    "words",
    [
        ("frobnicate",),
        ("status", "--frobnicate"),
        ("status", "--job", "../x"),
        ("status", "--agent", "tcp:host:1"),
        ("list", "/usr"),
        ("list", "missing-directory"),
        ("list", "nvme", "--job", "other"),
        ("list", "nvme/gpt", "--job", "other"),
        ("list", "nvme", "--agent", "unix:/a.sock"),
        ("inspect", "nvme", "--step", "-1"),
        ("inspect", "nvme", "--level", "memory"),
        ("verify", "nvme", "--level", "tape"),
        ("export", "nvme", "out.safetensors"),
        ("export", "out.safetensors", "--to", "safetensors"),
        ("export", "nvme", "out.zip", "--to", "zip"),
        ("export", "a", "b", "c", "--to", "torch"),
        ("export", "nvme", "missing/out", "--to", "safetensors"),
        ("export", "nvme", "out", "--to", "safetensors", "--part", "optimizer"),
        ("export", "nvme", "out", "--to", "safetensors", "--rank", "2"),
        ("gc", "--all"),
        ("gc", "--keep-newest", "3"),
        ("gc", "nvme", "--keep-newest", "0"),
        ("agent", "--nvme-dir", "relative"),
        ("agent", "--config", "missing.toml"),
        ("agent", "--listen", "127.0.0.1:0", "--peer", "n1"),
        ("agent", "--listen", "0.0.0.0:7400"),
        ("agent", "--listen", "127.0.0.1:0", "--label", "rack"),
        ("agent", "--peers-dns", "agents:7400"),
        ("agent", "--peers-slurm", "gpu[1-:7400", "--listen", "127.0.0.1:0"),
        ("agent", "--parity", "2"),
        ("agent", "--listen", "127.0.0.1:0", "--replaces", "n1"),
        ("doctor", "--memory-dir", "relative"),
    ],
)
def test_wrong_usage_is_status_2_and_one_message(
    cli: Cli, saved: Saved, words: tuple[str, ...]
) -> None:
    outcome = cli(*words)
    assert (outcome.status, outcome.out) == (2, ""), outcome
    assert "rror" in outcome.err
    assert "Traceback" not in outcome.err
    in_json = cli(*words, "--json")
    assert (in_json.status, in_json.err) == (2, "")
    error = in_json.document["error"]
    assert error.keys() == {"type", "message"}
    assert not (saved.root / "out").exists()


@pytest.mark.parametrize("verb", OF_AN_AGENT)
def test_no_agent_is_status_3(cli: Cli, verb: str, tmp_path: Path) -> None:
    outcome = cli(verb, *OF_AN_AGENT[verb])
    assert (outcome.status, outcome.out) == (3, "")
    assert f"no agent answers at unix:{tmp_path}/home/run/agent.sock" in outcome.err
    in_json = cli(verb, *OF_AN_AGENT[verb], "--json")
    assert (in_json.status, in_json.document["error"]["type"]) == (3, "AgentUnavailable")


def test_an_agent_is_named_by_flag_or_environment(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unix:/nowhere/a.sock:" in cli("status", "--agent", "unix:/nowhere/a.sock").err
    runner = CliRunner(env={"EVERSTEP_AGENT": "unix:/elsewhere/b.sock"})
    assert "unix:/elsewhere/b.sock:" in runner.invoke(app, ["status"]).stderr


def test_every_error_of_the_tree_has_its_exit_status() -> None:
    expected = {"AgentUnavailable": 3, "DeadlineExceeded": 3, "WriteFailed": 1}
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.EverstepError):
            error = kind.__new__(kind)
            default = 2 if issubclass(kind, errors.Refused) else 1
            assert exit_status(error) == expected.get(name, default), name


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
    monkeypatch.setitem(globals(), "HALF", 24 * UNIT_BYTES)
    saved = Saved(tmp_path, whole=bytes(2 * HALF), steps=(1,))
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


def test_gc_shows_asks_and_frees(cli: Cli, saved: Saved) -> None:
    words = ("gc", saved.nvme, "--keep-newest", 1)
    for options, answer, free in (
        (("--dry-run",), None, False),
        ((), "n\n", False),
        ((), "y\n", True),
    ):
        outcome = cli(*words, *options, answer=answer)
        assert outcome.status == 0
        assert "older than the newest 1" in outcome.out
        assert saved.file(3, 0).exists() is not free
        assert saved.file(5, 0).exists()
    assert "nothing to free" in cli(*words).out


def test_gc_without_an_answer_frees_nothing(cli: Cli, saved: Saved) -> None:
    assert cli("gc", saved.nvme, "--keep-newest", 1, answer="").status == 2
    assert cli("gc", saved.nvme, "--keep-newest", 1, "--json").status == 2
    assert saved.file(3, 0).exists()


def test_gc_in_json(cli: Cli, saved: Saved) -> None:
    words = ("gc", saved.nvme, "--keep-newest", 1, "--json")
    planned = cli(*words, "--dry-run").document
    assert (planned["freed"], [item["step"] for item in planned["items"]]) == (False, [3])
    done = cli(*words, "--yes").document
    assert (done["freed"], done["items"], done["bytes"]) == (
        True,
        planned["items"],
        sum(len(saved.image(3, rank)) for rank in range(WORLD)),
    )
    assert not saved.file(3, 0).exists()


def test_gc_keeps_the_last_sound_step_when_the_newest_is_damaged(cli: Cli, saved: Saved) -> None:
    saved.flip(5, 0)
    document = cli("gc", saved.nvme, "--keep-newest", 1, "--yes", "--json").document
    assert document["items"] == []
    assert saved.file(3, 0).exists()


def test_gc_keeps_multiples(cli: Cli, saved: Saved) -> None:
    words = ("gc", saved.nvme, "--keep-newest", 1, "--keep-every-steps", 3, "--yes")
    assert "nothing to free" in cli(*words).out
    assert saved.file(3, 0).exists()


def test_gc_of_a_whole_job(cli: Cli, saved: Saved, in_memory: Path) -> None:
    assert cli("gc", in_memory, "--yes").status == 2, "retention has no meaning in memory"
    for root in (saved.nvme, in_memory):
        assert cli("gc", root, "--job", "gpt", "--all", "--yes").status == 0
        assert list(root.iterdir()) == []


def test_nothing_from_a_file_reaches_the_terminal_unprintable() -> None:
    assert display.clean("a\x1b[31mb\x07\n") == "a\N{REPLACEMENT CHARACTER}[31mb" + (
        "\N{REPLACEMENT CHARACTER}\n"
    )


def test_markup_in_names_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    display.table("[bold]t", ("name",), [("[red]x[/red] :smile:",)])
    assert "[red]x[/red] :smile:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (display.ranks([0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8"),
        (display.ranks([]), ""),
        (display.size(0), "0 B"),
        (display.size(1536), "1.5 KiB"),
        (display.size(3 << 40), "3.0 TiB"),
        (display.span(59.6), "60 s"),
        (display.span(3600), "60 min"),
        (display.span(1e6), "12 d"),
    ],
)
def test_amounts_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_doctor_exits_by_its_findings(cli: Cli, tmp_path: Path) -> None:
    words = ("doctor", "--probe-mib", 0, "--memory-dir", "/dev/shm/everstep-doctor-test")
    fine = cli(*words, "--nvme-dir", "", "--json")
    statuses = {finding["status"] for finding in fine.document["findings"]}
    assert fine.document["fit"] is ("fail" not in statuses)
    assert fine.status == (0 if fine.document["fit"] else 1)
    (tmp_path / "file").touch()
    broken = cli(*words, "--nvme-dir", tmp_path / "file")
    assert broken.status == 1
    assert "fail" in broken.out


def test_demo_passes_its_flags_and_status_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > words\nexit 7\n')
    interpreter.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    words = ["--short", "--json", "--steps", "9", "--output", "there", "--seed", "4"]
    assert cli("demo", *words).status == 7
    assert (tmp_path / "words").read_text().split() == ["-P", "-m", "everstep.client.demo", *words]


def test_the_agent_carries_nothing_that_only_other_verbs_need() -> None:
    script = (
        "import sys, everstep.agent.cli, everstep.agent.config, everstep.agent.daemon; "
        "sys.exit(', '.join(sorted({'rich', 'torch', 'everstep.agent.showing'} & "
        "sys.modules.keys())) or 0)"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
