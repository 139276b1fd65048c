"""Shards of a few tensors, as files."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record
from everstep.snapshot.capture import Capture
from everstep.snapshot.capture_plan import CapturePlan, dtype_name, value_bytes
from everstep.snapshot.layout import LeafSpec, Part, pack
from everstep.snapshot.reading import Shard
from everstep.snapshot.replicas import share
from everstep.snapshot.restore import Need

Tensors = dict[str, torch.Tensor]


def needs(names: Iterable[str], devices: Mapping[str, torch.device] | None = None) -> list[Need]:
    return [Need(name, device=(devices or {}).get(name)) for name in names]


def bits(tensor: torch.Tensor) -> bytes:
    return value_bytes(tensor).numpy().tobytes()


class Folder:
    """Writes shards as files, each at an offset as in an arena."""

    def __init__(self, path: Path, level: str) -> None:
        self.path = path
        self.level = level

    def shard(
        self,
        tensors: Tensors,
        rank: int = 0,
        world: int = 1,
        replicated: tuple[str, ...] = (),
        aliases: Mapping[str, str] | None = None,
    ) -> Shard:
        shares = share(
            [(n, tensors[n].nbytes, tensors[n].itemsize) for n in replicated], rank, world
        )
        specs = [
            LeafSpec(name, dtype_name(t.dtype), tuple(t.shape), *shares.get(name, (0, t.nbytes)),
                     name in shares)
            for name, t in tensors.items()
        ]  # fmt: skip
        layout = pack([Part("t", "tree", "builtins.dict")], specs, aliases or {}, {})
        image = bytearray(layout.image_bytes)
        capture = Capture(CapturePlan(layout, tensors, frozenset()), memoryview(image), 0)
        capture.begin()
        capture.finish(10)
        offset = 3 * 4096
        path = self.path / f"rank-{rank}"
        with path.open("wb") as file:
            file.write(b"\x11" * offset)
            file.write(image)
        record = Record(
            rank=rank,
            world=world,
            image_bytes=len(image),
            unit_bytes=UNIT_BYTES,
            unit_digests=bytes(capture.digests),
        )
        return Shard(rank, str(path), offset, layout, record, self.level)


def some() -> Tensors:
    """Of many dtypes and sizes, for nobody to change."""
    return dict(_some())


@functools.cache
def _some() -> Tensors:
    torch.manual_seed(1)
    return {
        "t/large": torch.randn(40 * UNIT_BYTES // 4 + 3),
        "t/odd": torch.randn(7, 5, dtype=torch.float64),
        "t/half": torch.randn(1001).half(),
        "t/empty": torch.empty(3, 0),
        "t/scalar": torch.tensor(True),
    }


def flip(shard: Shard, at: int) -> None:
    with Path(shard.path).open("r+b") as file:
        file.seek(shard.offset + at)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
