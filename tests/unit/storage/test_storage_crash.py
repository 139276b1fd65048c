"""Killed, or failed by the device, at every named point: the old or the new, never a mixture."""

import re
import signal
from pathlib import Path

import pytest

import everstep.storage
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity_memory import ParityMemory
from tests.zygotes import Program

_MOMENTS = ("before_write", "after_write", "before_rename", "after_rename", "after_sync")


def published(*verbs: str) -> list[str]:
    return [f"storage.{verb}.{moment}" for verb in verbs for moment in _MOMENTS]


NVME_POINTS = [
    *published("layout", "record", "commit"),
    "storage.begin.before_aside",
    "storage.begin.after_aside",
    "storage.begin.before_create",
    "storage.begin.after_create",
    "storage.shard.before_write",
    "storage.shard.before_chunk@3",
    "storage.shard.after_write",
    "storage.shard.before_rename",
    "storage.shard.after_rename",
    "storage.supersede.before_removal",
    "storage.supersede.after_removal",
    # First what was moved aside is removed, then the step that is deleted.
    *(f"storage.delete.{m}@{n}" for n in (1, 2) for m in ("before_commit", "after_commit")),
    *(f"storage.delete.after_directory@{n}" for n in (1, 2)),
]
NVME_FRESH_POINTS = ["storage.begin.before_clear"]
MEMORY_POINTS = [
    *published("publish", "membership"),
    "storage.drop.before_unlink",
    "storage.drop.after_unlink",
    "storage.drop.after_unlink@2",
    "storage.publish.after_rename@2",
    "storage.reserve.before_allocate",
    "storage.reserve.after_allocate",
    "storage.reserve.before_rename",
    "storage.reserve.after_rename",
    "storage.release.before_unlink",
]
PARITY_NVME_POINTS = [
    *published("parity"),
    "storage.shard.before_chunk@3",
    "storage.shard.before_rename",
    "storage.shard.after_rename",
    # First the parity that is alone, then that of the snapshot which is deleted.
    *(f"storage.withdraw.{m}_unlink@{n}" for n in (1, 2) for m in ("before", "after")),
    "storage.unparity.after_unlink",
    "storage.delete.before_commit",
    "storage.delete.after_commit",
]
PARITY_MEMORY_POINTS = [
    *published("manifest"),
    "storage.grow.before_allocate",
    "storage.grow.after_allocate",
    "storage.withdraw.before_unlink",
    "storage.withdraw.after_unlink",
    "storage.unused.before_unlink",
]

# The device's own moments: the rest differ only by name, and take minutes.
FAILED_POINTS = {
    "storage.layout.after_write",
    "storage.record.before_write",
    "storage.commit.before_write",
    "storage.commit.after_write",
    "storage.commit.after_rename",
    "storage.begin.after_aside",
    "storage.shard.before_chunk@3",
    "storage.shard.after_write",
    "storage.supersede.before_removal",
    "storage.delete.after_commit@2",
    "storage.publish.after_write",
    "storage.reserve.before_allocate",
    "storage.reserve.after_rename",
    "storage.drop.before_unlink",
    "storage.parity.before_rename",
    "storage.parity.after_rename",
    "storage.manifest.after_write",
    "storage.grow.after_allocate",
}


def cases(points: list[str], error: str) -> list:
    """Each point with a kill and with an error, of which some are left to the long run."""
    killed = [pytest.param(point, "kill") for point in points]
    failed = [
        pytest.param(point, error, marks=() if point in FAILED_POINTS else pytest.mark.long)
        for point in points
    ]
    return killed + failed


def run(kind: str, root: Path, point: str, action: str) -> str:
    """What the child says, which reaches the point: that kills it, or it goes on to the end."""
    name, _, nth = point.partition("@")
    child = Program(
        "agent",
        str(Path(__file__).with_name("crash_child.py")),
        kind,
        str(root),
        environ={"EVERSTEP_FAILPOINTS": f"{name}={action}@{nth or 1}"},
        log=root.with_suffix(".log"),
    )
    status, said = child.wait(60), root.with_suffix(".log").read_text()
    assert status == (-signal.SIGKILL if action == "kill" else 0), said
    return said.strip()


