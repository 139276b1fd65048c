"""The constants of optimizer codecs, as fp32 numbers, the same for every device.

Owns the values that codes stand for, the thresholds between them and the coefficients of the FP8
codec's logarithm and power. Each is a Python float that fp32 holds exactly. Promises nothing of
how they are used: that is stated in `client/optim/codecs`.
"""

import struct
from itertools import pairwise


def single(value: float) -> float:
    """The fp32 number nearest to `value`; infinite if it is too large for one."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def thresholds(values: tuple[float, ...]) -> tuple[float, ...]:
    """Between ascending values: a code is the number of thresholds that are less than x."""
    return tuple(single((low + high) / 2) for low, high in pairwise(values))


def _dynamic_map(signed: bool, bits: int = 8) -> tuple[float, ...]:
    """bitsandbytes' create_dynamic_map(signed, bits - 1, bits) in the roundings of its tensors.

    With n = bits - 1 decades: decade i is split into 2^i intervals (2^(i+1) unsigned), whose
    midpoints, times 10^(i+1-n) as fp32, are values. torchao has the same to the last bit.
    """
    values = [0.0, 1.0]
    for exponent in range(bits - 1):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        decade = single(10.0 ** (exponent + 2 - bits))
        for low, high in pairwise(_linspace(count + 1)):
            value = single(decade * single(single(low + high) / 2))
            values += [value, -value] if signed else [value]
    return tuple(sorted(values))


def _linspace(steps: int) -> list[float]:
    """torch.linspace(0.1, 1, steps): counted from the nearer end, one rounding each."""
    start, end = single(0.1), 1.0
    step = single(single(end - start) / (steps - 1))
    return [
        single(start + step * i if i < steps // 2 else end - step * (steps - 1 - i))
        for i in range(steps)
    ]


DYNAMIC_SIGNED = _dynamic_map(signed=True)
DYNAMIC_SECOND = _dynamic_map(signed=False)

FOURBIT_SIGNED = _dynamic_map(signed=True, bits=4)
"""arXiv 2309.01507, dynamic exponent, 4 bits: near +-.0055, .0325, .0775, .2125, .4375, .6625,
.8875, and 0 and 1; no -1."""

FP8_LOG2 = tuple(
    single(value)
    for value in (
        1.442553162574768,
        -0.7182819247245789,
        0.45827075839042664,
        -0.27953803539276123,
        0.12345138192176819,
        -0.026457414031028748,
    )
)
"""log2(1 + t) is near t * (c0 + t * (c1 + ...)) for 0 <= t <= 1, to 2.1e-6."""

FP8_EXP2 = tuple(
    single(value)
    for value in (
        0.6930185556411743,
        0.24144551157951355,
        0.051950547844171524,
        0.013581248000264168,
    )
)
"""2^f is near 1 + f * (c0 + f * (c1 + ...)) for 0 <= f <= 1, to 4.2e-6."""

FP8_RANGE = single(265.8353575)
"""16 * log2(448^2 / 2): the range that COAT spreads a block over, in sixteenths of an octave."""
