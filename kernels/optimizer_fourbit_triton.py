"""The signed 4-bit codec as device code: arXiv 2309.01507's dynamic exponent map.

Owns `fourbit_encode`. The thresholds are the same on both sides of zero, but for the last one: a
code is found by its distance from zero's, with a few selections among constants.
"""

import numpy
import triton
import triton.language as tl

from everstep.kernels import optimizer_tables

_LIMITS = optimizer_tables.thresholds(optimizer_tables.FOURBIT_SIGNED)
assert all(_LIMITS[6 - i] == -_LIMITS[7 + i] for i in range(7))
_BITS = [int.from_bytes(numpy.float32(limit).tobytes(), "little") for limit in _LIMITS[7:]]
_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7 = (tl.constexpr(bits) for bits in _BITS)


@triton.jit
def fourbit_encode(z):
    """How many thresholds lie below each value, as int32."""
    bits = z.to(tl.int32, bitcast=True)
    negative = bits < 0
    # A threshold counts below zero when it is reached, above when it is passed.
    bits = (bits & 0x7FFFFFFF) + negative.to(tl.int32)
    third = bits > _T3
    second = bits > tl.where(third, _T5, _T1)
    limit = tl.where(third, tl.where(second, _T6, _T4), tl.where(second, _T2, _T0))
    distance = tl.where(third, 4, 0) + tl.where(second, 2, 0) + tl.where(bits > limit, 1, 0)
    above = 7 + distance + tl.where(bits > _T7, 1, 0)
    return tl.where(negative, 7 - distance, above)
