"""A state tensor as other libraries hold it: codes over the flattened tensor, and their scales.

Owns the record, its arithmetic, and the way to a codec of this package and back. Promises that
codes are taken over as they are where the format is the same: the same table of values to the bit,
the same block, and blocks that lie within rows. Else the record says why they are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from everstep.client.optim.codecs import Parts, Role, blocks_of, codec_named, rows_of
from everstep.client.optim.codecs.fourbit import packed, unpacked
from everstep.kernels.optimizer_tables import DYNAMIC_SECOND, DYNAMIC_SIGNED, FOURBIT_SIGNED, single

FOURBIT_SECOND = tuple(single(k / 16) for k in range(1, 17))
TABLES: dict[tuple[str, Role], tuple[float, ...]] = {
    ("dynamic", "signed"): DYNAMIC_SIGNED,
    ("dynamic", "second"): DYNAMIC_SECOND,
    ("4bit", "signed"): FOURBIT_SIGNED,
    ("4bit", "second"): FOURBIT_SECOND,
}
"""The values of codes, by codec and role, where other libraries have the same."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """One state tensor in codes.

    Attributes:
        codes: One uint8 for each element, flattened; of FP8 the float8 numbers themselves.
        scales: fp32, one for each `block` codes; the last block may be short.
        block: Codes that share a scale.
        values: What codes stand for, fp32, ascending; None if they are numbers themselves.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: int
    values: torch.Tensor | None

    def decoded(self, shape: Sequence[int]) -> torch.Tensor:
        """The fp32 tensor."""
        if self.values is None:
            numbers = self.codes.float()
        else:
            numbers = self.values.float()[self.codes.long()]
        scales = self.scales.float().repeat_interleave(self.block)[: numbers.numel()]
        return (numbers * scales).reshape(tuple(shape))

    def foreign_to(self, codec: str, role: Role, block: int, shape: Sequence[int]) -> str | None:
        """Why the codes are not those of a codec; None if they are."""
        table = TABLES.get((codec, role))
        if table is None or self.values is None or len(table) != len(self.values):
            return f"other codes than {codec}'s"
        ours = torch.tensor(table, dtype=torch.float32)
        if not torch.equal(self.values.float().cpu(), ours):
            return f"the codes stand for other values than {codec}'s"
        if self.block != block:
            return f"blocks of {self.block}, here of {block}"
        return straddling(shape, block)

    def parts(self, codec: str, shape: Sequence[int]) -> Parts:
        """As the codec's own, which `foreign_to` has found the same."""
        rows, row = rows_of(shape)
        codes = self.codes.reshape(rows, row)
        codes = packed(codes) if codec == "4bit" else codes.reshape(tuple(shape))
        scales = self.scales.float().reshape(rows, blocks_of(row, self.block))
        return Parts(codes.clone(), scales.clone())


def straddling(shape: Sequence[int], block: int) -> str | None:
    """Why blocks over a flattened tensor are not blocks of its rows; None if they are."""
    rows, row = rows_of(shape)
    if rows > 1 and row % block:
        return f"blocks of {block} straddle rows of {row}"
    return None


def from_parts(parts: Parts, codec: str, role: Role, block: int, shape: Sequence[int]) -> Blocks:
    """A codec's codes over the flattened tensor; its blocks must not be padded within."""
    assert parts.scales is not None
    assert straddling(shape, block) is None
    codes = unpacked(parts.codes, rows_of(shape)[1]) if codec == "4bit" else parts.codes
    table = torch.tensor(TABLES[codec, role], dtype=torch.float32, device=codes.device)
    return Blocks(codes.reshape(-1).clone(), parts.scales.reshape(-1).clone(), block, table)


def encoded(values: torch.Tensor, codec: str, role: Role, block: int) -> Blocks:
    """A tensor in codes over all of it, flattened."""
    flat = values.float().reshape(-1)
    parts = codec_named(codec).encode(flat, role, block)
    return from_parts(parts, codec, role, block, flat.shape)
