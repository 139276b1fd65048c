"""The stored formats, held against files written once.

`PYTHONPATH=.view python tests/golden/test_formats.py NAME` writes a file that is not there yet. A
file is never rewritten: a release that cannot read it any more has lost its users' snapshots.
"""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from everstep.proto import state_pb2
from everstep.proto.envelope import open_envelope, open_repairing, seal
from everstep.snapshot import layout, values
from everstep.snapshot.layout import Block, Leaf, LeafSpec, Part
from everstep.storage.parity import parity_bytes, parse_manifest

DATA = Path(__file__).parent / "data"

VALUES: dict[str, Any] = {
    "scheduler": {"last_epoch": 3, "lr": [0.1, 1e-5], "verbose": False, "best": None},
    "random/python": (3, (2147483648, 4294967295), None),
    "progress": OrderedDict([("seen", 1 << 70), ("loss", float("inf")), ("hash", b"\x00\xff")]),
    "odd": {0: -0.0, (1, "a"): {1, 2}, None: frozenset(), "~": complex(1, -2), "é": "\ud800"},
}
TEXTS = {
    "scheduler": '{"last_epoch":3,"lr":[0.1,1e-05],"verbose":false,"best":null}',
    "random/python": '{"~":"tuple","is":[3,{"~":"tuple","is":[2147483648,4294967295]},null]}',
    "progress": '{"~":"ordered","is":[["seen",{"~":"int","is":"0x400000000000000000"}],'
    '["loss",{"~":"float","is":"inf"}],["hash",{"~":"bytes","is":"AP8="}]]}',
    "odd": '{"~":"dict","is":[[0,-0.0],[{"~":"tuple","is":[1,"a"]},{"~":"set","is":[1,2]}],'
    '[null,{"~":"frozenset","is":[]}],["~",{"~":"complex","is":[1.0,-2.0]}],'
    '["\\u00e9",{"~":"str","is":"7aCA"}]]}',
}
PARTS = (
    Part("model", "module", "torch.nn.modules.linear.Linear"),
    Part("loader", "stateful", "example.Loader", per_rank=True),
)
SPECS = (
    LeafSpec("model/a.weight", "bfloat16", (3, 5), 0, 30),
    LeafSpec("model/a.bias", "float32", (5,), 0, 20),
    LeafSpec("optimizer/state/a.weight/average", "float32", (65536,), 4096, 12288, True),
    LeafSpec("optimizer/state/a.weight/phase", "complex64", (2,), 0, 16),
    LeafSpec("loader/empty", "int64", (0, 4), 0, 0),
    LeafSpec("model/mask", "bool", (7,), 0, 7),
)
BLOCKS = (
    LeafSpec("model/w", "float32", (3, 8), 0, 96, False, Block("model/w", (7, 16), (4, 8))),
    LeafSpec(
        "model/experts[2:3, 0:4]",
        "bfloat16",
        (1, 4),
        4,
        8,
        True,
        Block("model/experts", (8, 4), (2, 0)),
    ),
)
ALIASES = {"model/b.weight": "model/a.weight"}
CONTAINERS = {"model": "ordered", "optimizer/state/a.weight": "dict:0"}


def record_message() -> state_pb2.Record:
    return state_pb2.Record(
        job="gpt",
        incarnation=2,
        step=1234,
        rank=3,
        world=8,
        layout_id="00112233445566778899aabbccddeeff",
        image_bytes=2_500_000,
        unit_bytes=1 << 20,
        unit_digests=bytes(range(48)),
        values=[state_pb2.Value(path=path, json=text) for path, text in TEXTS.items()],
        replica_samples=bytes(range(8)),
        captured_unix_s=1790000000.25,
        producer="everstep 0.1.0",
    )


def commit_message() -> state_pb2.Commit:
    shard = state_pb2.CommittedShard
    return state_pb2.Commit(
        job="gpt",
        incarnation=2,
        step=1234,
        world=2,
        shards=[
            shard(rank=0, layout_id="aa" * 16, image_bytes=4096, record_digest=bytes(16)),
            shard(rank=1, layout_id="bb" * 16, image_bytes=8192, record_digest=bytes([255] * 16)),
        ],
        committed_unix_s=1790000001.5,
    )


