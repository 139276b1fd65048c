"""The FP8 codec with expanded range as device code: COAT, arXiv 2410.19313.

Owns `fp8_encode`, `fp8_decode` and what a block has in common; `client/optim/codecs/fp8.py` states
the arithmetic, operation by operation, and gives the same bits. Needs a launch with
``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from everstep.kernels import optimizer_lookups, optimizer_tables
from everstep.kernels.optimizer_words_triton import look_up, look_up_pair, near_log2

_L0, _L1, _L2, _L3, _L4, _L5 = (tl.constexpr(c) for c in optimizer_tables.FP8_LOG2)
_LEAST = tl.constexpr(2.0**-126)
_ROUNDER = tl.constexpr(12582912.0)
_STRETCHES = tl.constexpr(optimizer_lookups.FP8_STRETCHES)
_LEAST_POWER = tl.constexpr(1.0 - optimizer_lookups.FP8_STRETCHES)
_CODES = tl.constexpr(optimizer_lookups.FP8_CODES)
_POWERS = tl.constexpr(optimizer_lookups.FP8_POWERS)
_SHIFT = tl.constexpr(optimizer_lookups.FP8_SPREAD_SHIFT)
_FIRST_SPREAD = tl.constexpr(optimizer_lookups.FP8_FIRST_SPREAD)
_VALUES = tl.constexpr(optimizer_lookups.FP8_VALUES)


@triton.jit
def _log2(z):
    """The logarithm of normal positive numbers."""
    bits = z.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    t = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    q = t * _L5 + _L4
    q = q * t + _L3
    q = q * t + _L2
    q = q * t + _L1
    q = q * t + _L0
    return exponent + t * q


@triton.jit
def fp8_inverse(most):
    """1 over the largest magnitude of a block, 0 if that is too small or NaN."""
    return tl.where(most >= _LEAST, tl.div_rn(tl.full(most.shape, 1.0, tl.float32), most), 0.0)


@triton.jit
def fp8_sixteenths(most, least, maps):
    """Sixteen times the power that stretches a block."""
    least = tl.where(most == most, least, 0.0)
    part = tl.minimum(tl.maximum(least * fp8_inverse(most), _LEAST), 1.0)
    spread = tl.maximum(-near_log2(part), 1.0)
    place = (spread.to(tl.int32, bitcast=True) >> _SHIFT) - _FIRST_SPREAD
    limit, power = look_up_pair(maps + _POWERS, place)
    return power.to(tl.float32, bitcast=True) + tl.where(part >= limit, 1.0, 0.0)


@triton.jit
def fp8_encode(x, inverse, sixteenths, maps, SECOND: tl.constexpr):
    """Codes of finite values.

    Args:
        x: The values.
        inverse: Of each one's block; where it is 0, `sixteenths` is 256, and codes are the least.
        sixteenths: Of each one's block.
        maps: `optimizer_lookups.table`.
        SECOND: Whether they are never negative.
    """
    magnitude = tl.abs(x)
    # What rounding lifts above 1 has the greatest code all the same.
    logarithm = _log2(tl.maximum(magnitude * inverse, _LEAST))
    power = tl.maximum(logarithm * sixteenths, _LEAST_POWER)
    # The sum with 1.5 * 2**23 has the rounded number in its low bits.
    stretch = (-power + _ROUNDER).to(tl.int32, bitcast=True) & (_STRETCHES - 1)
    limit, first = look_up_pair(maps + _CODES, stretch)
    code = first + (power >= limit).to(tl.int32)
    if SECOND:
        code = tl.maximum(code, 1)
    code = tl.where(magnitude == 0.0, 0, code)
    if not SECOND:
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        code = tl.where(code > 0, code | sign, 0)
    return code


@triton.jit
def fp8_decode(code, most, sixteenths, maps):
    """Values of codes.

    Args:
        code: The codes.
        most: The largest magnitude of each one's block.
        sixteenths: Of each one's block, int32.
        maps: `optimizer_lookups.table`.
    """
    return most * look_up(maps + _VALUES, sixteenths * 256 + code.to(tl.int32))
