"""What the device runs for `kernels/optimizer_triton.py`: one pass over all tensors of a launch.

Owns `advance`: a program finds its tensor and its blocks in a table, decodes the states of a tile,
applies a method, writes the parameter and encodes the states. Codecs and methods are those of
`optimizer_codecs_triton` and `optimizer_methods_triton`, chosen at compile time. Importing it
imports triton. Promises nothing about addresses that are wrong.
"""

import triton
import triton.language as tl

from everstep.kernels.optimizer_codecs_triton import (
    decode_state,
    fetch_state,
    from_bf16,
    merge,
    pointer,
    split,
    store_state,
    tile,
    to_bf16,
)
from everstep.kernels.optimizer_methods_triton import update

# Columns of the table; `optimizer_triton` fills it.
FIRST = tl.constexpr(0)
TOTAL = tl.constexpr(1)
ROW = tl.constexpr(2)
ACROSS = tl.constexpr(3)
PARAMETER = tl.constexpr(4)
CORRECTION = tl.constexpr(5)
GRADIENT = tl.constexpr(6)
DIRECTION = tl.constexpr(7)
SEED = tl.constexpr(8)
STATES = tl.constexpr(9)
COLUMNS = tl.constexpr(18)
SCALARS = tl.constexpr(16)


@triton.jit
def _load(address, start, place, inside, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Values of a parameter or a gradient in fp32."""
    if TYPE == "bf16":
        bits = pointer(address, start, tl.uint16, 2 * VECTOR) + place
        x = from_bf16(tl.load(bits, inside, other=0))
    elif TYPE == "fp16":
        x = tl.load(pointer(address, start, tl.float16, 2 * VECTOR) + place, inside, other=0.0)
        x = x.to(tl.float32)
    else:
        x = tl.load(pointer(address, start, tl.float32, 4 * VECTOR) + place, inside, other=0.0)
    return x


@triton.jit
def _round_at_random(x, seed, index):
    """bf16 bits; up as often as the bits that are cut off say."""
    bits = x.to(tl.uint32, bitcast=True)
    random = tl.randint(seed, index.to(tl.uint32)).to(tl.uint32) & 0xFFFF
    up = (bits + random) >> 16
    kept = tl.where((bits & 0x7F800000) != 0x7F800000, up, bits >> 16)
    return tl.where(x == x, kept, 0x7FC0).to(tl.uint16)


@triton.jit
def _store(address, start, place, inside, x, seed, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    if TYPE == "random":
        bits = _round_at_random(x, seed, start + place)
        tl.store(pointer(address, start, tl.uint16, 2 * VECTOR) + place, bits, inside)
    elif TYPE == "bf16":
        tl.store(pointer(address, start, tl.uint16, 2 * VECTOR) + place, to_bf16(x), inside)
    elif TYPE == "fp16":
        half = x.to(tl.float16)
        tl.store(pointer(address, start, tl.float16, 2 * VECTOR) + place, half, inside)
    else:
        tl.store(pointer(address, start, tl.float32, 4 * VECTOR) + place, x, inside)


# Nothing may be specialized on a run-time value: each new one would compile in the training loop.
@triton.jit(do_not_specialize=["owners", "table", "scalars", "maps", "grad_scale", "found_inf"])
def advance(
    owners,
    table,
    scalars,
    maps,
    grad_scale,
    found_inf,
    METHOD: tl.constexpr,
    READ: tl.constexpr,
    WRITTEN: tl.constexpr,
    GRADIENTS: tl.constexpr,
    DIRECTED: tl.constexpr,
    CODEC_A: tl.constexpr,
    CODEC_B: tl.constexpr,
    CODEC_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    FLAT: tl.constexpr,
    VECTOR: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """Take one step of a few tiles that follow each other.

    Args:
        owners: int32, the tensor of each program.
        table: int64, `COLUMNS` of each tensor.
        scalars: fp32, `SCALARS` of each tensor.
        maps: fp32, what codecs look values up in.
        grad_scale: fp32, one.
        found_inf: fp32, one; nothing is written if it is not 0.
        METHOD: One of `optimizer_work.METHODS`.
        READ: Of the parameter: "fp32", "fp16", "bf16", "split" or "" if it is not needed.
        WRITTEN: The same, or "random" for stochastic rounding to bf16.
        GRADIENTS: Of the gradient: "fp32", "fp16", "bf16" or "".
        DIRECTED: "read", "written" or "".
        CODEC_A: Of the first state; "" if there is none.
        CODEC_B: Of the second.
        CODEC_C: Of the third.
        BLOCK_A: Elements that share a scale.
        BLOCK_B: As `BLOCK_A`.
        BLOCK_C: As `BLOCK_A`.
        WIDTH: Elements to a block of the tile, a multiple of the three.
        BLOCKS: How many make a tile.
        TILES: How many a program has.
        FLAT: Rows are whole blocks.
        VECTOR: Elements that addresses are aligned to; and rows, if not `FLAT`.
        GUARDED: Whether to look at `found_inf`.
    """
    program = tl.program_id(0)
    owner = tl.load(owners + program).to(tl.int64)
    entry = table + owner * COLUMNS
    numbers = scalars + owner * SCALARS
    begin = (program - tl.load(entry + FIRST).to(tl.int32)) * (BLOCKS * TILES)
    total = tl.load(entry + TOTAL).to(tl.int32)
    row, across = tl.load(entry + ROW), tl.load(entry + ACROSS).to(tl.int32)
    parameter, correction = tl.load(entry + PARAMETER), tl.load(entry + CORRECTION)
    a_, b_, c_ = entry + STATES, entry + (STATES + 3), entry + (STATES + 6)
    seed = tl.load(entry + SEED)
    if GUARDED:
        if tl.load(found_inf) != 0.0:
            return
    for turn in range(TILES):
        first = begin + turn * BLOCKS
        start, place, inside = tile(first, total, row, across, 1, WIDTH, BLOCKS, FLAT, VECTOR)
        p = tl.zeros((BLOCKS, WIDTH), tl.float32)
        if READ == "split":
            code = tl.load(pointer(correction, start, tl.int8, VECTOR) + place, inside, other=0)
            bits = pointer(parameter, start, tl.uint16, 2 * VECTOR) + place
            p = merge(tl.load(bits, inside, other=0), code)
        elif READ != "":
            p = _load(parameter, start, place, inside, READ, VECTOR)
        g, a, b, c, direction = p, p, p, p, p
        if GRADIENTS != "":
            g = _load(tl.load(entry + GRADIENT), start, place, inside, GRADIENTS, VECTOR)
            g = g * tl.load(grad_scale)
        if DIRECTED == "read":
            direction = _load(tl.load(entry + DIRECTION), start, place, inside, "fp32", VECTOR)
        if CODEC_A != "":
            a0, a1, a2 = fetch_state(
                CODEC_A, BLOCK_A, a_, first, total, row, across, WIDTH, BLOCKS, FLAT, VECTOR
            )
        if CODEC_B != "":
            b0, b1, b2 = fetch_state(
                CODEC_B, BLOCK_B, b_, first, total, row, across, WIDTH, BLOCKS, FLAT, VECTOR
            )
        if CODEC_C != "":
            c0, c1, c2 = fetch_state(
                CODEC_C, BLOCK_C, c_, first, total, row, across, WIDTH, BLOCKS, FLAT, VECTOR
            )
        if CODEC_A != "":
            a = decode_state(CODEC_A, BLOCK_A, a0, a1, a2, maps, WIDTH, BLOCKS)
        if CODEC_B != "":
            b = decode_state(CODEC_B, BLOCK_B, b0, b1, b2, maps, WIDTH, BLOCKS)
        if CODEC_C != "":
            c = decode_state(CODEC_C, BLOCK_C, c0, c1, c2, maps, WIDTH, BLOCKS)
        p, a, b, c, direction = update(METHOD, numbers, p, g, a, b, c, direction)
        if WRITTEN == "split":
            bits, code = split(p)
            tl.store(pointer(parameter, start, tl.uint16, 2 * VECTOR) + place, bits, inside)
            tl.store(pointer(correction, start, tl.int8, VECTOR) + place, code, inside)
        elif WRITTEN != "":
            _store(parameter, start, place, inside, p, seed, WRITTEN, VECTOR)
        if DIRECTED == "written":
            address = tl.load(entry + DIRECTION)
            _store(address, start, place, inside, direction, seed, "fp32", VECTOR)
        if CODEC_A != "":
            store_state(
                CODEC_A,
                BLOCK_A,
                a_,
                a,
                maps,
                first,
                total,
                row,
                across,
                WIDTH,
                BLOCKS,
                FLAT,
                VECTOR,
            )
        if CODEC_B != "":
            if METHOD != "sophia":
                store_state(
                    CODEC_B,
                    BLOCK_B,
                    b_,
                    b,
                    maps,
                    first,
                    total,
                    row,
                    across,
                    WIDTH,
                    BLOCKS,
                    FLAT,
                    VECTOR,
                )
        if CODEC_C != "":
            store_state(
                CODEC_C,
                BLOCK_C,
                c_,
                c,
                maps,
                first,
                total,
                row,
                across,
                WIDTH,
                BLOCKS,
                FLAT,
                VECTOR,
            )
