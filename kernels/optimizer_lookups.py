"""What the device code of optimizer codecs looks up instead of computing it: one fp32 table.

Owns the table and where its parts begin. Its entries are results of the very operations that
`client/optim/codecs` state, done here in numpy, so that looking up gives the same bits.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from everstep.kernels import optimizer_tables

Floats = NDArray[numpy.float32]


class Steps(NamedTuple):
    """Where to look a value's code up by its bits: how many of them, and from which on.

    Attributes:
        shift: So many low bits of a magnitude do not matter.
        low: What is left of the least magnitude that matters.
        high: What is left of 1.
    """

    shift: int
    low: int
    high: int

    @property
    def bins(self) -> int:
        """How many of either sign."""
        return self.high - self.low + 1


FOURBIT_STEPS = Steps(20, 118 << 3, 127 << 3)
DYNAMIC_STEPS = Steps(16, 103 << 7, 127 << 7)

# Places in the table.
SIGNED_VALUES = 0
SECOND_VALUES = 256
COMPANDED = 512
FOURBIT_VALUES = 768
FOURBIT_CODES = 784
SIGNED_CODES = FOURBIT_CODES + 4 * FOURBIT_STEPS.bins
SECOND_CODES = SIGNED_CODES + 4 * DYNAMIC_STEPS.bins
FP8_VALUES = -(-(SECOND_CODES + 4 * DYNAMIC_STEPS.bins) // 32) * 32  # in whole cache lines
ENTRIES = FP8_VALUES + 257 * 128

_ONE = numpy.float32(1)
_NEVER = numpy.float32(numpy.inf)


@lru_cache(maxsize=1)
def table() -> Floats:
    """The whole table."""
    made = numpy.zeros(ENTRIES, numpy.float32)
    for values_at, codes_at, steps, values in (
        (SIGNED_VALUES, SIGNED_CODES, DYNAMIC_STEPS, optimizer_tables.DYNAMIC_SIGNED),
        (SECOND_VALUES, SECOND_CODES, DYNAMIC_STEPS, optimizer_tables.DYNAMIC_SECOND),
        (FOURBIT_VALUES, FOURBIT_CODES, FOURBIT_STEPS, optimizer_tables.FOURBIT_SIGNED),
    ):
        made[values_at : values_at + len(values)] = values
        codes = _codes(steps, optimizer_tables.thresholds(values))
        made[codes_at : codes_at + codes.size] = codes.reshape(-1)
    codes = numpy.arange(256, dtype=numpy.uint8).view(numpy.int8).astype(numpy.float32)
    made[COMPANDED : COMPANDED + 256] = codes / (254 - numpy.abs(codes))
    made[FP8_VALUES + 128 :] = _fp8_values().reshape(-1)
    made.flags.writeable = False
    return made


def _codes(steps: Steps, thresholds: tuple[float, ...]) -> Floats:
    """For each bin of magnitudes, and those of negative numbers after: a threshold, and a code.

    The code is that above the threshold; where a bin has none, it is infinite.
    """
    bounds = numpy.arange(steps.low, steps.high + 2, dtype=numpy.int32) << steps.shift
    edges = bounds.view(numpy.float32)
    edges[0], edges[-1] = 0, numpy.inf
    limits = numpy.array(thresholds, numpy.float32)
    made = numpy.full((2 * steps.bins, 2), _NEVER)
    codes = made.view(numpy.int32)[:, 1]
    for place, (least, most) in enumerate(pairwise(edges.tolist())):
        for row, inside, below in (
            (place, (limits >= least) & (limits < most), limits < least),
            (place + steps.bins, (limits > -most) & (limits <= -least), limits <= -most),
        ):
            assert inside.sum() <= 1, "two thresholds in one bin"
            if inside.any():
                made[row, 0] = limits[inside][0]
            codes[row] = below.sum() + 1
    return made


def _fp8_values() -> Floats:
    """[256, 128]: what a code is of the block's largest magnitude, for sixteenths from 1 on."""
    m = numpy.arange(128, dtype=numpy.int32)
    normal = ((m << 20) + (120 << 23)).view(numpy.float32)
    value = numpy.where(m >= 8, normal, m.astype(numpy.float32) * numpy.float32(2**-9))
    value = numpy.maximum(value, numpy.float32(2**-9))
    logarithm = _log2(value * numpy.float32(1 / 448))
    root = numpy.float32(16) / numpy.arange(1, 257, dtype=numpy.float32)
    return numpy.where(m == 0, numpy.float32(0), _exp2(logarithm[None] * root[:, None]))


def _log2(value: Floats) -> Floats:
    bits = value.view(numpy.int32)
    exponent = ((bits >> 23) - 127).astype(numpy.float32)
    t = ((bits & 0x7FFFFF) | 0x3F800000).view(numpy.float32) - _ONE
    q = numpy.full_like(t, optimizer_tables.FP8_LOG2[-1])
    for coefficient in reversed(optimizer_tables.FP8_LOG2[:-1]):
        q = q * t
        q = q + numpy.float32(coefficient)
    return exponent + t * q


def _exp2(power: Floats) -> Floats:
    power = numpy.maximum(power, numpy.float32(-126))
    whole = numpy.floor(power)
    f = power - whole
    q = numpy.full_like(f, optimizer_tables.FP8_EXP2[-1])
    for coefficient in (*reversed(optimizer_tables.FP8_EXP2[:-1]), 1.0):
        q = q * f
        q = q + numpy.float32(coefficient)
    return q * ((whole.astype(numpy.int32) + 127) << 23).view(numpy.float32)
