"""Codecs: how optimizers hold their state in fewer bytes.

A codec turns one fp32 tensor into plain tensors and back, whatever the update rule is. One that is
made elsewhere is a subclass of `Codec` and a call of `register`.
"""

from collections.abc import Sequence
from math import prod

from everstep.client.optim.codecs.codec import (
    ROLES,
    Codec,
    Form,
    Parts,
    Role,
    blocks_of,
    rows_of,
)
from everstep.client.optim.codecs.companded import Companded
from everstep.client.optim.codecs.corrected import Corrected
from everstep.client.optim.codecs.dynamic import Dynamic
from everstep.client.optim.codecs.fourbit import FourBit
from everstep.client.optim.codecs.fourbit_rank1 import FourBitRankOne
from everstep.client.optim.codecs.fp8 import Fp8
from everstep.client.optim.codecs.plain import Bf16, Plain
from everstep.kernels.optimizer_work import CHUNK_ELEMENTS
from everstep.proto.errors import InvalidConfiguration

__all__ = [
    "CODECS",
    "ROLES",
    "Codec",
    "Form",
    "Parts",
    "Role",
    "blocks_of",
    "codec_named",
    "left_plain",
    "register",
    "rows_of",
    "valid_block",
]

SMALLEST_BLOCK = 16
SMALLEST_ROW = 16
MIN_ELEMENTS = 4096

CODECS: dict[str, Codec] = {}
"""Every codec by its name."""


def register(codec: Codec) -> None:
    """Make a codec known by its name.

    Raises:
        InvalidConfiguration: If there is one of that name.
    """
    if codec.name in CODECS:
        raise InvalidConfiguration("codec", f"{codec.name!r} is there already")
    CODECS[codec.name] = codec


def codec_named(name: str) -> Codec:
    """The codec of that name.

    Raises:
        InvalidConfiguration: If there is none.
    """
    try:
        return CODECS[name]
    except (KeyError, TypeError):
        problem = f"{name!r} is not one of {', '.join(sorted(CODECS))}"
        raise InvalidConfiguration("codec", problem) from None


def valid_block(codec: Codec, block: int | None) -> int:
    """The block size to use: what is asked for, or the codec's own.

    Raises:
        InvalidConfiguration: If blocks of that size do not fill a kernel's chunk.
    """
    if not block or codec.block == 0:
        return codec.block
    fits = isinstance(block, int) and SMALLEST_BLOCK <= block <= CHUNK_ELEMENTS
    if not fits or CHUNK_ELEMENTS % block:
        raise InvalidConfiguration(
            "block",
            f"{block!r} is not a divisor of {CHUNK_ELEMENTS} that is at least {SMALLEST_BLOCK}: "
            f"kernels hold {CHUNK_ELEMENTS} elements at a time",
        )
    return block


def left_plain(
    codec: Codec, shape: Sequence[int], min_elements: int = MIN_ELEMENTS, *, row_split: bool = False
) -> str:
    """Why states of a parameter of that shape stay fp32 whatever the codec; empty if they do not.

    Args:
        codec: What was asked for.
        shape: The parameter's, of all ranks.
        min_elements: Smaller tensors are left alone: they are cheap, and noise counts most in them.
        row_split: Whether ranks have parts of the parameter's only row.
    """
    if codec.plain:
        return ""
    rows, row = rows_of(shape)
    if rows * row < min_elements:
        return f"{prod(shape)} elements, fewer than {min_elements}"
    if codec.block == 0:
        return ""
    if row < SMALLEST_ROW:
        return f"rows of {row} elements, fewer than {SMALLEST_ROW}"
    return "ranks have parts of its only row" if row_split else ""


for _codec in (
    Plain(),
    Bf16(),
    Corrected(),
    Companded(),
    Dynamic(),
    FourBit(),
    FourBitRankOne(),
    Fp8(),
):
    register(_codec)
