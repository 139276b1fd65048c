"""What the FP8 codec computes most, in PTX: nearly, and exactly where that could matter.

Owns `fp8_power` of a block and `fp8_code` of an element. Both are step functions, so the hardware's
logarithm, which is right to a few units in the last place, finds the step; only where a step is
nearer than the error of that is the number computed as `client/optim/codecs/fp8.py` says. In
Triton's interpreter it always is. Promises the same bits.

The error in question: log2 by FP8_LOG2 is within 6.1e-6 of the logarithm, the hardware's within
2^-22 of it, relatively; the approximate reciprocal adds 2^-22. Products with a power of up to 256
of which no more than 511 counts are thus within 7e-6 power + 1.6e-4.
"""

import struct

import triton
import triton.language as tl

from everstep.kernels import optimizer_lookups, optimizer_tables
from everstep.kernels.optimizer_words_triton import COMPILED, look_up_pair

_L0, _L1, _L2, _L3, _L4, _L5 = (tl.constexpr(c) for c in optimizer_tables.FP8_LOG2)
_LEAST = tl.constexpr(2.0**-126)
_ROUNDER = tl.constexpr(12582912.0)
_STRETCHES = tl.constexpr(optimizer_lookups.FP8_STRETCHES)
_LEAST_POWER = tl.constexpr(1.0 - optimizer_lookups.FP8_STRETCHES)
_CODES = tl.constexpr(optimizer_lookups.FP8_CODES)
_POWERS = tl.constexpr(optimizer_lookups.FP8_POWERS)
_SHIFT = tl.constexpr(optimizer_lookups.FP8_SPREAD_SHIFT)
_FIRST_SPREAD = tl.constexpr(optimizer_lookups.FP8_FIRST_SPREAD)
_UNSAFE = tl.constexpr(2.0**126)
_MARGIN = tl.constexpr(2.0**-11)
_MARGIN_OF_POWER = tl.constexpr(2.0**-16)


def _hex(value: float) -> str:
    """A number as PTX writes it."""
    return "0f" + struct.pack(">f", value).hex().upper()


def _horner(coefficients: tuple[float, ...]) -> str:
    """PTX for ``q = c[n]; q = q * t; q = q + c[n-1]; ... q = q + c[0]``."""
    first, *others = reversed(coefficients)
    lines = [f"mov.f32 q, {_hex(first)};"]
    for number in others:
        lines += ["mul.rn.f32 q, q, t;", f"add.rn.f32 q, q, {_hex(number)};"]
    return "\n".join(lines)


_FIND_STRETCH = f"""
    mul.rn.f32 w, w, $4;
    max.f32 w, w, {_hex(1.0 - optimizer_lookups.FP8_STRETCHES)};
    sub.rn.f32 gap, {_hex(12582912.0)}, w;
    mov.b32 i, gap;
    and.b32 i, i, {optimizer_lookups.FP8_STRETCHES - 1};
    mul.wide.u32 place, i, 8;
    add.s64 place, place, $6;
    ld.global.nc.v2.b32 {{limit, code}}, [place];
    sub.rn.f32 gap, w, limit;
"""

# Of $1 = x, $2 = nearly 1 / M, $3 = M, $4 = the power, $5 = the margin, $6 = the table.
_CODE = tl.constexpr(f"""
{{
    .reg .f32 w, limit, gap, t, q, e;
    .reg .b32 i, code;
    .reg .b64 place;
    .reg .pred far;
    abs.f32 t, $1;
    mul.rn.f32 w, t, $2;
    max.f32 w, w, {_hex(2.0**-126)};
    lg2.approx.ftz.f32 w, w;
    {_FIND_STRETCH}
    abs.f32 q, gap;
    setp.gtu.f32 far, q, $5;
    @far bra DONE;
    div.rn.f32 q, {_hex(1.0)}, $3;
    setp.ge.f32 far, $3, {_hex(2.0**-126)};
    selp.f32 q, q, {_hex(0.0)}, far;
    mul.rn.f32 w, t, q;
    max.f32 w, w, {_hex(2.0**-126)};
    mov.b32 i, w;
    shr.s32 i, i, 23;
    sub.s32 i, i, 127;
    cvt.rn.f32.s32 e, i;
    mov.b32 i, w;
    and.b32 i, i, 0x7FFFFF;
    or.b32 i, i, 0x3F800000;
    mov.b32 t, i;
    add.rn.f32 t, t, {_hex(-1.0)};
    {_horner(optimizer_tables.FP8_LOG2)}
    mul.rn.f32 q, q, t;
    add.rn.f32 w, e, q;
    {_FIND_STRETCH}
DONE:
    mov.b32 i, gap;
    shr.s32 i, i, 31;
    add.s32 $0, code, i;
}}
""")

