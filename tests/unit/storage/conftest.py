"""A small file system, and shards and parity to store."""

import ctypes
import functools
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from everstep.kernels.digest import digest_units
from everstep.proto import state_pb2
from everstep.proto.envelope import seal
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.storage.identity import record_digest
from everstep.storage.level import Level
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity import ParityStore
from everstep.storage.parity_memory import ParityMemory

_LAYOUT_BODY = state_pb2.Layout(image_bytes=1).SerializeToString()
LAYOUT_ID = hashlib.blake2b(_LAYOUT_BODY, digest_size=16).hexdigest()


@functools.lru_cache(64)
def random_bytes(seed: str, length: int) -> bytes:
    """Slow to make, and asked for again and again."""
    return random.Random(seed).randbytes(length)


@dataclass(frozen=True)
class Take:
    """A snapshot with random but repeatable images."""

    incarnation: int
    step: int
    sizes: tuple[int, ...] = (3 * UNIT_BYTES + 100, 4096)
    job: str = "job"
    seed: str = ""
    layout: bytes = field(default=seal("layout", _LAYOUT_BODY), repr=False)
    layout_id: str = LAYOUT_ID

    @property
    def id(self) -> SnapshotId:
        return SnapshotId(self.incarnation, self.step)

    def image(self, rank: int) -> bytes:
        seed = f"{self.incarnation} {self.step} {rank}{self.seed}"
        return random_bytes(seed, self.sizes[rank])

    def record(self, rank: int) -> bytes:
        record = state_pb2.Record(
            job=self.job,
            incarnation=self.incarnation,
            step=self.step,
            rank=rank,
            world=len(self.sizes),
            layout_id=LAYOUT_ID,
            image_bytes=self.sizes[rank],
            unit_bytes=UNIT_BYTES,
            unit_digests=digest_units(self.image(rank), UNIT_BYTES),
        )
        return seal("record", record.SerializeToString())

    def commit(self) -> bytes:
        commit = state_pb2.Commit(
            job=self.job,
            incarnation=self.incarnation,
            step=self.step,
            world=len(self.sizes),
            shards=[
                state_pb2.CommittedShard(
                    rank=rank,
                    layout_id=LAYOUT_ID,
                    image_bytes=size,
                    record_digest=record_digest(self.record(rank), "test"),
                )
                for rank, size in enumerate(self.sizes)
            ],
        )
        return seal("commit", commit.SerializeToString())

    def begin_and_store(self, level: Level) -> None:
        level.put_layout(self.job, LAYOUT_ID, self.layout)
        level.begin(self.job, self.id)
        for rank in range(len(self.sizes)):
            level.store(self.job, self.id, rank, memoryview(self.image(rank)), self.record(rank))

    def save(self, level: Level) -> None:
        self.begin_and_store(level)
        level.commit(self.job, self.id, self.commit())

    def assert_whole(self, level: Level) -> None:
        for rank in range(len(self.sizes)):
            with level.open_shard(self.job, self.id, rank) as shard:
                assert bytes(shard.image) == self.image(rank), (self, rank)
                assert shard.record == self.record(rank), (self, rank)
        assert level.layout(self.job, LAYOUT_ID) == self.layout


@dataclass(frozen=True)
class Parity:
    """A member's parity of one plan, random but repeatable."""

    plan_id: str
    incarnation: int = 1
    step: int = 5
    size: int = 3 * UNIT_BYTES + 100
    job: str = "job"

    @property
    def snapshot(self) -> SnapshotId:
        return SnapshotId(self.incarnation, self.step)

    @property
    def data(self) -> bytes:
        return random.Random(f"{self.plan_id} {self.size}").randbytes(self.size)

    @property
    def manifest(self) -> bytes:
        manifest = state_pb2.ParityManifest(
            plan=state_pb2.ParityPlan(
                plan_id=self.plan_id,
                job=self.job,
                incarnation=self.incarnation,
                step=self.step,
                world=2,
                code="cauchy-11d",
                parities=1,
                unit_bytes=UNIT_BYTES,
                members=[state_pb2.PlannedMember(node_id=name) for name in ("n1", "n2")],
            ),
            unit_digests=digest_units(self.data, UNIT_BYTES),
            parity_bytes=self.size,
        )
        return seal("parity_manifest", manifest.SerializeToString(deterministic=True))

    def encode(self, store: ParityMemory) -> None:
        with store.reserve(self.job, self.plan_id, self.size) as room:
            room.view[:] = self.data
            store.publish(self.job, self.manifest)

    def save(self, nvme: NvmeLevel) -> None:
        nvme.parity.store(self.job, self.snapshot, memoryview(self.data), self.manifest)

    def assert_whole(self, store: ParityStore) -> None:
        with store.open(self.job, self.plan_id) as image:
            assert bytes(image.image) == self.data, self
            assert image.record == self.manifest, self
        assert store.verify(self.job, self.plan_id) == [], self


@pytest.fixture
def take() -> type[Take]:
    return Take


@pytest.fixture
def parity() -> type[Parity]:
    return Parity


def _mounter(tmp_path: Path, kind: str, options: str) -> Iterator[Path]:
    target = tmp_path / kind
    target.mkdir()
    library = ctypes.CDLL(None, use_errno=True)
    if library.mount(kind.encode(), bytes(target), kind.encode(), 0, options.encode()):
        pytest.skip(f"cannot mount a {kind}: {os.strerror(ctypes.get_errno())}")
    try:
        yield target
    finally:
        library.umount2(bytes(target), 2)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB."""
    yield from _mounter(tmp_path, "tmpfs", "size=8m,mode=0700")


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that refuses O_DIRECT."""
    yield from _mounter(tmp_path, "ramfs", "mode=0700")


@pytest.fixture
def flip() -> Callable[[Path, int, int], None]:
    """Inverts some bytes of a file."""

    def inverted(path: Path, offset: int, count: int) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            data = file.read(count)
            file.seek(offset)
            file.write(bytes(byte ^ 0xFF for byte in data))

    return inverted
