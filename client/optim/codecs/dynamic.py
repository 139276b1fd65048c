"""8-bit codes of bitsandbytes' dynamic map: arXiv 2110.02861.

The map is the library's own to the last bit (`optimizer_tables`), and so is the block of 256. In
the library blocks run over the flattened tensor and a second moment may get the code of zero;
here blocks lie within rows, and a second moment that is not zero never does.

Arithmetic, s = max|x|: ``z = x * r``, r = 1 / s (0 if s < 2^-126); the code is the number of
thresholds between the ascending values that are less than z. Second: if v > 0 and the code's value
is 0, the next code. Decode: ``value[code] * s``.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from everstep.client.optim.codecs.codec import (
    Codec,
    Form,
    Parts,
    Role,
    finite_or_zero,
    in_blocks,
    in_table,
    largest,
    out_of_blocks,
    quotient,
    scales_form,
)
from everstep.kernels.optimizer_tables import DYNAMIC_SECOND, DYNAMIC_SIGNED, thresholds

_SIGNED_THRESHOLDS = thresholds(DYNAMIC_SIGNED)
_SECOND_THRESHOLDS = thresholds(DYNAMIC_SECOND)


class Dynamic(Codec):
    """The dynamic map; see the module."""

    name = "dynamic"
    block = 256
    kernel_names: ClassVar[dict[Role, str]] = {
        "signed": "dynamic_signed",
        "second": "dynamic_second",
    }

    def _encode(self, values: torch.Tensor, role: Role, block: int, shape: torch.Size) -> Parts:
        blocks = in_blocks(values, block)
        scales = largest(blocks)
        z = blocks * quotient(1.0, scales).unsqueeze(-1)
        second = role == "second"
        codes = torch.bucketize(
            z, in_table(_SECOND_THRESHOLDS if second else _SIGNED_THRESHOLDS, z)
        )
        if second:
            codes = torch.where((blocks > 0) & (codes == 0), torch.ones_like(codes), codes)
        codes = finite_or_zero(codes.to(torch.uint8), scales)
        return Parts(out_of_blocks(codes, values.shape[1]).reshape(shape), scales)

    def _decode(self, parts: Parts, role: Role, block: int, rows: int, row: int) -> torch.Tensor:
        assert parts.scales is not None
        codes = in_blocks(parts.codes.reshape(rows, row), block)
        values = in_table(DYNAMIC_SECOND if role == "second" else DYNAMIC_SIGNED, codes)
        return out_of_blocks(values[codes.long()] * parts.scales.unsqueeze(-1), row)

    def forms(self, shape: Sequence[int], role: Role, block: int) -> dict[str, Form]:
        """Shape and dtype of each part."""
        return {"codes": Form(tuple(shape), torch.uint8), "scales": scales_form(shape, block)}
