"""What the FP8 codec computes of blocks and elements: by its formulas, or nearly, in words of PTX.

Owns `fp8_row` and `fp8_stretch` of a block, `fp8_value` and `fp8_code` of an element. Promises the
bits that `client/optim/codecs/fp8.py` states, either way: by the formulas in Triton's interpreter
and for targets before 8.9, which have no conversion to E4M3.

Nearly: the power and the code are step functions, of a quotient and of a number y. The hardware's
logarithm, reciprocal and power of two give two bounds that the stated number lies between; where
both are on the same step, that is the answer, as rounding is monotone. Else, which is rare, it is
computed as stated. So is all of a block whose numbers the hardware would flush: where M or its
inverse is not normal, or something could be less than 2^-125 M.

The bounds of y, in octaves, with L = log2(|x| / M) and the power p, at most 16; |p L| is at most
16.7, as p is what the least magnitude allows. The stated y is off by p times

- 2^-23 log2(e) for two roundings of |x| / M; 2.2e-6 for log2_of, and 2^-24 |L| for its last sum

and by 2^-24 |p L| for the product, 6.0e-6 for exp2_of, 2^-24 log2(e) for the last product. The near
y is off by p times

- 3 2^-24 log2(e) for rcp.approx and a product; 2^-22 max(1, |L|) for lg2.approx

and by 2^-21 for a fused sum below 16, 2^-22 log2(e) for ex2.approx, 2^-20 for the number that makes
it the lower bound, 2^-23 log2(e) for the product that makes the upper one. In all that is less than
2.9e-6 p + 1.41e-5, and so than 2^-18 p + 2^-16: as far from the near y are the bounds.

The quotient, by its spread, which is at least 1, is off by 2.5e-6 as stated and by 6e-7 nearly,
relatively; reciprocal and roundings add 3e-7. Its bounds are 2^-16 away.
"""

import math
import struct

import triton
import triton.language as tl

from everstep.kernels import optimizer_tables
from everstep.kernels.optimizer_words_triton import COMPILED, look_up

try:
    from triton.language.target_info import cuda_capability_geq

    _KNOWN = COMPILED
except ImportError:  # of Triton before 3.5, which cannot say: the formulas are right everywhere
    cuda_capability_geq = None
    _KNOWN = tl.constexpr(False)

_L0, _L1, _L2, _L3, _L4, _L5 = (tl.constexpr(c) for c in optimizer_tables.FP8_LOG2)
_D0, _D1, _D2, _D3 = (tl.constexpr(d) for d in optimizer_tables.FP8_EXP2)
_RANGE = tl.constexpr(optimizer_tables.FP8_RANGE)
_LEAST = tl.constexpr(2.0**-126)
_ROUNDER = tl.constexpr(12582912.0)


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


# The logarithm, as stated, of the share `t` that something is of M; into w.
_EXACT_LOGARITHM = f"""
    div.rn.f32 q, {_hex(1.0)}, most;
    setp.ge.f32 normal, most, {_hex(2.0**-126)};
    selp.f32 q, q, {_hex(0.0)}, normal;
    mul.rn.f32 w, t, q;
    max.f32 w, w, {_hex(2.0**-126)};
    min.f32 w, w, {_hex(1.0)};
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
"""

# A number below 2^19 added to it keeps its sixteenths only, and has them in the lowest bits.
_SIXTEENTHS = 786432.0
_OCTAVES = optimizer_tables.FP8_RANGE / 16
_MOST = 16.0
_OFF = 2.0**-16
_OFF_OF_POWER = 2.0**-18


def _find_power(most: str, least: str) -> str:
    """PTX for `whole`, the power of a block and _SIXTEENTHS, and whether it is `near` another."""
    return f"""
    .reg .f32 most, least, inverse, share, whole, above, t, q, e, w;
    .reg .b32 i;
    .reg .pred near, normal;
    mov.f32 most, {most};
    mov.f32 least, {least};
    rcp.approx.ftz.f32 inverse, most;
    mul.rn.f32 share, inverse, least;
    lg2.approx.ftz.f32 share, share;
    rcp.approx.ftz.f32 share, share;
    setp.gtu.f32 near, share, {_hex(-1 / 125)};
    max.f32 share, share, {_hex(-(_MOST + 1 / 32) / _OCTAVES)};
    fma.rm.f32 whole, share, {_hex(-_OCTAVES * (1 - _OFF))}, {_hex(_SIXTEENTHS)};
    fma.rm.f32 above, share, {_hex(-_OCTAVES * (1 + _OFF))}, {_hex(_SIXTEENTHS)};
    setp.neu.or.f32 near, whole, above, near;
    """


