"""State as it is: fp32, or rounded to bf16."""

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch

from everstep.client.optim.codecs.codec import Codec, Parts, Role


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

    def bytes_of(self, shape: Sequence[int], role: Role, block: int) -> int:
        """What the parts of a state tensor of that shape take."""
        return 4 * prod(shape)


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

    def bytes_of(self, shape: Sequence[int], role: Role, block: int) -> int:
        """What the parts of a state tensor of that shape take."""
        return 2 * prod(shape)
