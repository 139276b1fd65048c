"""bf16 and what it lacks of the fp32 number, as int8: 24 bits of precision less one.

FlashOptim's split of master weights (arXiv 2602.23349): the correction counts 127ths of half a unit
in the last place of the bf16 number, which is as far as rounding to nearest can be off.

Arithmetic: ``t = bf16(p)`` to nearest even; E = the biased exponent of t. If E < 9 or t is infinite
or NaN, the code is 0 (half a unit is too small, or there is nothing to correct). Else ``h =
float_of_bits((E - 8) << 23)``, half a unit; ``code = rint(((p - t) / h) * 127)``, clamped to +-127.
Decode: ``float(t) + float(code) * (h * float32(1 / 127))``, with h = 0 where E < 9.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from everstep.client.optim.codecs.codec import Codec, Form, Parts, Role
from everstep.kernels.optimizer_tables import single

_LEAST_EXPONENT = 9
_NOT_FINITE = 255


class Corrected(Codec):
    """bf16 + int8; see the module. Meant for weights, but any state may be held so."""

    name = "bf16+8"
    kernel_names: ClassVar[dict[Role, str]] = {
        "signed": "bf16_int8",
        "second": "bf16_int8",
        "weight": "bf16_int8",
    }

    def _encode(self, values: torch.Tensor, role: Role, block: int, shape: torch.Size) -> Parts:
        rounded, correction = split(values)
        return Parts(rounded.reshape(shape), None, correction.reshape(shape))

    def _decode(self, parts: Parts, role: Role, block: int, rows: int, row: int) -> torch.Tensor:
        assert parts.correction is not None
        return joined(parts.codes, parts.correction).reshape(rows, row)

    def forms(self, shape: Sequence[int], role: Role, block: int) -> dict[str, Form]:
        """Shape and dtype of each part."""
        return {
            "codes": Form(tuple(shape), torch.bfloat16),
            "correction": Form(tuple(shape), torch.int8),
        }


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 as bf16 and int8, both contiguous."""
    rounded = values.bfloat16().contiguous()
    near = rounded.float()
    half = _half_unit(near)
    counted = (torch.div(values - near, half) * 127.0).round().clamp(-127.0, 127.0)
    correction = torch.where(half > 0, counted, torch.zeros_like(counted)).to(torch.int8)
    return rounded, correction.contiguous()


def joined(rounded: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers that bf16 and int8 stand for."""
    near = rounded.float()
    return near + correction.float() * (_half_unit(near) * single(1 / 127))


def _half_unit(near: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of bf16 numbers; 0 where nothing is corrected."""
    exponent = (near.view(torch.int32) >> 23) & 255
    half = ((exponent - (_LEAST_EXPONENT - 1)) << 23).view(torch.float32)
    corrected = (exponent >= _LEAST_EXPONENT) & (exponent < _NOT_FINITE)
    return torch.where(corrected, half, torch.zeros_like(half))
