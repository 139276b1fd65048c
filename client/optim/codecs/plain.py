"""State as it is: fp32, or rounded to bf16."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from everstep.client.optim.codecs.codec import Codec, Form, Parts, Role


class Plain(Codec):
    """fp32, under the state's own name: what torch's optimizers have."""

    name = "fp32"
    plain = True
    kernel_names: ClassVar[dict[Role, str]] = {
        "signed": "fp32",
        "second": "fp32",
        "weight": "fp32",
    }

    def _encode(self, values: torch.Tensor, role: Role, block: int, shape: torch.Size) -> Parts:
        return Parts(values.clone(memory_format=torch.contiguous_format).reshape(shape))

    def _decode(self, parts: Parts, role: Role, block: int, rows: int, row: int) -> torch.Tensor:
        return parts.codes.clone().reshape(rows, row)

    def forms(self, shape: Sequence[int], role: Role, block: int) -> dict[str, Form]:
        """Shape and dtype of each part."""
        return {"codes": Form(tuple(shape), torch.float32)}


class Bf16(Codec):
    """bfloat16, to nearest even."""

    name = "bf16"
    kernel_names: ClassVar[dict[Role, str]] = {
        "signed": "bf16",
        "second": "bf16",
        "weight": "bf16",
    }

    def _encode(self, values: torch.Tensor, role: Role, block: int, shape: torch.Size) -> Parts:
        return Parts(values.bfloat16().contiguous().reshape(shape))

    def _decode(self, parts: Parts, role: Role, block: int, rows: int, row: int) -> torch.Tensor:
        return parts.codes.float().reshape(rows, row)

    def forms(self, shape: Sequence[int], role: Role, block: int) -> dict[str, Form]:
        """Shape and dtype of each part."""
        return {"codes": Form(tuple(shape), torch.bfloat16)}
