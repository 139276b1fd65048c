"""The FP8 codec with expanded range as device code: COAT, arXiv 2410.19313.

Owns `fp8_encode`, `fp8_decode` and what a block has in common; `client/optim/codecs/fp8.py` states
the arithmetic, operation by operation, and gives the same bits. Needs a launch with
``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from everstep.kernels import optimizer_tables

_L0, _L1, _L2, _L3, _L4, _L5 = (tl.constexpr(c) for c in optimizer_tables.FP8_LOG2)
_E0, _E1, _E2, _E3 = (tl.constexpr(c) for c in optimizer_tables.FP8_EXP2)
_RANGE = tl.constexpr(optimizer_tables.FP8_RANGE)
_LEAST = tl.constexpr(2.0**-126)


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
def _exp2(w):
    """2 to powers that are at most 0."""
    w = tl.maximum(w, -126.0)
    whole = tl.floor(w)
    f = w - whole
    q = f * _E3 + _E2
    q = q * f + _E1
    q = q * f + _E0
    q = q * f + 1.0
    return q * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _relative(y, inverse):
    """The logarithm of a magnitude, as a part of its block's largest."""
    return _log2(tl.minimum(tl.maximum(y * inverse, _LEAST), 1.0))


@triton.jit
def fp8_inverse(most):
    """1 over the largest magnitude of a block, 0 if that is too small or NaN."""
    return tl.where(most >= _LEAST, tl.div_rn(tl.full(most.shape, 1.0, tl.float32), most), 0.0)


@triton.jit
def fp8_sixteenths(most, least):
    """Sixteen times the power that stretches a block."""
    least = tl.where(most == most, least, 0.0)
    spread = tl.maximum(-_relative(least, fp8_inverse(most)), 1.0)
    sixteenths = tl.floor(tl.div_rn(tl.full(spread.shape, _RANGE, tl.float32), spread))
    return tl.minimum(tl.maximum(sixteenths, 1.0), 256.0)


@triton.jit
def fp8_encode(x, inverse, sixteenths, SECOND: tl.constexpr):
    """Codes of finite values.

    Args:
        x: The values.
        inverse: Of each one's block.
        sixteenths: Of each one's block.
        SECOND: Whether they are never negative.
    """
    magnitude = tl.abs(x)
    power = (_relative(magnitude, inverse) * sixteenths) * 0.0625
    y = 448.0 * _exp2(power)
    bits = y.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # The sum with 1.5 * 2**23 has the rounded number in its low bits.
    small = (y * 512.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    code = tl.minimum(tl.where(y >= 0.015625, normal, small), 126)
    code = tl.where(inverse > 0.0, code, 0)
    if SECOND:
        code = tl.maximum(code, 1)
    code = tl.where(magnitude == 0.0, 0, code)
    if not SECOND:
        code = tl.where((x < 0.0) & (code > 0), code + 128, code)
    return code


@triton.jit
def fp8_decode(code, most, root):
    """Values of codes.

    Args:
        code: The codes.
        most: The largest magnitude of each one's block.
        root: 16 / `fp8_sixteenths` of each one's block.
    """
    code = code.to(tl.int32)
    m = code & 127
    normal = ((m << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(m >= 8, normal, m.to(tl.float32) * 0.001953125)
    logarithm = _log2(tl.maximum(value, 0.001953125) * (1 / 448))
    x = most * tl.where(m == 0, 0.0, _exp2(logarithm * root))
    return tl.where(code >= 128, -x, x)
