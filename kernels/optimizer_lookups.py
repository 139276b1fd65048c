"""What the device code of optimizer codecs looks up instead of computing it: one fp32 table.

Owns the table and where its parts begin. Its entries are results of the very operations that
`client/optim/codecs` state, done here in numpy, so that looking up gives the same bits. An FP8
code is a step function of one number: the table has, for each stretch of it, the code at its start
and the one place at most where the next code begins.
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
FP8_CODES = SECOND_CODES + 4 * DYNAMIC_STEPS.bins
FP8_POWERS = FP8_CODES + 1024
FP8_VALUES = FP8_POWERS + 3584
ENTRIES = FP8_VALUES + 257 * 256

FP8_STRETCHES = 512
"""Of powers from 0 to -511 sixteenths of an octave, to the nearest whole one."""

FP8_SPREADS = 7 * 256
"""Of spreads from 1 to 127 octaves, by their bits from this many on; see `FP8_FIRST_SPREAD`."""

FP8_SPREAD_SHIFT = 15
FP8_FIRST_SPREAD = 0x3F800000 >> FP8_SPREAD_SHIFT

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
    made[FP8_CODES : FP8_CODES + 2 * FP8_STRETCHES] = _fp8_codes().reshape(-1)
    made[FP8_POWERS : FP8_POWERS + 2 * FP8_SPREADS] = _fp8_powers().reshape(-1)
    made[FP8_VALUES + 256 :] = _fp8_values().reshape(-1)
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


def _fp8_codes() -> Floats:
    """For each stretch: where a code begins, if one does, and the bits of that code."""
    begins = _fp8_begins()
    made = numpy.full((FP8_STRETCHES, 2), _NEVER)
    first = made.view(numpy.int32)[:, 1]
    stretches = numpy.rint(-begins).astype(numpy.int64)
    assert len(set(stretches)) == len(begins), "two codes begin in one stretch"
    made[stretches, 0] = begins
    # Powers fall as stretches rise: a code begins below all stretches before its own.
    first[:] = 1
    for stretch in stretches:
        first[:stretch] += 1
    return made


def _fp8_begins() -> Floats:
    """The least power, in sixteenths of an octave, of each code from 1 to 126."""
    wanted = numpy.arange(1, 127)
    low = numpy.zeros(126, numpy.int32)  # bits of magnitudes
    high = numpy.full(126, 512, numpy.float32).view(numpy.int32)
    while int((high - low).max()) > 1:
        middle = low + (high - low) // 2
        reached = _fp8_code(-middle.view(numpy.float32)) >= wanted
        low, high = numpy.where(reached, middle, low), numpy.where(reached, high, middle)
    return -low.view(numpy.float32)


def _fp8_powers() -> Floats:
    """For each bin of spreads: the part from which on a power holds, if one does, and it."""
    parts = _fp8_parts()
    spreads = -numpy.log2(parts.astype(numpy.float64)).astype(numpy.float32)
    places = spreads.view(numpy.int32) / 2.0**FP8_SPREAD_SHIFT - FP8_FIRST_SPREAD
    # The device's logarithm, which finds the bin, is right to 2**-22.
    assert numpy.abs(places - numpy.rint(places)).min() > 2.0**-10
    bins = numpy.floor(places).astype(numpy.int64)
    assert len(set(bins)) == len(parts), "two powers begin in one bin"
    made = numpy.full((FP8_SPREADS, 2), _NEVER)
    made[bins, 0] = parts
    made[:, 1] = _FP8_LEAST + 1
    for place in bins:
        made[:place, 1] += 1
    return made


_FP8_LEAST = 2
_FP8_MOST = 256


def _fp8_parts() -> Floats:
    """The least part that the smallest magnitude is of the largest, for powers from 3 to 256."""
    wanted = numpy.arange(_FP8_LEAST + 1, _FP8_MOST + 1)
    low = numpy.full(len(wanted), 2.0**-126, numpy.float32).view(numpy.int32)
    high = numpy.full(len(wanted), 1, numpy.float32).view(numpy.int32)
    while int((high - low).max()) > 1:
        middle = low + (high - low) // 2
        reached = _fp8_power(middle.view(numpy.float32)) >= wanted
        low, high = numpy.where(reached, low, middle), numpy.where(reached, middle, high)
    return high.view(numpy.float32)


def _fp8_power(part: Floats) -> Floats:
    """Sixteen times the power that stretches a block."""
    spread = numpy.maximum(-_log2(part), _ONE)
    power = numpy.floor(numpy.float32(optimizer_tables.FP8_RANGE) / spread)
    return numpy.clip(power, _ONE, numpy.float32(_FP8_MOST))


def _fp8_code(sixteenths: Floats) -> NDArray[numpy.int32]:
    """The code of 448 * 2^(sixteenths / 16)."""
    value = numpy.float32(448) * _exp2(sixteenths * numpy.float32(0.0625))
    bits = value.view(numpy.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = numpy.rint(value * numpy.float32(512)).astype(numpy.int32)
    code = numpy.where(value >= numpy.float32(2**-6), normal, small)
    return numpy.minimum(code, 126).astype(numpy.int32)


def _fp8_values() -> Floats:
    """[256, 256]: what a code is of the block's largest magnitude, for sixteenths from 1 on."""
    code = numpy.arange(256, dtype=numpy.int32)
    m = code & 127
    normal = ((m << 20) + (120 << 23)).view(numpy.float32)
    value = numpy.where(m >= 8, normal, m.astype(numpy.float32) * numpy.float32(2**-9))
    value = numpy.maximum(value, numpy.float32(2**-9))
    logarithm = _log2(value * numpy.float32(1 / 448))
    root = numpy.float32(16) / numpy.arange(1, 257, dtype=numpy.float32)
    share = numpy.where(m == 0, numpy.float32(0), _exp2(logarithm[None] * root[:, None]))
    return numpy.where(code >= 128, -share, share)


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
