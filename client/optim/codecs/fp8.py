"""FP8 (E4M3) codes whose blocks are stretched over the whole range: COAT, arXiv 2410.19313.

The authors (NVlabs/COAT, coat/optimizer) store three numbers a block: g = sqrt(M mu), k and a
scale, for M = max|x| and mu = min nonzero |x|. All follow from (M, mu), which are stored here, and
their code = e4m3((|x| / g)^k / ((M / g)^k / 448)) is 448 (|x| / M)^k, which is computed here. Kept
from them: blocks of 128, k = floor(16 log2(448^2 / 2) / log2(M / mu)) / 16, E4M3 for both moments.
Different: k is at most 16 (theirs is infinite in a block of one magnitude), zeros have the code 0
and keep it, a second moment that is not zero never gets it, and blocks lie within rows.

The arithmetic, each line one fp32 operation to nearest even:

log2_of(z), for a normal z > 0: ``e = float((bits(z) >> 23) - 127)``;
``t = float_of_bits((bits(z) & 0x7fffff) | 0x3f800000) - 1``; then Horner with FP8_LOG2 c0..c5::

    q = c5;  q = q * t;  q = q + c4;  q = q * t;  q = q + c3;  ...  q = q * t;  q = q + c0
    log2_of = e + t * q

exp2_of(w), for w <= 0: ``w = max(w, -126)``; ``i = floor(w)``; ``f = w - i``; Horner with FP8_EXP2
d0..d3: ``q = d3; q = q * f; q = q + d2; ... q = q * f; q = q + d0``; ``q = q * f; q = q + 1``;
``exp2_of = q * float_of_bits((int(i) + 127) << 23)``.

Of a block: bits = max over the bit patterns of |x|, M = that as fp32. If bits >= 0x7f800000: M = mu
= NaN (0x7fc00000), all codes 0. mu = the least nonzero pattern of |x| as fp32, 0 if there is none.
Stored are scales[row, block] = (M, mu). ``r = M >= 2^-126 ? 1 / M : 0``, and for any y:
``relative(y) = log2_of(min(max(y * r, 2^-126), 1))``.

exponent, from (M, mu): ``spread = max(-relative(mu), 1)``; ``k16 = floor(FP8_RANGE / spread)``;
``k16 = min(max(k16, 1), 256)`` (1 <= spread <= 126, so 2 <= k16). A block of zeros has M = mu = 0.

Encode x: ``w = (relative(|x|) * k16) * 0.0625``; ``y = 448 * exp2_of(w)``; to E4M3, nearest even:
if y >= 2^-6: ``b = bits(y)``; ``b = b + 0x7ffff + ((b >> 20) & 1)``; ``c = (b >> 20) - 960``; else
``c = int(rint(y * 512))``. c = min(c, 126). Second: c = max(c, 1). If x == 0 or M < 2^-126: c = 0
(second, x > 0 and M < 2^-126: c = 1). Signed: if x < 0 and c > 0: c = c + 128.

Decode c: ``m = c & 127``; ``value = m >= 8 ? float_of_bits((m << 20) + (120 << 23)) :
float(m) * 2^-9``; ``l = log2_of(max(value, 2^-9) * float32(1 / 448))``;
``n = 16 / k16`` (once a block, a division); ``d = exp2_of(l * n)``; if m == 0: d = 0;
``x = M * d``; if c >= 128: x = -x.
With M = NaN every element decodes to NaN (NaN * 0 is NaN): whatever k16 is then does not matter, as
long as d is finite. Reference and kernels take mu as 0 there, so that k16 is 2.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from everstep.client.optim.codecs.codec import (
    SMALLEST_NORMAL,
    Codec,
    Form,
    Parts,
    Role,
    finite_or_zero,
    in_blocks,
    largest,
    out_of_blocks,
    quotient,
    scales_form,
)
from everstep.kernels.optimizer_tables import FP8_EXP2, FP8_LOG2, FP8_RANGE, single

_LARGEST = 448.0
_LARGEST_CODE = 126
_SMALLEST_NORMAL_CODED = 2.0**-6
_SMALLEST_CODED = 2.0**-9
_MOST_SIXTEENTHS = 256.0
_NO_PATTERN = 0x7FFFFFFF


class Fp8(Codec):
    """E4M3 with COAT's range expansion; see the module."""

    name = "fp8"
    block = 128
    kernel_names: ClassVar[dict[Role, str]] = {"signed": "fp8_signed", "second": "fp8_second"}

    def _encode(self, values: torch.Tensor, role: Role, block: int, shape: torch.Size) -> Parts:
        blocks = in_blocks(values, block)
        scales = torch.stack([largest(blocks), _least(blocks)], -1)
        most, least = scales.unbind(-1)
        scales = torch.where(most.isnan().unsqueeze(-1), torch.full_like(scales, torch.nan), scales)
        magnitudes = blocks.abs()
        inverse = quotient(1.0, most)
        sixteenths = _sixteenths(most, least).unsqueeze(-1)
        power = (_relative(magnitudes, inverse.unsqueeze(-1)) * sixteenths) * 0.0625
        codes = _to_e4m3(exp2_of(power) * _LARGEST)
        codes = torch.where((most < SMALLEST_NORMAL).unsqueeze(-1), torch.zeros_like(codes), codes)
        if role == "second":
            codes = codes.clamp(min=1)
        codes = torch.where(magnitudes == 0, torch.zeros_like(codes), codes)
        if role != "second":
            codes = torch.where((blocks < 0) & (codes > 0), codes + 128, codes)
        codes = finite_or_zero(codes.to(torch.uint8), most)
        return Parts(out_of_blocks(codes, values.shape[1]).reshape(shape), scales)

    def _decode(self, parts: Parts, role: Role, block: int, rows: int, row: int) -> torch.Tensor:
        assert parts.scales is not None
        codes = in_blocks(parts.codes.reshape(rows, row), block).int()
        most, least = parts.scales.unbind(-1)
        magnitude = codes & 127
        normal = ((magnitude << 20) + (120 << 23)).view(torch.float32)
        value = torch.where(magnitude >= 8, normal, magnitude.float() * _SMALLEST_CODED)
        logarithm = log2_of(value.clamp(min=_SMALLEST_CODED) * single(1 / _LARGEST))
        sixteenths = _sixteenths(most, least)
        root = torch.div(torch.full_like(sixteenths, 16.0), sixteenths).unsqueeze(-1)
        relative = exp2_of(logarithm * root)
        relative = torch.where(magnitude == 0, torch.zeros_like(relative), relative)
        values = most.unsqueeze(-1) * relative
        return out_of_blocks(torch.where(codes >= 128, -values, values), row)

    def forms(self, shape: Sequence[int], role: Role, block: int) -> dict[str, Form]:
        """Shape and dtype of each part."""
        return {
            "codes": Form(tuple(shape), torch.uint8),
            "scales": scales_form(shape, block, each=2),
        }


