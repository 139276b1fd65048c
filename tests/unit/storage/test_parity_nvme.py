"""Parity beside shards on disk; what every store does is in tests/contract."""

import os
from pathlib import Path

import pytest

from everstep.proto.errors import FormatInvalid, OutOfSpace, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.storage import images
from everstep.storage.nvme import NvmeLevel

STEP = "step-000000000005"


@pytest.fixture
def nvme(tmp_path: Path):
    with NvmeLevel(tmp_path / "nvme", chunk_bytes=UNIT_BYTES) as level:
        yield level


def plans(nvme: NvmeLevel) -> list[str]:
    return [manifest.plan.plan_id for manifest in nvme.parity.manifests("job")]


def entries(nvme: NvmeLevel) -> dict[str, list[str]]:
    """The step directories of the job, with what is in them."""
    folders = sorted((nvme.root / "job").glob("*step-*"))
    return {path.name: sorted(entry.name for entry in path.iterdir()) for path in folders}


def test_beside_a_committed_snapshot(nvme: NvmeLevel, take, parity) -> None:
    snapshot, one = take(1, 5), parity("p1")
    snapshot.save(nvme)
    one.save(nvme)
    nvme.sweep("job")
    one.assert_whole(nvme.parity)
    snapshot.assert_whole(nvme)
    assert nvme.problems("job") == []
    assert {"parity-p1", "parity.manifest"} < set(entries(nvme)[STEP])
    nvme.parity.delete("job", "p1")
    snapshot.assert_whole(nvme)
    assert plans(nvme) == []
    assert not {"parity-p1", "parity.manifest"} & set(entries(nvme)[STEP])


def test_it_goes_with_its_snapshot(nvme: NvmeLevel, take, parity) -> None:
    for step in (4, 5):
        take(1, step).save(nvme)
        parity(f"p{step}", step=step).save(nvme)
    nvme.delete("job", take(1, 4).id)
    assert list(entries(nvme)) == [STEP]
    assert plans(nvme) == ["p5"]


def test_a_node_without_shards(nvme: NvmeLevel, take, parity) -> None:
    one = parity("p1")
    one.save(nvme)
    assert entries(nvme) == {STEP: ["parity-p1", "parity.manifest"]}
    assert nvme.snapshots("job") == nvme.commits("job") == []
    assert nvme.ranks("job", one.snapshot) == []
    assert nvme.sweep("job") == []
    one.assert_whole(nvme.parity)
    assert nvme.problems("job") == []
    nvme.delete("job", one.snapshot)
    assert entries(nvme) == {}
    one.save(nvme)
    nvme.parity.delete("job", "p1")
    assert entries(nvme) == {}


def test_shards_that_are_not_committed_refuse_it(nvme: NvmeLevel, take, parity) -> None:
    snapshot = take(1, 5)
    snapshot.begin_and_store(nvme)
    with pytest.raises(FormatInvalid, match="not committed"):
        parity("p1").save(nvme)
    nvme.commit("job", snapshot.id, snapshot.commit())
    parity("p1").save(nvme)
    snapshot.assert_whole(nvme)


def test_a_shard_on_its_way_refuses_it_too(nvme: NvmeLevel, take, parity) -> None:
    snapshot = take(1, 5)
    nvme.begin("job", snapshot.id)
    partial = nvme.root / "job" / STEP / ".rank-00000.safetensors.1-1.partial"
    partial.write_bytes(b"half")
    with pytest.raises(FormatInvalid, match="not committed"):
        parity("p1").save(nvme)
    assert partial.exists()


