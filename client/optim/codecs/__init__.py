"""Codecs: how optimizers hold their state in fewer bytes.

A codec turns one fp32 tensor into plain tensors and back, whatever the update rule is. One that is
made elsewhere is a subclass of `Codec` and a call of `register`.
"""

from everstep.client.optim.codecs.codec import ROLES, Codec, Parts, Role, blocks_of, rows_of
from everstep.client.optim.codecs.companded import Companded
from everstep.client.optim.codecs.corrected import Corrected
from everstep.client.optim.codecs.dynamic import Dynamic
from everstep.client.optim.codecs.fourbit import FourBit
from everstep.client.optim.codecs.fp8 import Fp8
from everstep.client.optim.codecs.plain import Bf16, Plain
from everstep.kernels.optimizer_work import CHUNK_ELEMENTS

__all__ = [
    "CODECS",
    "ROLES",
    "Codec",
    "Parts",
    "Role",
    "blocks_of",
    "codec_named",
    "register",
    "rows_of",
    "valid_block",
]

SMALLEST_BLOCK = 16

CODECS: dict[str, Codec] = {}
"""Every codec by its name."""


def register(codec: Codec) -> None:
    """Make a codec known by its name.

    Raises:
        ValueError: If there is one of that name.
    """
    if codec.name in CODECS:
        raise ValueError(f"codec={codec.name!r} is there already")
    CODECS[codec.name] = codec


def codec_named(name: str) -> Codec:
    """The codec of that name.

    Raises:
        ValueError: If there is none.
    """
    try:
        return CODECS[name]
    except (KeyError, TypeError):
        known = ", ".join(sorted(CODECS))
        raise ValueError(f"codec={name!r} is not one of {known}") from None


def valid_block(codec: Codec, block: int | None) -> int:
    """The block size to use: what is asked for, or the codec's own.

    Raises:
        ValueError: If blocks of that size do not fill a kernel's chunk.
    """
    if block is None or codec.block == 0:
        return codec.block
    fits = isinstance(block, int) and SMALLEST_BLOCK <= block <= CHUNK_ELEMENTS
    if not fits or CHUNK_ELEMENTS % block:
        raise ValueError(
            f"block={block!r} is not a divisor of {CHUNK_ELEMENTS} that is at least "
            f"{SMALLEST_BLOCK}: kernels hold {CHUNK_ELEMENTS} elements at a time"
        )
    return block


for _codec in (Plain(), Bf16(), Corrected(), Companded(), Dynamic(), FourBit(), Fp8()):
    register(_codec)