def manifest_message() -> state_pb2.ParityManifest:
    shard = state_pb2.PlannedShard
    return state_pb2.ParityManifest(
        plan=state_pb2.ParityPlan(
            plan_id="5f3a-2-1234",
            job="gpt",
            incarnation=2,
            step=1234,
            world=3,
            code="cauchy-11d",
            parities=1,
            unit_bytes=1 << 20,
            members=[
                state_pb2.PlannedMember(
                    node_id="n1",
                    shards=[
                        shard(
                            rank=0, image_bytes=4096, layout_id="aa" * 16, record_digest=bytes(16)
                        ),
                        shard(
                            rank=2,
                            image_bytes=2_500_000,
                            layout_id="bb" * 16,
                            record_digest=bytes([255] * 16),
                        ),
                    ],
                ),
                state_pb2.PlannedMember(node_id="n2"),
            ],
        ),
        member=1,
        unit_digests=bytes(range(32)),
        records=[state_pb2.ShardRecord(rank=0, record=b"\x00record")],
        encoded_unix_s=1790000002.75,
        parity_bytes=2_000_000,
    )


BUILDERS = {
    "layout-v1.bin": lambda: layout.encode(
        layout.pack(PARTS, SPECS, ALIASES, CONTAINERS), repairable=True
    ),
    "layout-v1-blocks.bin": lambda: layout.encode(
        layout.pack(PARTS[:1], BLOCKS, {}, {}), repairable=True
    ),
    "record-v1.bin": lambda: seal(
        "record", record_message().SerializeToString(deterministic=True), repairable=True
    ),
    "commit-v1.bin": lambda: seal(
        "commit", commit_message().SerializeToString(deterministic=True), repairable=True
    ),
    "parity_manifest-v1.bin": lambda: seal(
        "parity_manifest", manifest_message().SerializeToString(deterministic=True), repairable=True
    ),
}


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_the_same_content_still_gives_the_same_bytes(name: str) -> None:
    assert BUILDERS[name]() == (DATA / name).read_bytes()


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_an_old_file_is_still_repaired(name: str) -> None:
    sealed = (DATA / name).read_bytes()
    rotten = bytes([*(byte ^ 0xFF for byte in sealed[:6]), *sealed[6:]])
    kind = name.partition("-")[0]
    assert open_repairing(kind, rotten, name) == (open_envelope(kind, sealed, name), 6)


def test_an_old_layout_says_the_same() -> None:
    found = layout.decode((DATA / "layout-v1.bin").read_bytes(), "layout-v1.bin")
    assert found.parts == PARTS
    assert found.aliases == ALIASES
    assert found.containers == CONTAINERS
    assert found.leaves == (
        Leaf("model/a.weight", "bfloat16", (3, 5), 12324, 0, 30, False),
        Leaf("model/a.bias", "float32", (5,), 12304, 0, 20, False),
        Leaf("optimizer/state/a.weight/average", "float32", (65536,), 4112, 4096, 12288, True),
        Leaf("optimizer/state/a.weight/phase", "complex64", (2,), 4096, 0, 16, False),
        Leaf("loader/empty", "int64", (0, 4), 4112, 0, 0, False),
        Leaf("model/mask", "bool", (7,), 12354, 0, 7, False),
    )
    assert found.image_bytes == 12361
    assert found.layout_id == "c1f33e9018651bc68104516a635910df"
    assert found.header.rstrip(b" ") == (4088).to_bytes(8, "little") + (
        b'{"__metadata__":{"format":"pt","everstep":"1"},'
        b'"optimizer/state/a.weight/phase":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        b'"loader/empty":{"dtype":"I64","shape":[0,4],"data_offsets":[16,16]},'
        b'"optimizer/state/a.weight/average[1024:3072]":'
        b'{"dtype":"F32","shape":[2048],"data_offsets":[16,8208]},'
        b'"model/a.bias":{"dtype":"F32","shape":[5],"data_offsets":[8208,8228]},'
        b'"model/a.weight":{"dtype":"BF16","shape":[3,5],"data_offsets":[8228,8258]},'
        b'"model/mask":{"dtype":"BOOL","shape":[7],"data_offsets":[8258,8265]}}'
    )


