"""Two steps of two ranks in the levels, and what a verb said, for the tests of the CLI."""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.kernels.digest import digest_units
from everstep.proto.envelope import seal
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.proto.state_pb2 import Commit, CommittedShard, Record, Value
from everstep.snapshot.layout import Layout, LeafSpec, Part, encode, pack
from everstep.snapshot.record import record_digest, seal_record
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel

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
        self.store_ranks(level, range(WORLD))

    def store_ranks(self, level: MemoryLevel | NvmeLevel, ranks: Iterable[int]) -> None:
        """Only these: the others are on other nodes."""
        for step in self.steps:
            snapshot = SnapshotId(1, step)
            commit = Commit(
                job="gpt", incarnation=1, step=step, world=WORLD, committed_unix_s=1.8e9
            )
            level.begin("gpt", snapshot)
            for rank in ranks:
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


Cli = Callable[..., Outcome]
