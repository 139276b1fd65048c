"""Shards of several ranks as files, made by hand, for the tests of export."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from everstep.kernels.digest import digest_units
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record, Value
from everstep.snapshot.layout import Block, LeafSpec, Part, pack
from everstep.snapshot.reading import Shard

PARTS = (Part("model", "module", "torch.nn.Linear"), Part("own", "tree", "dict", per_rank=True))


def as_bytes(tensor: torch.Tensor) -> bytes:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Rank:
    """What one rank captured.

    Attributes:
        whole: Tensors of its own.
        blocks: Global shape, offset and tensor of those that it has a box of.
        ranges: Tensor, first and last byte of replicas that it holds a range of.
    """

    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    blocks: Mapping[str, tuple[Sequence[int], Sequence[int], torch.Tensor]] = field(
        default_factory=dict
    )
    ranges: Mapping[str, tuple[torch.Tensor, int, int]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[Part] = PARTS

    def _specs(self) -> dict[str, tuple[LeafSpec, bytes]]:
        found = {}
        for name, tensor in self.whole.items():
            shape, dtype = tuple(tensor.shape), _dtype(tensor)
            found[name] = LeafSpec(name, dtype, shape, 0, tensor.nbytes), as_bytes(tensor)
        for name, (shape, offset, tensor) in self.blocks.items():
            block = Block(name, tuple(shape), tuple(offset))
            own = tuple(tensor.shape)
            spec = LeafSpec(name, _dtype(tensor), own, 0, tensor.nbytes, block=block)
            found[name] = spec, as_bytes(tensor)
        for name, (tensor, start, stop) in self.ranges.items():
            shape, dtype = tuple(tensor.shape), _dtype(tensor)
            spec = LeafSpec(name, dtype, shape, start, stop, replicated=True)
            found[name] = spec, as_bytes(tensor)[start:stop]
        return found

    def shard(self, directory: Path, rank: int, world: int) -> Shard:
        specs = self._specs()
        layout = pack(self.parts, [spec for spec, _ in specs.values()], self.aliases, {})
        image = bytearray(layout.image_bytes)
        image[: len(layout.header)] = layout.header
        for leaf in layout.leaves:
            image[leaf.offset : leaf.offset + leaf.held_bytes] = specs[leaf.name][1]
        path = directory / f"rank-{rank}"
        path.write_bytes(b"\x11" * 4096 + image)
        record = Record(
            job="gpt",
            step=7,
            rank=rank,
            world=world,
            incarnation=1,
            layout_id=layout.layout_id,
            image_bytes=len(image),
            unit_bytes=UNIT_BYTES,
            unit_digests=digest_units(bytes(image), UNIT_BYTES),
            values=[Value(path=path_, json=text) for path_, text in self.values.items()],
        )
        return Shard(rank, str(path), 4096, layout, record)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def located(directory: Path, *ranks: Rank) -> dict[int, Shard]:
    directory.mkdir(exist_ok=True)
    return {rank: one.shard(directory, rank, len(ranks)) for rank, one in enumerate(ranks)}


def flip(shard: Shard, at: int) -> None:
    """Change one byte of an image."""
    with Path(shard.path).open("r+b") as file:
        file.seek(shard.offset + at)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