def check_nvme(nvme: NvmeLevel, take) -> set[int]:
    """Everything that is listed is whole; returns the incarnations of step 5."""
    listed = nvme.snapshots("job")
    for snapshot in listed:
        take(snapshot.incarnation, snapshot.step).assert_whole(nvme)
    assert nvme.problems("job") == []
    assert take(1, 3).id in listed
    return {snapshot.incarnation for snapshot in listed if snapshot.step == 5}


@pytest.mark.parametrize(("point", "action"), cases(NVME_POINTS + NVME_FRESH_POINTS, "error:EIO"))
def test_nvme_holds_the_old_or_the_new(tmp_path: Path, take, point: str, action: str) -> None:
    root = tmp_path / "nvme"
    # A second layout, so that the child has one to write.
    with NvmeLevel(root) as nvme:
        for step in (3, 4):
            take(1, step).save(nvme)
        if point in NVME_FRESH_POINTS:
            take(1, 5).begin_and_store(nvme)
        else:
            take(1, 5).save(nvme)
    layout = root / "job/layouts" / take(1, 3).layout_id
    if ".layout." in point:
        layout.write_bytes(b"rot")
    said = run("nvme", root, point, action)
    committed = said == "done" or ".delete." in point or ".supersede." in point
    with NvmeLevel(root) as nvme:
        if ".layout." in point:
            nvme.put_layout("job", take(1, 3).layout_id, take(1, 3).layout)
        found = check_nvme(nvme, take)
        if point not in NVME_FRESH_POINTS:
            assert found, "neither the old nor the new is there"
        if committed:
            assert 2 in found
        # It stops being listed before any of its files goes.
        if "after_commit" in point and action == "kill":
            assert found == {2}
            assert (take(1, 4).id in nvme.snapshots("job")) == point.endswith("@1")
        nvme.sweep("job")
        swept = check_nvme(nvme, take)
        assert swept == ({2} if 2 in found else found)
        left = {path.name for path in (root / "job").iterdir()}
        assert not [name for name in left if name.startswith(".")]
        assert not list(root.rglob("*.partial"))
        take(2, 5).save(nvme)
        assert check_nvme(nvme, take) == {2}


@pytest.mark.parametrize(("point", "action"), cases(MEMORY_POINTS, "error:ENOSPC"))
def test_memory_holds_the_old_or_the_new(tmp_path: Path, take, point: str, action: str) -> None:
    root = tmp_path / "memory"
    memory = MemoryLevel(root, keep_free_bytes=0)
    memory.write_membership("job", b"old")
    older, old, new = (take(1, step) for step in (4, 5, 6))
    for rank in (0, 1):
        memory.reserve("job", rank, 1, slot_count=2, slot_bytes=4 << 20)
    for snapshot in (older, old):
        snapshot.save(memory)
    said = run("memory", root, point, action)
    if action != "kill":
        assert said == "OutOfSpace"
    memory = MemoryLevel(root, keep_free_bytes=0)
    listed = memory.snapshots("job")
    assert old.id in listed
    for snapshot in listed:
        take(snapshot.incarnation, snapshot.step).assert_whole(memory)
    assert memory.problems("job") == []
    assert memory.membership("job") in (b"old", b"new")
    # An arena is there whole or not at all.
    assert all(arena.path.stat().st_blocks * 512 >= arena.total_bytes for arena in arenas(memory))
    memory.sweep("job")
    assert not list(root.rglob(".*"))
    assert old.id in memory.snapshots("job")
    assert new.id not in memory.snapshots("job") or older.id not in memory.snapshots("job")


def arenas(memory: MemoryLevel) -> list:
    return memory.arenas("job")


