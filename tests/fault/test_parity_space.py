"""Parity and staged shards on devices that are full: refused early, whole, without a SIGBUS.

Each case writes from a process of its own, so that a SIGBUS would be seen as what it is.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.kernels.digest import digest_units
from everstep.proto import state_pb2
from everstep.proto.envelope import seal
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity_memory import ParityMemory

JOB = "job"
SMALL, LARGE = 8 * UNIT_BYTES, 40 * UNIT_BYTES
"""Of a tmpfs of 64 MB: several small ones fit, two large ones do not."""


def data_of(plan_id: str, length_bytes: int) -> bytes:
    return random.Random(plan_id).randbytes(length_bytes)


def manifest_of(plan_id: str, data: bytes, step: int) -> bytes:
    manifest = state_pb2.ParityManifest(
        plan=state_pb2.ParityPlan(
            plan_id=plan_id,
            job=JOB,
            incarnation=1,
            step=step,
            world=2,
            code="cauchy-11d",
            parities=1,
            unit_bytes=UNIT_BYTES,
            members=[state_pb2.PlannedMember(node_id="n1"), state_pb2.PlannedMember(node_id="n2")],
        ),
        unit_digests=digest_units(data, UNIT_BYTES),
    )
    return seal("parity_manifest", manifest.SerializeToString())


def encode(store: ParityMemory, plan_id: str, length_bytes: int, step: int = 1) -> None:
    data = data_of(plan_id, length_bytes)
    with store.reserve(JOB, plan_id, length_bytes) as room:
        room.view[:] = data
        store.publish(JOB, manifest_of(plan_id, data, step))


def used_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def fill(directory: Path, leave_bytes: int) -> Path:
    filler = directory / "filler"
    status = os.statvfs(directory)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave_bytes)
    return filler


def in_a_child(source: str, *arguments: str) -> str:
    """Run a piece of Python; what it printed, if it came to its end."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", source, *arguments],
        env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, (result.returncode, result.stderr)
    return result.stdout.strip()


WRITER = """
import sys
from pathlib import Path
from everstep.proto.errors import OutOfSpace
from everstep.storage.parity_memory import ParityMemory
store = ParityMemory(Path(sys.argv[1]), keep_free_bytes=0)
try:
    with store.reserve("job", "new", int(sys.argv[2])) as room:
        Path(sys.argv[3]).write_bytes(bytes(int(sys.argv[4])))
        room.view[:] = b"x" * len(room.view)
        print("written")
except OutOfSpace as error:
    print(error)
"""


def test_what_was_reserved_can_be_written_when_everything_is_full(small_tmpfs: Path) -> None:
    root = small_tmpfs / "memory"
    store = ParityMemory(root, keep_free_bytes=0)
    encode(store, "old", SMALL)
    status = os.statvfs(small_tmpfs)
    rest = status.f_bavail * status.f_frsize - SMALL - UNIT_BYTES
    # Everything else is taken between the reservation and the first touch.
    said = in_a_child(WRITER, str(root), str(SMALL), str(small_tmpfs / "filler"), str(rest))
    assert said == "written"
    assert store.verify(JOB, "old") == []


def test_a_file_that_grew_can_be_written_too(small_tmpfs: Path) -> None:
    root = small_tmpfs / "memory"
    store = ParityMemory(root, keep_free_bytes=0)
    encode(store, "old", SMALL)
    encode(store, "older", UNIT_BYTES)
    store.delete(JOB, "older")
    status = os.statvfs(small_tmpfs)
    rest = status.f_bavail * status.f_frsize - SMALL
    said = in_a_child(WRITER, str(root), str(SMALL), str(small_tmpfs / "filler"), str(rest))
    assert said == "written"
    assert len(list(root.rglob("*.parity"))) == 2
    assert store.verify(JOB, "old") == []


@pytest.mark.parametrize("pooled", [False, True], ids=["new", "grown"])
def test_parity_that_does_not_fit_costs_nothing(small_tmpfs: Path, pooled: bool) -> None:
    root = small_tmpfs / "memory"
    store = ParityMemory(root, keep_free_bytes=0)
    encode(store, "old", LARGE)
    if pooled:
        encode(store, "gone", UNIT_BYTES)
        store.delete(JOB, "gone")
    before = used_bytes(small_tmpfs)
    said = in_a_child(WRITER, str(root), str(LARGE), str(small_tmpfs / "filler"), "0")
    for fact in ("MB more", "and has", "untouched", "larger /dev/shm"):
        assert fact in said, said
    assert used_bytes(small_tmpfs) == before
    assert not (small_tmpfs / "filler").exists()
    assert store.verify(JOB, "old") == []
    # Once the older one is gone its file is used again, full as the device is.
    store.delete(JOB, "old")
    filler = fill(small_tmpfs, UNIT_BYTES)
    encode(store, "new", LARGE)
    assert store.verify(JOB, "new") == []
    filler.unlink()


def test_a_full_disk_keeps_the_older_parity(small_tmpfs: Path) -> None:
    old, new = data_of("old", SMALL), data_of("new", SMALL)
    with NvmeLevel(small_tmpfs / "nvme") as nvme:
        store = nvme.parity
        store.store(JOB, SnapshotId(1, 1), memoryview(old), manifest_of("old", old, 1))
        filler = fill(small_tmpfs, SMALL - UNIT_BYTES)
        before = used_bytes(small_tmpfs)
        for step in (1, 2):
            said = ""
            try:
                envelope = manifest_of("new", new, step)
                store.store(JOB, SnapshotId(1, step), memoryview(new), envelope)
            except Exception as error:
                said = str(error)
            assert "MB more" in said, said
            assert used_bytes(small_tmpfs) == before
            assert [one.plan.plan_id for one in store.manifests(JOB)] == ["old"]
            assert store.verify(JOB, "old") == []
        filler.unlink()
        store.store(JOB, SnapshotId(1, 1), memoryview(new), manifest_of("new", new, 1))
        assert [one.plan.plan_id for one in store.manifests(JOB)] == ["new"]
        assert store.verify(JOB, "new") == []


STAGER = """
import sys
from pathlib import Path
from everstep.proto.errors import OutOfSpace
from everstep.proto.ids import SnapshotId
from everstep.storage.staging import Staging
staging = Staging(Path(sys.argv[1]), keep_free_bytes=0)
try:
    with staging.create("job", SnapshotId(1, 1), 3, 1 << 30, [range(int(sys.argv[2]))]) as file:
        Path(sys.argv[3]).write_bytes(bytes(int(sys.argv[4])))
        for unit in range(int(sys.argv[2])):
            with file.writable(unit) as view:
                view[:] = b"x" * len(view)
    print("written")
except OutOfSpace as error:
    print(error)
"""


def test_staged_units_can_be_written_when_everything_is_full(small_tmpfs: Path) -> None:
    root = small_tmpfs / "memory"
    status = os.statvfs(small_tmpfs)
    rest = status.f_bavail * status.f_frsize - SMALL - UNIT_BYTES
    units = str(SMALL // UNIT_BYTES)
    assert in_a_child(STAGER, str(root), units, str(small_tmpfs / "filler"), str(rest)) == "written"
    assert "MB more" in in_a_child(STAGER, str(root), "60", str(root / "filler"), "0")
    # What was staged before for the same shard is still there, whole.
    (path,) = root.rglob("*.image")
    with path.open("rb") as file:
        assert file.read(SMALL) == b"x" * SMALL
