"""8-bit codes of companded values: the default.

FlashOptim, arXiv 2602.23349 (databricks/flashoptim): softsign before linear int8 for signed states,
the square root before linear uint8 for second moments. Different: blocks of 64 with fp32 scales
(theirs 32 with fp16, which flushes the scales of tiny gradients to zero), blocks lie within rows,
and a second moment that is not zero never gets the code 0.

Arithmetic, signed, s = max|x| of the block: ``z = clamp(x * r, -1, 1)``, r = 1 / s (0 if
s < 2^-126); ``c = (z + z) / (1 + |z|)``; ``code = rint(c * 127)``. Decode: ``f = float(code)``;
``z = f / (254 - |f|)``; ``x = z * s``.
Second, u = sqrt(v), s = max u: ``code = clamp(rint(u * r), 1, 255)``, r = 255 / s, 0 if u is.
Decode: ``d = s * float32(1 / 255)``; ``u = float(code) * d``; ``v = u * u``.
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
    largest,
    out_of_blocks,
    quotient,
    root_of,
    scales_form,
)
from everstep.kernels.optimizer_tables import single


class Companded(Codec):
    """int8, companded; see the module."""

    name = "int8"
    block = 64
    kernel_names: ClassVar[dict[Role, str]] = {"signed": "int8_signed", "second": "int8_second"}

    def _encode(self, values: torch.Tensor, role: Role, block: int, shape: torch.Size) -> Parts:
        blocks = in_blocks(values, block)
        codes, scales = _second(blocks) if role == "second" else _signed(blocks)
        return Parts(out_of_blocks(codes, values.shape[1]).reshape(shape), scales)

    def _decode(self, parts: Parts, role: Role, block: int, rows: int, row: int) -> torch.Tensor:
        assert parts.scales is not None
        codes = in_blocks(parts.codes.reshape(rows, row), block).float()
        scales = parts.scales.unsqueeze(-1)
        if role == "second":
            root = codes * (scales * single(1 / 255))
            return out_of_blocks(root * root, row)
        z = torch.div(codes, 254.0 - codes.abs())
        return out_of_blocks(z * scales, row)

    def forms(self, shape: Sequence[int], role: Role, block: int) -> dict[str, Form]:
        """Shape and dtype of each part."""
        codes = torch.uint8 if role == "second" else torch.int8
        return {"codes": Form(tuple(shape), codes), "scales": scales_form(shape, block)}


def _signed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = largest(blocks)
    z = (blocks * quotient(1.0, scales).unsqueeze(-1)).clamp(-1.0, 1.0)
    companded = torch.div(z + z, z.abs() + 1.0)
    codes = (companded * 127.0).round().nan_to_num(0.0).to(torch.int8)
    return finite_or_zero(codes, scales), scales


def _second(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    roots = root_of(blocks)
    scales = largest(roots)
    codes = (roots * quotient(255.0, scales).unsqueeze(-1)).round().clamp(1.0, 255.0)
    codes = torch.where(roots == 0, torch.zeros_like(codes), codes).nan_to_num(0.0)
    return finite_or_zero(codes.to(torch.uint8), scales), scales