# The same as stated; `w` is the spread.
_EXACT_POWER = f"""
    mov.f32 t, least;
    {_EXACT_LOGARITHM}
    neg.f32 w, w;
    max.f32 w, w, {_hex(1.0)};
    div.rn.f32 q, {_hex(optimizer_tables.FP8_RANGE)}, w;
    cvt.rmi.f32.f32 q, q;
    min.f32 q, q, {_hex(16 * _MOST)};
    mul.rn.f32 q, q, {_hex(1 / 16)};
    add.rn.f32 whole, q, {_hex(_SIXTEENTHS)};
"""

_POWER = tl.constexpr(
    f"""
    {{
    {_find_power("$1", "$2")}
    @!near bra DONE;
    {_EXACT_POWER}
    DONE:
    mov.b32 $0, whole;
    }}
    """
)
_NO_SIXTEENTHS = tl.constexpr(struct.unpack("<i", struct.pack("<f", _SIXTEENTHS))[0])

_BOUNDS = f"""
    add.rn.f32 $0, whole, {_hex(-_SIXTEENTHS)};
    fma.rn.f32 $1, $0, {_hex(-_OFF_OF_POWER)}, {_hex(math.log2(448) - _OFF)};
    fma.rn.f32 $2, $0, {_hex(_OFF_OF_POWER * 2 * math.log(2))}, {_hex(1 + _OFF * 2 * math.log(2))};
"""

# Of a block: $0 = its power, $1 = log2(448) less the bound, $2 = how much the upper bound is of the
# lower one, NaN where all has to be exact, $3 = nearly 1 / M. Of $4 = M, $5 = mu.
_STRETCH = tl.constexpr(
    f"""
    {{
    {_find_power("$4", "$5")}
    {_BOUNDS}
    mov.f32 $3, inverse;
    @!near bra DONE;
    {_EXACT_POWER}
    {_BOUNDS}
    setp.le.f32 near, most, {_hex(2.0**126)};
    setp.le.and.f32 near, w, {_hex(125.0)}, near;
    setp.eq.or.f32 near, most, {_hex(0.0)}, near;
    selp.f32 $3, inverse, {_hex(0.0)}, normal;
    selp.f32 $2, $2, 0f7FC00000, near;
    DONE:
    }}
    """
)


# The code of `x` as stated, but for signs and the least code; `normal` is whether x is not 0.
_EXACT_CODE = f"""
    abs.f32 t, x;
    {_EXACT_LOGARITHM}
    mul.rn.f32 w, w, power;
    max.f32 w, w, {_hex(-126.0)};
    cvt.rmi.f32.f32 e, w;
    sub.rn.f32 t, w, e;
    {_horner((1.0, *optimizer_tables.FP8_EXP2))}
    cvt.rzi.s32.f32 i, e;
    add.s32 i, i, 127;
    shl.b32 i, i, 23;
    mov.b32 e, i;
    mul.rn.f32 q, q, e;
    mul.rn.f32 q, q, {_hex(448.0)};
    selp.f32 q, q, {_hex(0.0)}, normal;
    cvt.rn.satfinite.e4m3x2.f32 half, {_hex(0.0)}, q;
    cvt.u32.u16 code, half;
    setp.neu.f32 normal, x, {_hex(0.0)};
    selp.b32 code, code, 0, normal;
"""
_SIGN = """
    mov.b32 i, x;
    shr.u32 i, i, 24;
    and.b32 i, i, 0x80;
    setp.ne.u32 normal, code, 0;
    @normal or.b32 code, code, i;
"""
_AT_LEAST_ONE = """
    setp.eq.and.f32 normal, most, most, normal;
    @normal max.u32 code, code, 1;
"""


def _pick(name: str, first: int) -> str:
    """PTX that picks, of four operands, that of the element whose code begins at bit `place`."""
    return f"""
    selp.f32 {name}, ${first}, ${first + 1}, first;
    selp.f32 {name}, {name}, ${first + 2}, second;
    selp.f32 {name}, {name}, ${first + 3}, third;
    """