def test_shards_come_to_parity_that_was_alone(nvme: NvmeLevel, take, parity) -> None:
    snapshot, one = take(1, 5), parity("p1")
    one.save(nvme)
    snapshot.begin_and_store(nvme)
    # The flush fails, or the agent dies: only the shards go.
    nvme.give_up("job", snapshot.id)
    one.assert_whole(nvme.parity)
    assert entries(nvme) == {STEP: ["parity-p1", "parity.manifest"]}
    snapshot.begin_and_store(nvme)
    assert len(nvme.sweep("job")) == 1
    assert entries(nvme) == {STEP: ["parity-p1", "parity.manifest"]}
    snapshot.begin_and_store(nvme)
    nvme.begin("job", snapshot.id)
    assert entries(nvme) == {STEP: ["parity-p1", "parity.manifest"]}
    snapshot.save(nvme)
    snapshot.assert_whole(nvme)
    one.assert_whole(nvme.parity)


def test_another_plan_takes_its_place(nvme: NvmeLevel, take, parity) -> None:
    take(1, 5).save(nvme)
    parity("p1").save(nvme)
    parity("p2", size=10).save(nvme)
    assert plans(nvme) == ["p2"]
    parity("p2", size=10).assert_whole(nvme.parity)
    assert "parity-p1" not in entries(nvme)[STEP]


def test_a_superseded_step_keeps_its_own(nvme: NvmeLevel, take, parity) -> None:
    old, new = take(1, 5), take(2, 5)
    old.save(nvme)
    parity("p1").save(nvme)
    new.begin_and_store(nvme)
    parity("p1").assert_whole(nvme.parity)
    parity("p3").save(nvme)
    assert f".superseded-{STEP}" in entries(nvme)
    parity("p3").assert_whole(nvme.parity)
    nvme.sweep("job")
    parity("p3").assert_whole(nvme.parity)
    old.assert_whole(nvme)
    new.save(nvme)
    parity("p2", incarnation=2).save(nvme)
    assert plans(nvme) == ["p2"]
    assert list(entries(nvme)) == [STEP]
    new.assert_whole(nvme)


def test_parity_alone_does_not_cost_the_committed_one(nvme: NvmeLevel, take, parity) -> None:
    old, new = take(1, 5), parity("p2", incarnation=2)
    old.save(nvme)
    parity("p1").save(nvme)
    new.save(nvme)
    for _ in range(2):
        old.assert_whole(nvme)
        parity("p1").assert_whole(nvme.parity)
        new.assert_whole(nvme.parity)
        nvme.sweep("job")
    nvme.delete("job", old.id)
    assert plans(nvme) == ["p2"]
    new.assert_whole(nvme.parity)


def test_parity_that_was_alone_is_superseded_too(nvme: NvmeLevel, take, parity) -> None:
    one = parity("p1")
    one.save(nvme)
    new = take(2, 5)
    new.begin_and_store(nvme)
    one.assert_whole(nvme.parity)
    nvme.give_up("job", new.id)
    assert entries(nvme) == {STEP: ["parity-p1", "parity.manifest"]}
    one.assert_whole(nvme.parity)
    new.save(nvme)
    assert plans(nvme) == []
    assert list(entries(nvme)) == [STEP]


def test_bytes_that_do_not_match_are_not_stored(nvme: NvmeLevel, take, parity) -> None:
    old, new = parity("p1"), parity("p2")
    old.save(nvme)
    wrong = bytearray(new.data)
    wrong[UNIT_BYTES] ^= 1
    with pytest.raises(ShardCorrupt) as caught:
        nvme.parity.store("job", new.snapshot, memoryview(wrong), new.manifest)
    assert caught.value.units == (1,)
    assert plans(nvme) == ["p1"]
    old.assert_whole(nvme.parity)
    assert entries(nvme) == {STEP: ["parity-p1", "parity.manifest"]}
    with pytest.raises(ShardCorrupt):
        nvme.parity.store("job", take(1, 9).id, memoryview(wrong), parity("p3", step=9).manifest)
    assert list(entries(nvme)) == [STEP]


