"""Codecs of optimizer state as device code: how a tile is decoded, and encoded again.

Owns `fetch_state`, `decode_state` and `store_state`, which choose a codec by its name at compile
time, and the places that a tile of blocks has in a tensor's elements, bytes and scales. Gives the
bits of `client/optim/codecs`; needs a launch with ``enable_fp_fusion=False``. A new codec is a
branch in each of them. bf16 is handled as 16 bits: the interpreter's own conversion does not round.

All states are fetched before the first is decoded: no load moves up over a branch, and decoding may
have one.
"""

import triton
import triton.language as tl

from everstep.kernels import optimizer_lookups
from everstep.kernels.optimizer_fp8_triton import fp8_decode, fp8_encode
from everstep.kernels.optimizer_words_triton import divide_tame, look_up, look_up_pair

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
SMALLEST_FOURBIT = tl.constexpr(2.0**-120)
INFINITE = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
# Added to a number within 2**22 it leaves the number rounded to even in the low bits of the sum.
ROUNDER = tl.constexpr(12582912.0)
_SIGNED_VALUES = tl.constexpr(optimizer_lookups.SIGNED_VALUES)
_SECOND_VALUES = tl.constexpr(optimizer_lookups.SECOND_VALUES)
_COMPANDED = tl.constexpr(optimizer_lookups.COMPANDED)
_FOURBIT_VALUES = tl.constexpr(optimizer_lookups.FOURBIT_VALUES)
_FOURBIT_CODES = tl.constexpr(optimizer_lookups.FOURBIT_CODES)
_SIGNED_CODES = tl.constexpr(optimizer_lookups.SIGNED_CODES)
_SECOND_CODES = tl.constexpr(optimizer_lookups.SECOND_CODES)
_FOURBIT_SHIFT, _FOURBIT_LOW, _FOURBIT_HIGH = map(tl.constexpr, optimizer_lookups.FOURBIT_STEPS)
_DYNAMIC_SHIFT, _DYNAMIC_LOW, _DYNAMIC_HIGH = map(tl.constexpr, optimizer_lookups.DYNAMIC_STEPS)