@pytest.mark.parametrize(("point", "action"), cases(PARITY_NVME_POINTS, "error:EIO"))
def test_parity_on_nvme_is_the_old_or_the_new(
    tmp_path: Path, take, parity, point: str, action: str
) -> None:
    root = tmp_path / "nvme"
    alone = parity("q", step=6)
    with NvmeLevel(root) as nvme:
        take(1, 5).save(nvme)
        parity("p1").save(nvme)
        alone.save(nvme)
    run("parity-nvme", root, point, action)
    if action != "kill" and "parity.before" in point:
        # A device that fails costs no space until the next start.
        assert not list(root.rglob("parity-p2"))
    with NvmeLevel(root) as nvme:
        for swept in (False, True):
            if swept:
                nvme.sweep("job")
            plans = {manifest.plan.plan_id for manifest in nvme.parity.manifests("job")}
            for plan_id in plans - {"q"}:
                parity(plan_id).assert_whole(nvme.parity)
            if "q" in plans:
                alone.assert_whole(nvme.parity)
            assert nvme.parity.problems("job") == nvme.problems("job") == []
            # Parity goes before the snapshot it belongs to.
            if take(1, 5).id in nvme.snapshots("job"):
                take(1, 5).assert_whole(nvme)
            else:
                assert plans == set()
            if ".parity." in point or ".shard." in point:
                assert len(plans - {"q"}) == 1
                assert "q" in plans
            if point == "storage.parity.after_sync":
                assert "p2" in plans
        files = {path.name for path in root.rglob("*") if path.is_file()}
        assert {name for name in files if name.startswith("parity-")} == {
            f"parity-{plan_id}" for plan_id in plans
        }
        assert not [name for name in files if name.startswith(".")]
        assert ("q" in plans) == (root / "job/step-000000000006").exists()


@pytest.mark.parametrize(("point", "action"), cases(PARITY_MEMORY_POINTS, "error:ENOSPC"))
def test_parity_in_memory_is_the_old_or_the_new(
    tmp_path: Path, parity, point: str, action: str
) -> None:
    root = tmp_path / "memory"
    store = ParityMemory(root, keep_free_bytes=0)
    old, new = parity("p1"), parity("p2", size=5 << 20)
    gone = parity("p0", size=1 << 20)
    gone.encode(store)
    old.encode(store)
    store.delete("job", "p0")
    said = run("parity-memory", root, point, action)
    if action != "kill":
        assert said == "OutOfSpace"
    store = ParityMemory(root, keep_free_bytes=0)
    store.sweep("job")
    plans = {manifest.plan.plan_id for manifest in store.manifests("job")}
    assert plans
    for one in (old, new):
        if one.plan_id in plans:
            one.assert_whole(store)
    assert store.problems("job") == []
    assert not list(root.rglob(".*"))
    # Every file has all its pages.
    files = list(root.rglob("*.parity"))
    assert all(path.stat().st_blocks * 512 >= path.stat().st_size for path in files)
    new.encode(store)
    new.assert_whole(store)
    assert len(list(root.rglob("*.parity"))) <= 3


def test_every_point_in_the_source_is_passed_here() -> None:
    sources = [
        path.read_text()
        for folder in everstep.storage.__path__
        for path in Path(folder).glob("*.py")
    ]
    text = "\n".join(sources)
    named = set(re.findall(r'failpoint\("(storage\.[a-z_.]+)"\)', text))
    moments = re.findall(r'failpoint\(f"storage\.\{verb\}\.([a-z_]+)"\)', text)
    verbs = re.findall(r'\.publish\(.*, "([a-z]+)"\)', text)
    assert set(moments) == set(_MOMENTS)
    named |= {f"storage.{verb}.{moment}" for verb in verbs for moment in moments}
    points = (
        *(NVME_POINTS + NVME_FRESH_POINTS + PARITY_NVME_POINTS),
        *(MEMORY_POINTS + PARITY_MEMORY_POINTS),
    )
    tested = {point.partition("@")[0] for point in points}
    assert named == tested