def _words_for_bounds(signed: bool) -> str:
    """PTX for the two bounds of y of four elements; of a zero that is negative, 0."""
    return "\n".join(
        f"""
        fma.rn.f32 t, ${1 + n}, ${5 + n}, {_hex(0.0)};
        abs.f32 w, t;
        lg2.approx.ftz.f32 w, w;
        fma.rn.f32 w, w, ${13 + n}, ${17 + n};
        ex2.approx.ftz.f32 low{n}, w;
        {f"lop3.b32 low{n}, t, 0x80000000, low{n}, 0xEA;" if signed else ""}
        mul.rn.f32 high{n}, low{n}, ${21 + n};
        """
        for n in range(4)
    )


def _words_for_codes(signed: bool) -> str:
    """PTX for the codes of four elements, which overtake each other: they have one branch.

    $0 = the codes, $1 to $4 = x; then four each of nearly 1 / M, M, the power, log2(448) less the
    bound, and the ratio of the bounds, whose bits are like those of 1 if it is not NaN.
    """
    return f"""
    {{
    .reg .f32 low<4>, high<4>, t, w, q, e, x, most, power;
    .reg .b32 i, code, codes, other, place;
    .reg .b16 half, rest;
    .reg .pred near, normal, first, second, third;
    {_words_for_bounds(signed)}
    cvt.rn.satfinite.e4m3x2.f32 half, low1, low0;
    cvt.rn.satfinite.e4m3x2.f32 rest, low3, low2;
    mov.b32 codes, {{half, rest}};
    cvt.rn.satfinite.e4m3x2.f32 half, high1, high0;
    cvt.rn.satfinite.e4m3x2.f32 rest, high3, high2;
    mov.b32 other, {{half, rest}};
    lop3.b32 w, $21, $22, $23, 0xFE;
    or.b32 w, w, $24;
    setp.ne.b32 near, codes, other;
    setp.nan.or.f32 near, w, w, near;
    @!near bra DONE;
    xor.b32 other, codes, other;
    setp.nan.f32 near, w, w;
    selp.b32 other, -1, other, near;
    NEXT:
    bfind.u32 place, other;
    and.b32 place, place, 24;
    setp.eq.u32 first, place, 0;
    setp.le.u32 second, place, 8;
    setp.le.u32 third, place, 16;
    {_pick("x", 1)}
    {_pick("most", 9)}
    {_pick("power", 13)}
    {_EXACT_CODE}
    {_SIGN if signed else _AT_LEAST_ONE}
    bfi.b32 codes, code, codes, place, 8;
    bfi.b32 other, 0, other, place, 8;
    setp.ne.u32 near, other, 0;
    @near bra NEXT;
    DONE:
    mov.b32 $0, codes;
    }}
    """


_SIGNED_CODES = tl.constexpr(_words_for_codes(signed=True))
_SECOND_CODES = tl.constexpr(_words_for_codes(signed=False))
_CODE_OPERANDS = tl.constexpr("=r" + ",f" * 24)


def _words_for_values(signed: bool) -> str:
    """PTX for the values of four elements: $0 to $3 of the codes $4 and the rows at $5 to $8."""
    loads = "\n".join(
        f"""
        prmt.b32 i, codes, 0, {0x4440 + n};
        mul.wide.u32 place, i, 4;
        add.s64 place, place, ${5 + n};
        ld.global.nc.b32 value{n}, [place];
        """
        for n in range(4)
    )
    signs = "\n".join(
        f"""
        shl.b32 i, $4, {24 - 8 * n};
        lop3.b32 value{n}, i, 0x80000000, value{n}, 0x6A;
        """
        for n in range(4)
    )
    return f"""
    {{
    .reg .b32 i, codes, value<4>;
    .reg .b64 place;
    {"and.b32 codes, $4, 0x7F7F7F7F;" if signed else "mov.b32 codes, $4;"}
    {loads}
    {signs if signed else ""}
    mov.b32 $0, value0;
    mov.b32 $1, value1;
    mov.b32 $2, value2;
    mov.b32 $3, value3;
    }}
    """


_SIGNED_VALUES = tl.constexpr(_words_for_values(signed=True))
_SECOND_VALUES = tl.constexpr(_words_for_values(signed=False))
_VALUE_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,r,l,l,l,l")


@triton.jit
def _inverse(most):
    """1 over the largest magnitude of a block, 0 if that is too small or NaN."""
    return tl.where(most >= _LEAST, tl.div_rn(tl.full(most.shape, 1.0, tl.float32), most), 0.0)