@triton.jit
def tile(
    first,
    total,
    row,
    across,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLAT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Where the items of a tile lie: elements, or what holds `UNIT` of them.

    Args:
        first: The first block of the tile.
        total: Blocks of the tensor.
        row: Elements of a row.
        across: Blocks of a row.
        UNIT: Elements to an item.
        COLUMNS: Items to a block.
        BLOCKS: Blocks to a tile.
        FLAT: Rows are whole blocks: the tensor is one long row.
        VECTOR: What a row is a multiple of, if not `FLAT`.

    Returns:
        The place of the first item, that of each from there, and which of them exist.
    """
    block = tl.arange(0, BLOCKS)
    column = tl.arange(0, COLUMNS)
    number = first + block
    if FLAT:
        start = first.to(tl.int64) * COLUMNS
        place = (block * COLUMNS)[:, None] + column[None, :]
        inside = (number < total)[:, None] & (column < COLUMNS)[None, :]
    else:
        if VECTOR % UNIT == 0:
            items = (row // VECTOR) * (VECTOR // UNIT)
        else:
            items = (row + (UNIT - 1)) // UNIT
        line = number // across
        passed = (number - line * across) * COLUMNS
        start = first.to(tl.int64) * 0
        place = (line.to(tl.int64) * items + passed)[:, None] + column[None, :]
        inside = (number < total)[:, None] & (column[None, :] < (items - passed)[:, None])
    return start, place, inside


@triton.jit
def pointer(address, start, TYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """A typed pointer to an item of what lies at an address."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), ALIGNMENT) + start


@triton.jit
def _spread(value, BLOCKS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One value a block as one value an element."""
    wide = tl.broadcast_to(value[:, :, None], (BLOCKS, PARTS, BLOCK))
    return tl.reshape(wide, (BLOCKS, PARTS * BLOCK))


@triton.jit
def _maximum(bits, BLOCKS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest magnitude of each block; NaN if there is an infinity or a NaN."""
    bits = tl.max(tl.reshape(bits, (BLOCKS, PARTS, BLOCK)), axis=2)
    return tl.where(bits >= INFINITE, NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def _minimum(bits, BLOCKS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The least magnitude of each block that is not 0; 0 if there is none."""
    # Below 0, which becomes the largest number, all others come in their order.
    bits = tl.min(tl.reshape(bits - 1, (BLOCKS, PARTS, BLOCK)), axis=2) + 1
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _ratio(value, scale, LEAST: tl.constexpr):
    """``value / scale``, or 0 where the scale is too small or NaN."""
    return tl.where(scale >= LEAST, tl.div_rn(tl.full(scale.shape, value, tl.float32), scale), 0.0)


@triton.jit
def to_bf16(x):
    """The bits of the nearest bf16, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)


@triton.jit
def from_bf16(bits):
    """The value of a bf16."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _half_step(bits):
    """Half the distance of a bf16 from the next one, and whether corrections count it."""
    field = (bits.to(tl.int32) >> 7) & 0xFF
    half = (tl.maximum(field - 8, 0) << 23).to(tl.float32, bitcast=True)
    return half, (field >= 9) & (field < 255)


@triton.jit
def split(x):
    """A value as a bf16 and the correction that it lacks: bits, int8."""
    bits = to_bf16(x)
    half, counts = _half_step(bits)
    # A power of two: multiplying by its inverse is the same.
    inverse = (0x7F000000 - half.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    lack = ((x - from_bf16(bits)) * inverse) * 127.0
    lack = tl.minimum(tl.maximum(lack + ROUNDER, ROUNDER - 127.0), ROUNDER + 127.0)
    code = lack.to(tl.int32, bitcast=True)
    return bits, tl.where(counts, code, 0).to(tl.int8)


@triton.jit
def merge(bits, code):
    """The value that `split` was given, but for its last bits."""
    half, _ = _half_step(bits)
    return from_bf16(bits) + code.to(tl.float32) * (half * (1 / 127))


@triton.jit
def _find(z, table, SHIFT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """How many thresholds lie below each value; any code for a NaN."""
    bits = z.to(tl.int32, bitcast=True)
    place = tl.minimum(tl.maximum((bits & 0x7FFFFFFF) >> SHIFT, LOW), HIGH)
    place = tl.where(bits < 0, place + (HIGH - LOW + 1), place)
    limit, code = look_up_pair(table - 2 * LOW, place)
    return code - (z <= limit).to(tl.int32)


@triton.jit
def _decode(CODEC: tl.constexpr, code, scale, maps):
    """Values of codes that have one scale."""
    if CODEC == "int8_signed":
        x = look_up(maps + _COMPANDED, code.to(tl.int32)) * scale
    elif CODEC == "int8_second":
        u = code.to(tl.float32) * (scale * (1 / 255))
        x = u * u
    elif CODEC == "dynamic_signed":
        x = look_up(maps + _SIGNED_VALUES, code.to(tl.int32)) * scale
    elif CODEC == "dynamic_second":
        x = look_up(maps + _SECOND_VALUES, code.to(tl.int32)) * scale
    elif CODEC == "fourbit_signed":
        x = look_up(maps + _FOURBIT_VALUES, code.to(tl.int32)) * scale
    else:
        tl.static_assert(CODEC == "fourbit_second")
        x = (code.to(tl.int32) + 1).to(tl.float32) * (scale * 0.0625)
    return x


@triton.jit
def _encode(CODEC: tl.constexpr, x, ratio, maps):
    """Codes of finite values that have one scale; `ratio` is 1, 16 or 255 divided by it.

    The products exceed what the largest code stands for by two units in the last place at most,
    which are rounded away: a minimum would change nothing.
    """
    if CODEC == "int8_signed":
        z = x * ratio
        c = divide_tame(z + z, 1.0 + tl.abs(z)) * 127.0
        code = (c + ROUNDER).to(tl.int32, bitcast=True)
    elif CODEC == "int8_second":
        rounded = tl.maximum(x * ratio + ROUNDER, ROUNDER + 1.0).to(tl.int32, bitcast=True)
        code = tl.where(x == 0.0, 0, rounded)
    elif CODEC == "dynamic_signed":
        code = _find(x * ratio, maps + _SIGNED_CODES, _DYNAMIC_SHIFT, _DYNAMIC_LOW, _DYNAMIC_HIGH)
    elif CODEC == "dynamic_second":
        code = _find(x * ratio, maps + _SECOND_CODES, _DYNAMIC_SHIFT, _DYNAMIC_LOW, _DYNAMIC_HIGH)
        code = tl.where((x > 0.0) & (code == 0), 1, code)
    elif CODEC == "fourbit_signed":
        code = _find(x * ratio, maps + _FOURBIT_CODES, _FOURBIT_SHIFT, _FOURBIT_LOW, _FOURBIT_HIGH)
    else:
        tl.static_assert(CODEC == "fourbit_second")
        rounded = tl.maximum(x * ratio + ROUNDER, ROUNDER + 1.0).to(tl.int32, bitcast=True)
        code = tl.where(ratio > 0.0, rounded - 1, 15)
    return code


@triton.jit
def fetch_state(
    CODEC: tl.constexpr,
    BLOCK: tl.constexpr,
    addresses,
    first,
    total,
    row,
    across,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLAT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """What `decode_state` makes one state of a tile of: up to three tensors.

    `addresses` holds those of codes, scales and corrections.
    """
    start, place, inside = tile(first, total, row, across, 1, WIDTH, BLOCKS, FLAT, VECTOR)
    address = tl.load(addresses)
    if CODEC == "fp32":
        x = tl.load(pointer(address, start, tl.float32, 4 * VECTOR) + place, inside, other=0.0)
        parts = x, x, x
    elif CODEC == "bf16":
        x = tl.load(pointer(address, start, tl.uint16, 2 * VECTOR) + place, inside, 0)
        parts = x, x, x
    elif CODEC == "bf16_int8":
        bits = tl.load(pointer(address, start, tl.uint16, 2 * VECTOR) + place, inside, other=0)
        corrections = pointer(tl.load(addresses + 2), start, tl.int8, VECTOR)
        parts = bits, tl.load(corrections + place, inside, other=0), bits
    else:
        PARTS: tl.constexpr = WIDTH // BLOCK
        scales, block, exists = tile(first, total, row, across, BLOCK, PARTS, BLOCKS, FLAT, 1)
        EACH: tl.constexpr = 2 if CODEC == "fp8_signed" or CODEC == "fp8_second" else 1
        scales = pointer(tl.load(addresses + 1), scales * EACH, tl.float32, 4)
        scale = tl.load(scales + block * EACH, exists, other=0.0)
        if CODEC == "fourbit_signed" or CODEC == "fourbit_second":
            HALF: tl.constexpr = WIDTH // 2
            start, place, inside = tile(first, total, row, across, 2, HALF, BLOCKS, FLAT, VECTOR)
            codes = pointer(address, start, tl.uint8, (VECTOR + 1) // 2)
            code = tl.load(codes + place, inside, other=0)
        else:
            code = tl.load(pointer(address, start, tl.uint8, VECTOR) + place, inside, other=0)
        least = scale
        if EACH == 2:
            least = tl.load(scales + block * EACH + 1, exists, other=0.0)
        parts = code, scale, least
    return parts


@triton.jit
def decode_state(
    CODEC: tl.constexpr,
    BLOCK: tl.constexpr,
    code,
    scale,
    least,
    maps,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One state of a tile in fp32, of what `fetch_state` has loaded."""
    if CODEC == "fp32":
        x = code
    elif CODEC == "bf16":
        x = from_bf16(code)
    elif CODEC == "bf16_int8":
        x = merge(code, scale)
    else:
        PARTS: tl.constexpr = WIDTH // BLOCK
        if CODEC == "fp8_signed" or CODEC == "fp8_second":
            SECOND: tl.constexpr = CODEC == "fp8_second"
            x = fp8_decode(code, scale, least, maps, SECOND, BLOCKS, PARTS, BLOCK)
        else:
            if CODEC == "fourbit_signed" or CODEC == "fourbit_second":
                code = tl.reshape(tl.join(code & 15, code >> 4), (BLOCKS, WIDTH))
            x = _decode(CODEC, code, _spread(scale, BLOCKS, PARTS, BLOCK), maps)
    return x


@triton.jit
def store_state(
    CODEC: tl.constexpr,
    BLOCK: tl.constexpr,
    addresses,
    x,
    maps,
    first,
    total,
    row,
    across,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLAT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Encode one state of a tile; arguments as for `fetch_state`."""
    start, place, inside = tile(first, total, row, across, 1, WIDTH, BLOCKS, FLAT, VECTOR)
    address = tl.load(addresses)
    if CODEC == "fp32":
        tl.store(pointer(address, start, tl.float32, 4 * VECTOR) + place, x, inside)
    elif CODEC == "bf16":
        tl.store(pointer(address, start, tl.uint16, 2 * VECTOR) + place, to_bf16(x), inside)
    elif CODEC == "bf16_int8":
        bits, code = split(x)
        tl.store(pointer(address, start, tl.uint16, 2 * VECTOR) + place, bits, inside)
        corrections = pointer(tl.load(addresses + 2), start, tl.int8, VECTOR)
        tl.store(corrections + place, code, inside)
    else:
        PARTS: tl.constexpr = WIDTH // BLOCK
        if CODEC == "int8_second":
            x = tl.sqrt_rn(x)
        bits = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        if not FLAT:  # else blocks are whole
            bits = tl.where(inside, bits, 0)
        scale = _maximum(bits, BLOCKS, PARTS, BLOCK)
        scales, block, exists = tile(first, total, row, across, BLOCK, PARTS, BLOCKS, FLAT, 1)
        EACH: tl.constexpr = 2 if CODEC == "fp8_signed" or CODEC == "fp8_second" else 1
        scales = pointer(tl.load(addresses + 1), scales * EACH, tl.float32, 4)
        if EACH == 2:
            least = _minimum(bits, BLOCKS, PARTS, BLOCK)
            least = tl.where(scale == scale, least, scale)
            both = (block * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
            tl.store(scales + both, tl.join(scale, least), exists[:, :, None])
            SECOND: tl.constexpr = CODEC == "fp8_second"
            code = fp8_encode(x, scale, least, SECOND, BLOCKS, PARTS, BLOCK)
        else:
            tl.store(scales + block, scale, exists)
            if CODEC == "fourbit_second":
                ratio = _ratio(16.0, scale, SMALLEST_FOURBIT)
            elif CODEC == "int8_second":
                ratio = _ratio(255.0, scale, SMALLEST_NORMAL)
            else:
                ratio = _ratio(1.0, scale, SMALLEST_NORMAL)
            code = _encode(CODEC, x, _spread(ratio, BLOCKS, PARTS, BLOCK), maps)
            kept = tl.where(scale == scale, 0xFF, 0)
            code = code & _spread(kept, BLOCKS, PARTS, BLOCK)
        if not FLAT:  # what pads the last byte of a row
            code = tl.where(inside, code, 0)
        code = code.to(tl.uint8)
        if CODEC == "fourbit_signed" or CODEC == "fourbit_second":
            HALF: tl.constexpr = WIDTH // 2
            start, place, inside = tile(first, total, row, across, 2, HALF, BLOCKS, FLAT, VECTOR)
            low, high = tl.split(tl.reshape(code, (BLOCKS, HALF, 2)))
            codes = pointer(address, start, tl.uint8, (VECTOR + 1) // 2)
            tl.store(codes + place, low | (high << 4), inside)
        else:
            tl.store(pointer(address, start, tl.uint8, VECTOR) + place, code, inside)