_FIND_POWER = f"""
    max.f32 part, part, {_hex(2.0**-126)};
    min.f32 part, part, {_hex(1.0)};
    lg2.approx.ftz.f32 spread, part;
    neg.f32 spread, spread;
    max.f32 spread, spread, {_hex(1.0)};
    mov.b32 i, spread;
    shr.u32 i, i, {optimizer_lookups.FP8_SPREAD_SHIFT};
    mul.wide.u32 place, i, 8;
    add.s64 place, place, $3;
    ld.global.nc.v2.f32 {{limit, power}}, [place];
"""

# Of $1 = M, $2 = mu, $3 = the table as if it began at a spread of 0.
_POWER = tl.constexpr(f"""
{{
    .reg .f32 part, spread, limit, power, gap, least;
    .reg .b32 i;
    .reg .b64 place;
    .reg .pred near, unsafe;
    rcp.approx.ftz.f32 part, $1;
    mul.rn.f32 part, part, $2;
    {_FIND_POWER}
    sub.rn.f32 gap, part, limit;
    abs.f32 gap, gap;
    mul.rn.f32 least, part, {_hex(2.0**-20)};
    setp.le.f32 near, gap, least;
    mov.b32 i, $1;
    sub.s32 i, i, 0x00800000;
    setp.gt.u32 unsafe, i, 0x7E000000;
    or.pred near, near, unsafe;
    @!near bra DONE;
    div.rn.f32 part, {_hex(1.0)}, $1;
    setp.ge.f32 unsafe, $1, {_hex(2.0**-126)};
    selp.f32 part, part, {_hex(0.0)}, unsafe;
    mul.rn.f32 part, part, $2;
    {_FIND_POWER}
DONE:
    add.rn.f32 $0, power, {_hex(-1.0)};
    setp.ge.f32 near, part, limit;
    selp.f32 $0, power, $0, near;
}}
""")


@triton.jit
def _inverse(most):
    """1 over the largest magnitude of a block, 0 if that is too small or NaN."""
    return tl.where(most >= _LEAST, tl.div_rn(tl.full(most.shape, 1.0, tl.float32), most), 0.0)


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
def near_inverse(most):
    """Nearly 1 over the largest magnitude of a block; 0 if that is too small or NaN."""
    if COMPILED:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [most], dtype=tl.float32, is_pure=True, pack=1
        )
        inverse = tl.where(most >= _LEAST, inverse, 0.0)
    else:
        inverse = _inverse(most)
    return inverse


@triton.jit
def margin_of(most, power):
    """How near to a step `fp8_code` is to be exact; everywhere, if `near_inverse` is not near."""
    return tl.where(most > _UNSAFE, float("inf"), power * _MARGIN_OF_POWER + _MARGIN)


@triton.jit
def fp8_power(most, least, maps):
    """Sixteen times the power that stretches a block, in fp32.

    Args:
        most: The largest magnitude in it.
        least: The smallest that is not 0.
        maps: `optimizer_lookups.table`.
    """
    if COMPILED:
        power = tl.inline_asm_elementwise(
            _POWER,
            "=&f,f,f,l",
            [most, least, (maps + _POWERS).to(tl.int64) - _FIRST_SPREAD * 8],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        part = tl.maximum(tl.where(most == most, least, 0.0) * _inverse(most), _LEAST)
        part = tl.minimum(part, 1.0)
        spread = tl.maximum(-tl.log2(part), 1.0)
        place = (spread.to(tl.int32, bitcast=True) >> _SHIFT) - _FIRST_SPREAD
        limit, power = look_up_pair(maps + _POWERS, place)
        power = power.to(tl.float32, bitcast=True) - tl.where(part >= limit, 0.0, 1.0)
    return power


@triton.jit
def fp8_code(x, inverse, most, power, margin, maps):
    """The code of a magnitude, without the rules for zeros and signs.

    Args:
        x: The values.
        inverse: `near_inverse` of each one's block.
        most: The largest magnitude in it.
        power: Sixteen times the power that stretches it.
        margin: Its `margin_of`.
        maps: `optimizer_lookups.table`.
    """
    if COMPILED:
        code = tl.inline_asm_elementwise(
            _CODE,
            "=r,f,f,f,f,f,l",
            [x, inverse, most, power, margin, (maps + _CODES).to(tl.int64)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        # What rounding lifts above 1 has the greatest code all the same.
        logarithm = _log2(tl.maximum(tl.abs(x) * inverse, _LEAST))
        stretched = tl.maximum(logarithm * power, _LEAST_POWER)
        # The sum with 1.5 * 2**23 has the rounded number in its low bits.
        stretch = (-stretched + _ROUNDER).to(tl.int32, bitcast=True) & (_STRETCHES - 1)
        limit, code = look_up_pair(maps + _CODES, stretch)
        code = code - (stretched < limit).to(tl.int32)
    return code