@triton.jit
def _relative(part):
    """The logarithm of what something is of the largest magnitude."""
    part = tl.minimum(tl.maximum(part, _LEAST), 1.0)
    bits = part.to(tl.int32, bitcast=True)
    t = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    q = t * _L5 + _L4
    q = q * t + _L3
    q = q * t + _L2
    q = q * t + _L1
    q = q * t + _L0
    return ((bits >> 23) - 127).to(tl.float32) + t * q


@triton.jit
def _power_of_two(power):
    """2 to a power that is at most 0, and at least 2^-126."""
    power = tl.maximum(power, -126.0)
    whole = tl.floor(power)
    f = power - whole
    q = f * _D3 + _D2
    q = q * f + _D1
    q = q * f + _D0
    q = q * f + 1.0
    return q * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _to_e4m3(y):
    """Codes of numbers from 0 to 448, to nearest even."""
    bits = y.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # The sum with 1.5 * 2**23 has the rounded number in its low bits.
    small = (y * 512.0 + _ROUNDER).to(tl.int32, bitcast=True) & 0xFF
    return tl.minimum(tl.where(y >= 0.015625, normal, small), 126)


@triton.jit
def fp8_row(most, least, values):
    """Where the values of a block's codes lie, for `fp8_value`.

    Args:
        most: The largest magnitude in it.
        least: The smallest that is not 0.
        values: `optimizer_lookups.FP8_VALUES` of the table.
    """
    if _KNOWN and cuda_capability_geq(8, 9):
        place = tl.inline_asm_elementwise(
            _POWER, "=r,f,f", [most, least], dtype=tl.int32, is_pure=True, pack=1
        )
        row = (values.to(tl.int64) - _NO_SIXTEENTHS * 512) + place.to(tl.int64) * 512
    else:
        row = fp8_power(most, least).to(tl.int32) * 128
    return row


@triton.jit
def fp8_power(most, least):
    """Sixteen times the power that stretches a block, as stated."""
    spread = tl.maximum(-_relative(tl.where(most == most, least, 0.0) * _inverse(most)), 1.0)
    quotient = tl.floor(tl.div_rn(tl.full(most.shape, _RANGE, tl.float32), spread))
    return tl.minimum(tl.maximum(quotient, 1.0), 256.0)


@triton.jit
def fp8_value(code, row, values, SECOND: tl.constexpr):
    """What codes are of the largest magnitude of their block.

    Args:
        code: uint8.
        row: `fp8_row` of the block of each.
        values: As for `fp8_row`.
        SECOND: Whether they have no signs.
    """
    if _KNOWN and cuda_capability_geq(8, 9):
        share = tl.inline_asm_elementwise(
            _SECOND_VALUES if SECOND else _SIGNED_VALUES,
            _VALUE_OPERANDS,
            [code, row],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        share = look_up(values, row + (code & 127).to(tl.int32))
        share = tl.where(code >= 128, -share, share)
    return share


@triton.jit
def fp8_stretch(most, least):
    """What `fp8_code` takes of a block: its power, and how the bounds follow from that.

    Returns:
        Nearly 1 / most, `most`, the power, in octaves, and the numbers of the bounds.
    """
    if _KNOWN and cuda_capability_geq(8, 9):
        power, offset, ratio, inverse = tl.inline_asm_elementwise(
            _STRETCH,
            "=&f,=&f,=&f,=&f,f,f",
            [most, least],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        power = fp8_power(most, least) * 0.0625
        inverse = _inverse(most)
        offset, ratio = power, power
    return inverse, most, power, offset, ratio


@triton.jit
def fp8_code(x, inverse, most, power, offset, ratio, SECOND: tl.constexpr):
    """The uint8 code of values; 0 in blocks of NaN.

    Args:
        x: The values.
        inverse: By `fp8_stretch` of the block of each, as are the others.
        most: The largest magnitude.
        power: What stretches it.
        offset: Of the lower bound.
        ratio: Of the bounds.
        SECOND: Whether values are never negative.
    """
    if _KNOWN and cuda_capability_geq(8, 9):
        code = tl.inline_asm_elementwise(
            _SECOND_CODES if SECOND else _SIGNED_CODES,
            _CODE_OPERANDS,
            [x, inverse, most, power, offset, ratio],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        y = _power_of_two(_relative(tl.abs(x) * inverse) * power) * 448.0
        code = tl.where(most >= _LEAST, _to_e4m3(y), 0)
        if SECOND:
            code = tl.maximum(code, 1)
        code = tl.where((x == 0.0) | (most != most), 0, code)
        if not SECOND:
            sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
            code = tl.where(code > 0, code | sign, 0)
        code = code.to(tl.uint8)
    return code