def test_old_blocks_say_the_same() -> None:
    name = "layout-v1-blocks.bin"
    found = layout.decode((DATA / name).read_bytes(), name)
    assert [(leaf.tensor, leaf.block, leaf.shape) for leaf in found.leaves] == [
        ("model/w", Block("model/w", (7, 16), (4, 8)), (3, 8)),
        ("model/experts", Block("model/experts", (8, 4), (2, 0)), (1, 4)),
    ]
    assert [(leaf.offset, leaf.start, leaf.stop) for leaf in found.leaves] == [
        (4096, 0, 96),
        (4192, 4, 8),
    ]
    assert b'"model/w[4:7,8:16]":{"dtype":"F32","shape":[3,8]' in found.header
    assert b'"model/experts[2:3,0:4][2:4]":{"dtype":"BF16","shape":[2]' in found.header


def test_an_old_record_says_the_same() -> None:
    data = (DATA / "record-v1.bin").read_bytes()
    found = state_pb2.Record.FromString(open_envelope("record", data, "record-v1.bin"))
    assert (found.job, found.incarnation, found.step) == ("gpt", 2, 1234)
    assert (found.rank, found.world) == (3, 8)
    assert found.layout_id == "00112233445566778899aabbccddeeff"
    assert (found.image_bytes, found.unit_bytes) == (2_500_000, 1 << 20)
    assert found.unit_digests == bytes(range(48))
    assert found.replica_samples == bytes(range(8))
    assert found.captured_unix_s == 1790000000.25
    assert found.producer == "everstep 0.1.0"
    decoded = {value.path: values.decode(value.json) for value in found.values}
    assert repr(decoded) == repr(VALUES)


def test_values_are_still_written_the_same() -> None:
    assert {path: values.encode(value, path) for path, value in VALUES.items()} == TEXTS


def test_an_old_commit_says_the_same() -> None:
    data = (DATA / "commit-v1.bin").read_bytes()
    found = state_pb2.Commit.FromString(open_envelope("commit", data, "commit-v1.bin"))
    assert (found.job, found.incarnation, found.step, found.world) == ("gpt", 2, 1234, 2)
    assert found.committed_unix_s == 1790000001.5
    assert [
        (shard.rank, shard.layout_id, shard.image_bytes, shard.record_digest)
        for shard in found.shards
    ] == [(0, "aa" * 16, 4096, bytes(16)), (1, "bb" * 16, 8192, b"\xff" * 16)]


def test_an_old_parity_manifest_says_the_same() -> None:
    data = (DATA / "parity_manifest-v1.bin").read_bytes()
    found = parse_manifest(data, "parity_manifest-v1.bin")
    plan = found.plan
    assert (plan.plan_id, plan.job, plan.incarnation, plan.step) == ("5f3a-2-1234", "gpt", 2, 1234)
    assert (plan.world, plan.code, plan.parities, plan.unit_bytes) == (3, "cauchy-11d", 1, 1 << 20)
    assert [
        (member.node_id, shard.rank, shard.image_bytes, shard.layout_id, shard.record_digest)
        for member in plan.members
        for shard in member.shards
    ] == [
        ("n1", 0, 4096, "aa" * 16, bytes(16)),
        ("n1", 2, 2_500_000, "bb" * 16, b"\xff" * 16),
    ]
    assert [member.node_id for member in plan.members] == ["n1", "n2"]
    assert (found.member, found.unit_digests) == (1, bytes(range(32)))
    assert [(one.rank, one.record) for one in found.records] == [(0, b"\x00record")]
    assert found.encoded_unix_s == 1790000002.75
    assert parity_bytes(found) == found.parity_bytes == 2_000_000


def test_a_parity_manifest_without_its_length_is_of_whole_units() -> None:
    manifest = manifest_message()
    manifest.ClearField("parity_bytes")
    sealed = seal("parity_manifest", manifest.SerializeToString())
    assert parity_bytes(parse_manifest(sealed, "test")) == 2 << 20


if __name__ == "__main__":
    with (DATA / sys.argv[1]).open("xb") as file:
        file.write(BUILDERS[sys.argv[1]]())
