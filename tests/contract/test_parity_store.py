"""The contract of `everstep.storage.parity.ParityStore`, held against both stores.

A new store joins by adding its factory to `FACTORIES`.
"""

import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.kernels.digest import digest_units
from everstep.proto import state_pb2
from everstep.proto.envelope import seal
from everstep.proto.errors import FormatInvalid, InvalidName
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity_memory import ParityMemory

JOB = "gpt-2.1"
SNAPSHOT = SnapshotId(incarnation=1, step=1234)
SIZES = [0, 1, 4095, 4096, 4097, UNIT_BYTES - 1, UNIT_BYTES, 3 * UNIT_BYTES + 4097, 9 * UNIT_BYTES]


class MemoryStore:
    """Parity in memory, put there as the agent does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = ParityMemory(root, keep_free_bytes=0)

    def put(self, job: str, snapshot: SnapshotId, data: bytes, envelope: bytes) -> None:
        manifest = manifest_in(envelope)
        with self.store.reserve(job, manifest.plan.plan_id, len(data)) as room:
            room.view[:] = data
            self.store.publish(job, envelope)

    def close(self) -> None:
        pass

    def manifest_file(self, plan_id: str) -> Path:
        (path,) = self.root.rglob(f"*-{plan_id}.manifest")
        return path

    def parity_file(self, plan_id: str) -> Path:
        number = self.manifest_file(plan_id).name.partition("-")[0]
        return self.manifest_file(plan_id).with_name(f"{number}.parity")


class NvmeStore:
    """Parity on NVMe, of a node that has no shards."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root = root
        self.level = NvmeLevel(root, **options)
        self.store = self.level.parity

    def put(self, job: str, snapshot: SnapshotId, data: bytes, envelope: bytes) -> None:
        self.store.store(job, snapshot, memoryview(data), envelope)

    def close(self) -> None:
        self.level.close()

    def manifest_file(self, plan_id: str) -> Path:
        return self.parity_file(plan_id).with_name("parity.manifest")

    def parity_file(self, plan_id: str) -> Path:
        (path,) = self.root.rglob(f"parity-{plan_id}")
        return path


FACTORIES: dict[str, Callable[[Path], Any]] = {
    "memory": MemoryStore,
    "nvme": NvmeStore,
    "nvme-buffered": lambda root: NvmeStore(root, direct=False, chunk_bytes=UNIT_BYTES),
}