def test_of_another_snapshot_or_length(nvme: NvmeLevel, take, parity) -> None:
    one = parity("p1")
    with pytest.raises(FormatInvalid, match="step 5"):
        nvme.parity.store("job", take(1, 6).id, memoryview(one.data), one.manifest)
    with pytest.raises(FormatInvalid, match="bytes"):
        nvme.parity.store("job", one.snapshot, memoryview(one.data)[1:], one.manifest)
    assert entries(nvme) == {}


def test_a_manifest_beside_the_wrong_commit(nvme: NvmeLevel, take, parity) -> None:
    take(1, 5).save(nvme)
    parity("p1").save(nvme)
    path = nvme.root / "job" / STEP / "parity.manifest"
    path.write_bytes(parity("p1", incarnation=2).manifest)
    assert plans(nvme) == []
    (problem,) = nvme.problems("job")
    assert "incarnation 2" in problem.reason
    path.write_bytes(parity("p1", step=6).manifest)
    assert "step 6" in nvme.problems("job")[0].reason


def test_a_damaged_commit_does_not_cost_the_parity(nvme: NvmeLevel, take, parity) -> None:
    take(1, 5).save(nvme)
    parity("p1").save(nvme)
    (nvme.root / "job" / STEP / "commit").write_bytes(b"rot")
    assert nvme.snapshots("job") == []
    nvme.sweep("job")
    parity("p1").assert_whole(nvme.parity)


def test_a_rotten_manifest_is_repaired(nvme: NvmeLevel, parity, flip) -> None:
    parity("p1").save(nvme)
    flip(nvme.root / "job" / STEP / "parity.manifest", 3, 7)
    parity("p1").assert_whole(nvme.parity)


def test_a_bad_sector_is_a_bad_unit(nvme: NvmeLevel, parity, monkeypatch) -> None:
    one = parity("p1")
    one.save(nvme)
    pread = os.pread

    def failing(descriptor: int, length: int, offset: int) -> bytes:
        if offset == 2 * UNIT_BYTES:
            raise OSError(5, "Input/output error")
        return pread(descriptor, length, offset)

    monkeypatch.setattr(images.os, "pread", failing)
    assert nvme.parity.verify("job", "p1") == [2]


def test_leftovers_of_other_plans_are_swept(nvme: NvmeLevel, take, parity) -> None:
    take(1, 5).save(nvme)
    parity("p1").save(nvme)
    step = nvme.root / "job" / STEP
    (step / "parity-p0").write_bytes(b"old")
    empty = nvme.root / "job/step-000000000007"
    empty.mkdir()
    (empty / "parity-p9").write_bytes(b"never published")
    assert len(nvme.sweep("job")) == 2
    assert "parity-p0" not in entries(nvme)[STEP]
    assert not empty.exists()
    parity("p1").assert_whole(nvme.parity)


def test_a_full_disk(small_tmpfs: Path, take, parity) -> None:
    with NvmeLevel(small_tmpfs / "nvme") as nvme:
        take(1, 5, sizes=(UNIT_BYTES,)).save(nvme)
        parity("p1", size=UNIT_BYTES).save(nvme)
        for step in (5, 6):
            with pytest.raises(OutOfSpace):
                parity("p2", step=step, size=7 * UNIT_BYTES).save(nvme)
        assert plans(nvme) == ["p1"]
        parity("p1", size=UNIT_BYTES).assert_whole(nvme.parity)
        take(1, 5, sizes=(UNIT_BYTES,)).assert_whole(nvme)
        assert list(entries(nvme)) == [STEP]
        assert not list(small_tmpfs.rglob("*.partial"))


def test_a_directory_under_another_steps_name(nvme: NvmeLevel, parity) -> None:
    parity("p1").save(nvme)
    (nvme.root / "job" / STEP).rename(nvme.root / "job/step-000000000008")
    assert plans(nvme) == []
    (problem,) = nvme.problems("job")
    assert "step 5" in problem.reason
    with pytest.raises(FormatInvalid):
        nvme.parity.open("job", "p1")
