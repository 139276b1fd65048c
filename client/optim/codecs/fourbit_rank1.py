"""4-bit codes whose second moments are scaled by rows and columns: arXiv 2309.01507's rank-1.

v_ij is counted in sixteenths of N_ij = min(max of row i, max of column j), which fits moments whose
size varies by rows and columns better than blocks do. Signed states, and tensors of one row, are as
with `fourbit`. Different from the paper: tensors of more than two dimensions are rows of the
flattened rest (the paper takes the least of one maximum a dimension).

Kernels do not have it: a step takes the reference's time, some twenty times the fused one's.
Columns are of all rows, so a parameter of which ranks have parts is refused; and an infinite or NaN
moment makes its whole row and column NaN.

Arithmetic, second, R and C the maxima: ``N = min(R, C)``; ``k = clamp(rint(v * (16 / N)), 1, 16)``
(16 if N < 2^-120); the code is k - 1. Decode: ``float(code + 1) * (N * 0.0625)``.
Scales are R as [rows, 1], columns are C as [1, row].
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from everstep.client.optim.codecs.codec import REFERENCE_ONLY, Form, Parts, Role, largest, rows_of
from everstep.client.optim.codecs.fourbit import FourBit, counted, packed, unpacked


class FourBitRankOne(FourBit):
    """4-bit codes with rank-1 scales of second moments; see the module."""

    name = "4bit-rank1"
    by_rows = False
    kernel_names: ClassVar[dict[Role, str]] = {
        "signed": "fourbit_signed",
        "second": f"{REFERENCE_ONLY}fourbit_rank1_second",
    }

    def _encode(self, values: torch.Tensor, role: Role, block: int, shape: torch.Size) -> Parts:
        if role != "second" or values.shape[0] == 1 or not values.numel():
            return super()._encode(values, role, block, shape)
        rows, columns = largest(values).unsqueeze(1), largest(values.T.contiguous()).unsqueeze(0)
        scales = torch.minimum(rows, columns)
        codes = counted(values, scales)
        codes = torch.where(scales.isnan(), torch.zeros_like(codes), codes).to(torch.uint8)
        return Parts(packed(codes), rows, None, columns)

    def _decode(self, parts: Parts, role: Role, block: int, rows: int, row: int) -> torch.Tensor:
        if parts.columns is None:
            return super()._decode(parts, role, block, rows, row)
        assert parts.scales is not None
        scales = torch.minimum(parts.scales, parts.columns)
        return (unpacked(parts.codes, row).float() + 1.0) * (scales * 0.0625)

    def forms(self, shape: Sequence[int], role: Role, block: int) -> dict[str, Form]:
        """Shape and dtype of each part."""
        found = super().forms(shape, role, block)
        rows, row = rows_of(shape)
        if role == "second" and rows > 1 and row:
            found["scales"] = Form((rows, 1), torch.float32)
            found["columns"] = Form((1, row), torch.float32)
        return found
