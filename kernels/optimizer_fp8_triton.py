"""The FP8 codec with expanded range as device code: COAT, arXiv 2410.19313.

Owns `fp8_encode` and `fp8_decode`; `client/optim/codecs/fp8.py` states the arithmetic, operation by
operation, and gives the same bits. What a code is worth is looked up, by the power of its block.
"""

import triton
import triton.language as tl

from everstep.kernels import optimizer_lookups
from everstep.kernels.optimizer_fp8_words_triton import (
    fp8_code,
    fp8_power,
    margin_of,
    near_inverse,
)
from everstep.kernels.optimizer_words_triton import look_up

_LEAST = tl.constexpr(2.0**-126)
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
    maps,
    SECOND: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes of a tile; in blocks of NaN they mean nothing.

    Args:
        x: The values.
        most: The largest magnitude of each block.
        least: The smallest that is not 0.
        maps: `optimizer_lookups.table`.
        SECOND: Whether values are never negative.
        BLOCKS: Of the tile.
        PARTS: How many blocks of the codec each of them has.
        BLOCK: Elements to a block of the codec.
    """
    inverse = near_inverse(most)
    # In a block of next to nothing all codes are the least.
    power = tl.where(most >= _LEAST, fp8_power(most, least, maps), 256.0)
    margin = _spread(margin_of(most, power), BLOCKS, PARTS, BLOCK)
    power = _spread(power, BLOCKS, PARTS, BLOCK)
    inverse = _spread(inverse, BLOCKS, PARTS, BLOCK)
    code = fp8_code(x, inverse, _spread(most, BLOCKS, PARTS, BLOCK), power, margin, maps)
    if SECOND:
        code = tl.maximum(code, 1)
    code = tl.where(x == 0.0, 0, code)
    if not SECOND:
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        code = tl.where(code > 0, code | sign, 0)
    return code


@triton.jit
def fp8_decode(
    code,
    most,
    least,
    maps,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values of a tile of codes; arguments as for `fp8_encode`."""
    row = _spread(fp8_power(most, least, maps).to(tl.int32) * 256, BLOCKS, PARTS, BLOCK)
    share = look_up(maps + _VALUES, row + code.to(tl.int32))
    return _spread(most, BLOCKS, PARTS, BLOCK) * share