@pytest.fixture(params=list(FACTORIES))
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Opens the same store again, as a new process would."""
    opened: list[Any] = []

    def open_again() -> Any:
        opened.append(FACTORIES[request.param](tmp_path / "level"))
        return opened[-1]

    yield open_again
    for one in opened:
        one.close()


@pytest.fixture
def place(reopen: Callable[[], Any]) -> Any:
    return reopen()


def data_of(plan_id: str, size: int) -> bytes:
    return random.Random(f"{plan_id} {size}").randbytes(size)


def manifest_of(
    plan_id: str, data: bytes, snapshot: SnapshotId = SNAPSHOT, job: str = JOB, **changed: Any
) -> bytes:
    manifest = state_pb2.ParityManifest(
        plan=state_pb2.ParityPlan(
            plan_id=plan_id,
            job=job,
            incarnation=snapshot.incarnation,
            step=snapshot.step,
            world=2,
            code="cauchy-11d",
            parities=1,
            unit_bytes=changed.pop("unit_bytes", UNIT_BYTES),
            members=[state_pb2.PlannedMember(node_id=name) for name in ("n1", "n2")],
        ),
        unit_digests=digest_units(data, UNIT_BYTES),
        records=[state_pb2.ShardRecord(rank=0, record=b"record")],
        parity_bytes=len(data) if len(data) % UNIT_BYTES else 0,
        encoded_unix_s=1.5,
    )
    for name, value in changed.items():
        setattr(manifest, name, value)
    return seal("parity_manifest", manifest.SerializeToString(deterministic=True))


def manifest_in(envelope: bytes) -> state_pb2.ParityManifest:
    from everstep.storage.parity import parse_manifest

    return parse_manifest(envelope, "test")


def put(
    place: Any, plan_id: str, size: int = 2 * UNIT_BYTES + 5, snapshot: SnapshotId = SNAPSHOT
) -> tuple[bytes, bytes]:
    data = data_of(plan_id, size)
    envelope = manifest_of(plan_id, data, snapshot)
    place.put(JOB, snapshot, data, envelope)
    return data, envelope


def plans(place: Any) -> list[str]:
    return [manifest.plan.plan_id for manifest in place.store.manifests(JOB)]


def later(steps: int) -> SnapshotId:
    return SnapshotId(SNAPSHOT.incarnation, SNAPSHOT.step + steps)


@pytest.mark.parametrize("size", SIZES)
def test_what_was_put_comes_back(reopen: Callable[[], Any], size: int) -> None:
    data, envelope = put(reopen(), "p1", size)
    place = reopen()
    assert place.store.manifests(JOB) == [manifest_in(envelope)]
    with place.store.open(JOB, "p1") as parity:
        assert bytes(parity.image) == data
        assert parity.image.readonly
        assert parity.record == envelope
        assert parity.manifest == manifest_in(envelope)
        with parity.path.open("rb") as file:
            assert os.pread(file.fileno(), size, parity.offset) == data
        assert parity.path.stat().st_mode & 0o777 == 0o600
    assert place.store.verify(JOB, "p1") == []
    assert place.store.problems(JOB) == []


def test_several_plans_by_snapshot(place: Any) -> None:
    put(place, "b", snapshot=later(2))
    put(place, "c", snapshot=SnapshotId(2, 1))
    put(place, "z", snapshot=later(1))
    assert plans(place) == ["z", "b", "c"]
    for plan_id, snapshot in (("z", later(1)), ("b", later(2))):
        with place.store.open(JOB, plan_id) as parity:
            assert bytes(parity.image) == data_of(plan_id, parity.image.nbytes)
            assert parity.manifest.plan.step == snapshot.step


def test_the_same_plan_again(reopen: Callable[[], Any]) -> None:
    place = reopen()
    put(place, "p1")
    data, _ = put(place, "p1", 5000)
    assert plans(reopen()) == ["p1"]
    with place.store.open(JOB, "p1") as parity:
        assert bytes(parity.image) == data
    assert place.store.verify(JOB, "p1") == []


def test_deleted_is_gone(reopen: Callable[[], Any]) -> None:
    place = reopen()
    put(place, "p1")
    put(place, "p2", snapshot=later(1))
    place.store.delete(JOB, "p1")
    place.store.delete(JOB, "p1")
    place.store.delete(JOB, "never")
    for one in (place, reopen()):
        assert plans(one) == ["p2"]
        with pytest.raises(FormatInvalid):
            one.store.open(JOB, "p1")
        assert one.store.verify(JOB, "p2") == []
        assert one.store.problems(JOB) == []


def test_nothing_is_there(place: Any) -> None:
    store = place.store
    assert (store.manifests(JOB), store.problems(JOB), store.sweep(JOB)) == ([], [], [])
    store.delete(JOB, "p1")
    for read in (store.open, store.verify):
        with pytest.raises(FormatInvalid, match="p1"):
            read(JOB, "p1")
    assert not place.root.exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 129])
def test_names_are_checked(place: Any, name: str) -> None:
    put(place, "p1")
    for call in (place.store.manifests, place.store.sweep, place.store.problems):
        with pytest.raises(InvalidName):
            call(name)
    for call in (place.store.open, place.store.verify, place.store.delete):
        with pytest.raises(InvalidName):
            call(name, "p1")
        with pytest.raises(InvalidName):
            call(JOB, name)
    with pytest.raises((FormatInvalid, InvalidName)):
        place.put(JOB, SNAPSHOT, b"", manifest_of(name, b""))
    with pytest.raises((FormatInvalid, InvalidName)):
        place.put(name, SNAPSHOT, b"", manifest_of("p2", b"", job=name))
    assert plans(place) == ["p1"]


def test_flipped_bits_are_found(place: Any) -> None:
    data, _ = put(place, "p1", 3 * UNIT_BYTES + 100)
    with place.parity_file("p1").open("r+b") as file:
        for offset in (UNIT_BYTES + 7, len(data) - 1):
            file.seek(offset)
            file.write(bytes([data[offset] ^ 1]))
    assert place.store.verify(JOB, "p1") == [1, 3]
    # The rest of it can still be used, so it is still listed.
    assert plans(place) == ["p1"]


@pytest.mark.parametrize("size", [3 * UNIT_BYTES, UNIT_BYTES + 5000, 4097])
def test_cut_short(reopen: Callable[[], Any], size: int) -> None:
    place = reopen()
    put(place, "p1", size)
    put(place, "p2", snapshot=later(1))
    path = place.parity_file("p1")
    os.truncate(path, size - 4097 if size > 4097 else 1)
    assert plans(place) == ["p2"]
    for read in (place.store.open, place.store.verify):
        with pytest.raises(FormatInvalid, match="bytes"):
            read(JOB, "p1")
    assert [problem.where for problem in place.store.problems(JOB)] == [str(path)]
    assert place.store.verify(JOB, "p2") == []
    place.store.delete(JOB, "p1")
    assert reopen().store.problems(JOB) == []


def test_torn(place: Any) -> None:
    """As long as it was, but a part of it was never written."""
    data, _ = put(place, "p1", 4 * UNIT_BYTES)
    with place.parity_file("p1").open("r+b") as file:
        file.seek(2 * UNIT_BYTES + 512)
        file.write(bytes(len(data) - 2 * UNIT_BYTES - 512))
    assert place.store.verify(JOB, "p1") == [2, 3]


def test_the_parity_is_missing(place: Any) -> None:
    put(place, "p1")
    put(place, "p2", snapshot=later(1))
    place.parity_file("p1").unlink()
    assert plans(place) == ["p2"]
    with pytest.raises(FormatInvalid):
        place.store.open(JOB, "p1")
    assert len(place.store.problems(JOB)) == 1
    # What comes next does not take the name of what is missing.
    put(place, "p3", snapshot=later(2))
    assert plans(place) == ["p2", "p3"]


def test_the_manifest_is_missing(reopen: Callable[[], Any]) -> None:
    place = reopen()
    put(place, "p1")
    put(place, "p2", snapshot=later(1))
    place.manifest_file("p1").unlink()
    assert plans(place) == ["p2"]
    with pytest.raises(FormatInvalid):
        place.store.open(JOB, "p1")
    assert place.store.problems(JOB) == []
    place = reopen()
    place.store.sweep(JOB)
    assert plans(place) == ["p2"]
    assert place.store.verify(JOB, "p2") == []


def test_swapped_parity_is_found(place: Any) -> None:
    put(place, "p1")
    put(place, "p2", snapshot=later(1))
    one, other = place.parity_file("p1"), place.parity_file("p2")
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    assert place.store.verify(JOB, "p1") == [0, 1, 2]
    assert place.store.verify(JOB, "p2") == [0, 1, 2]


def test_swapped_manifests_are_refused(place: Any) -> None:
    put(place, "p1")
    put(place, "p2", snapshot=later(1))
    one, other = place.manifest_file("p1"), place.manifest_file("p2")
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert plans(place) == []
    for plan_id in ("p1", "p2"):
        with pytest.raises(FormatInvalid):
            place.store.open(JOB, plan_id)
    assert len(place.store.problems(JOB)) == 2


def test_another_jobs_manifest_is_refused(place: Any) -> None:
    put(place, "p1")
    data = data_of("p1", 2 * UNIT_BYTES + 5)
    place.manifest_file("p1").write_bytes(manifest_of("p1", data, job="other"))
    assert plans(place) == []
    (problem,) = place.store.problems(JOB)
    assert "other" in problem.reason


def future(envelope: bytes) -> bytes:
    return envelope[:4] + struct.pack("<H", 2) + envelope[6:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "another kind": lambda data: seal("commit", b""),
    "not a message": lambda data: seal("parity_manifest", b"\xff" * 40),
    "future": lambda data: future(
        seal("parity_manifest", manifest_in(data).SerializeToString(deterministic=True))
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_manifest(place: Any, damage: str) -> None:
    put(place, "p1")
    put(place, "p2", snapshot=later(1))
    path = place.manifest_file("p1")
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert plans(place) == ["p2"]
    with pytest.raises(FormatInvalid):
        place.store.verify(JOB, "p1")
    (problem,) = place.store.problems(JOB)
    assert problem.where == str(path)
    if damage == "future":
        assert "format 2" in problem.reason
    # Not a leftover of an interrupted write, so not ours to throw away.
    place.store.sweep(JOB)
    assert path.exists()
    put(place, "p3", snapshot=later(2))
    assert plans(place) == ["p2", "p3"]


@pytest.mark.parametrize(
    "changed",
    [
        {"unit_digests": bytes(16)},
        {"unit_digests": bytes(40)},
        {"parity_bytes": 5},
        {"parity_bytes": 1 << 50},
        {"member": 2},
        {"unit_bytes": 4096},
        {"job": "other"},
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_refused(place: Any, changed: dict[str, Any]) -> None:
    data, _ = put(place, "p1")
    with pytest.raises(FormatInvalid):
        place.put(JOB, SNAPSHOT, data, manifest_of("p2", data, **changed))
    assert plans(place) == ["p1"]
    assert place.store.problems(JOB) == []
    assert place.store.verify(JOB, "p1") == []


def test_half_written_files_are_swept(reopen: Callable[[], Any]) -> None:
    place = reopen()
    put(place, "p1")
    folder = place.manifest_file("p1").parent
    for name in (".parity.manifest.1-1.partial", ".parity-p9.1-1.partial"):
        (folder / name).write_bytes(b"half")
    place = reopen()
    assert place.store.sweep(JOB)
    assert place.store.sweep(JOB) == []
    assert not list(place.root.rglob("*.partial"))
    assert plans(place) == ["p1"]
    assert place.store.verify(JOB, "p1") == []


def test_links_are_not_followed(place: Any, tmp_path: Path) -> None:
    put(place, "p1")
    path = place.parity_file("p1")
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(FormatInvalid):
        place.store.open(JOB, "p1")
