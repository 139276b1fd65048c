"""The FP8 codec with expanded range as device code: COAT, arXiv 2410.19313.

Owns `fp8_encode` and `fp8_decode`, which bring what `optimizer_fp8_words_triton` computes of blocks
to their elements; `client/optim/codecs/fp8.py` states the arithmetic, operation by operation, and
gives the same bits. What a code is worth is looked up, by the power of its block.
"""

import triton
import triton.language as tl

from everstep.kernels import optimizer_lookups
from everstep.kernels.optimizer_fp8_words_triton import (
    fp8_code,
    fp8_row,
    fp8_stretch,
    fp8_value,
)

_VALUES = tl.constexpr(optimizer_lookups.FP8_VALUES)


@triton.jit
def _spread(value, BLOCKS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One value a block as one value an element."""
    wide = tl.broadcast_to(value[:, :, None], (BLOCKS, PARTS, BLOCK))
    return tl.reshape(wide, (BLOCKS, PARTS * BLOCK))


@triton.jit
def fp8_encode(
    x,
    most,
    least,
    SECOND: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes of a tile, uint8; 0 in blocks of NaN.

    Args:
        x: The values.
        most: The largest magnitude of each block.
        least: The smallest that is not 0.
        SECOND: Whether values are never negative.
        BLOCKS: Of the tile.
        PARTS: How many blocks of the codec each of them has.
        BLOCK: Elements to a block of the codec.
    """
    inverse, most, power, offset, ratio = fp8_stretch(most, least)
    return fp8_code(
        x,
        _spread(inverse, BLOCKS, PARTS, BLOCK),
        _spread(most, BLOCKS, PARTS, BLOCK),
        _spread(power, BLOCKS, PARTS, BLOCK),
        _spread(offset, BLOCKS, PARTS, BLOCK),
        _spread(ratio, BLOCKS, PARTS, BLOCK),
        SECOND,
    )


@triton.jit
def fp8_decode(
    code,
    most,
    least,
    maps,
    SECOND: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values of a tile of codes.

    Args:
        code: uint8.
        most: The largest magnitude of each block.
        least: The smallest that is not 0.
        maps: `optimizer_lookups.table`.
        SECOND: As for `fp8_encode`, like the others.
        BLOCKS: See there.
        PARTS: See there.
        BLOCK: See there.
    """
    row = _spread(fp8_row(most, least, maps + _VALUES), BLOCKS, PARTS, BLOCK)
    return _spread(most, BLOCKS, PARTS, BLOCK) * fp8_value(code, row, maps + _VALUES, SECOND)