def log2_of(values: torch.Tensor) -> torch.Tensor:
    """log2 of normal positive numbers, by the module's polynomial."""
    bits = values.view(torch.int32)
    exponent = ((bits >> 23) - 127).float()
    t = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1.0
    q = torch.full_like(t, FP8_LOG2[-1])
    for coefficient in reversed(FP8_LOG2[:-1]):
        q = q * t
        q = q + coefficient
    return exponent + t * q


def exp2_of(powers: torch.Tensor) -> torch.Tensor:
    """2 to powers that are at most 0, by the module's polynomial; at least 2^-126."""
    powers = powers.clamp(min=-126.0)
    whole = powers.floor()
    f = powers - whole
    q = torch.full_like(f, FP8_EXP2[-1])
    for coefficient in (*reversed(FP8_EXP2[:-1]), 1.0):
        q = q * f
        q = q + coefficient
    return q * ((whole.int() + 127) << 23).view(torch.float32)


def _least(blocks: torch.Tensor) -> torch.Tensor:
    """Each block's smallest magnitude that is not zero; 0 if there is none."""
    bits = blocks.abs().view(torch.int32)
    bits = torch.where(bits == 0, torch.full_like(bits, _NO_PATTERN), bits).amin(-1)
    return torch.where(bits == _NO_PATTERN, torch.zeros_like(bits), bits).view(torch.float32)


def _relative(magnitudes: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    return log2_of((magnitudes * inverse).nan_to_num(0.0).clamp(SMALLEST_NORMAL, 1.0))


def _sixteenths(most: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Sixteen times the power that stretches a block, a whole number."""
    least = torch.where(most.isnan(), torch.zeros_like(least), least)
    spread = (-_relative(least, quotient(1.0, most))).clamp(min=1.0)
    sixteenths = torch.div(torch.full_like(spread, FP8_RANGE), spread).floor()
    return sixteenths.clamp(1.0, _MOST_SIXTEENTHS)


def _to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Codes of numbers from 0 to 448, to nearest even, as int32."""
    bits = values.view(torch.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (values * 512.0).round().int()
    return torch.where(values >= _SMALLEST_NORMAL_CODED, normal, small).clamp(max=_LARGEST_CODE)
