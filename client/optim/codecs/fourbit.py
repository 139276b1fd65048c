"""4-bit codes, two a byte: arXiv 2309.01507 (thu-ml/low-bit-optimizers).

Signed states take the paper's dynamic exponent map, second moments its linear map without zero,
k / 16 for k = 1..16, both with blocks of 128: the fused variant that the authors ship
("2nd_moment_group_128"; the rank-1 scales of the paper are `fourbit_rank1`). Different: blocks lie
within rows and the low half of a byte is the even element.

Arithmetic, signed, s = max|x|: ``z = x * r``, r = 1 / s (0 if s < 2^-126); the code is the number
of FOURBIT_SIGNED's thresholds that are less than z. Decode: ``value[code] * s``.
Second, s = max v: ``k = clamp(rint(v * (16 / s)), 1, 16)`` (16 if s < 2^-120); the code is k - 1.
Decode: ``float(code + 1) * (s * 0.0625)``.
Codes are uint8 [rows, ceil(row / 2)]; the upper half of a row's odd last byte is 0.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from everstep.client.optim.codecs.codec import (
    Codec,
    Form,
    Parts,
    Role,
    finite_or_zero,
    in_blocks,
    in_table,
    largest,
    out_of_blocks,
    quotient,
    rows_of,
    scales_form,
)
from everstep.kernels.optimizer_tables import FOURBIT_SIGNED, thresholds

_THRESHOLDS = thresholds(FOURBIT_SIGNED)
_LEAST_SECOND = 2.0**-120


class FourBit(Codec):
    """Two codes a byte; see the module."""

    name = "4bit"
    block = 128
    kernel_names: ClassVar[dict[Role, str]] = {
        "signed": "fourbit_signed",
        "second": "fourbit_second",
    }

    def _encode(self, values: torch.Tensor, role: Role, block: int, shape: torch.Size) -> Parts:
        blocks = in_blocks(values, block)
        scales = largest(blocks)
        if role == "second":
            codes = counted(blocks, scales.unsqueeze(-1))
        else:
            codes = _signed(blocks, scales)
        codes = finite_or_zero(codes.to(torch.uint8), scales)
        return Parts(packed(out_of_blocks(codes, values.shape[1])), scales)

    def _decode(self, parts: Parts, role: Role, block: int, rows: int, row: int) -> torch.Tensor:
        assert parts.scales is not None
        codes = in_blocks(unpacked(parts.codes, row), block)
        scales = parts.scales.unsqueeze(-1)
        if role == "second":
            return out_of_blocks((codes.float() + 1.0) * (scales * 0.0625), row)
        return out_of_blocks(in_table(FOURBIT_SIGNED, codes)[codes.long()] * scales, row)

    def forms(self, shape: Sequence[int], role: Role, block: int) -> dict[str, Form]:
        """Shape and dtype of each part."""
        rows, row = rows_of(shape)
        return {
            "codes": Form((rows, -(-row // 2)), torch.uint8),
            "scales": scales_form(shape, block),
        }


def packed(codes: torch.Tensor) -> torch.Tensor:
    """[rows, row] codes below 16 as [rows, ceil(row / 2)] bytes."""
    pairs = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return (pairs[:, 0::2] | (pairs[:, 1::2] << 4)).contiguous()


def unpacked(codes: torch.Tensor, row: int) -> torch.Tensor:
    """What `packed` has packed."""
    pairs = torch.stack([codes & 15, codes >> 4], -1)
    return pairs.reshape(codes.shape[0], 2 * codes.shape[1])[:, :row]


def _signed(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    z = blocks * quotient(1.0, scales).unsqueeze(-1)
    return torch.bucketize(z, in_table(_THRESHOLDS, z))


def counted(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes of second moments: sixteenths of their scales, less one."""
    k = (values * quotient(16.0, scales, _LEAST_SECOND)).round().clamp(1.0, 16.0)
    k = torch.where(scales >= _LEAST_SECOND, k, torch.full_like(k, 16.0))
    return k.nan_to_num(1.0) - 1.0
