"""What a codec is: a few plain tensors in place of one fp32 tensor, and back.

Owns the interface and the arithmetic that codecs share. A state tensor is seen as ``rows x row``:
1-D and 0-D tensors are one row, others have shape[0] rows of the flattened rest. A block is a run
of elements of one row that share a scale; the last one of a row may be short.

Everything is fp32, rounded to nearest even, one operation at a time, in the order that is written
in each codec: the C++ and Triton kernels do the same and give the same bits. So nothing here uses
what contracts or approximates in torch: no addcmul or add(alpha=), no division by a Python number
(CUDA multiplies by the reciprocal), no ``number / tensor`` (which is reciprocal, then product).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch

Role: TypeAlias = Literal["signed", "second", "weight"]
"""What a state is: an average of either sign, a second moment (never negative), a weight."""

ROLES: tuple[Role, ...] = ("signed", "second", "weight")

CODES, SCALES, CORRECTION, COLUMNS = "codes", "scales", "correction", "columns"
PARTS = (CODES, SCALES, CORRECTION, COLUMNS)

REFERENCE_ONLY = "reference:"
"""Begins the kernel names of codecs that kernels do not have."""

SMALLEST_NORMAL = 2.0**-126
_INFINITY_BITS = 0x7F800000


class Form(NamedTuple):
    """What a tensor is like.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class Parts(NamedTuple):
    """The tensors that stand for one state tensor.

    Attributes:
        codes: What has an entry for each element (4-bit codes: for every two).
        scales: fp32 [rows, blocks], or [rows, blocks, 2]; None if the codec has none.
        correction: int8 in the shape of the codes; None if the codec has none.
        columns: fp32 [1, row], scales of columns; None if the codec has none.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """The tensors that there are, by the last part of their key in the optimizer's state."""
        found = zip(PARTS, self, strict=True)
        return {name: tensor for name, tensor in found if tensor is not None}


class Codec(ABC):
    """One way to hold state tensors. A codec is stateless.

    Attributes:
        name: What users write as ``codec=``.
        block: Elements that share a scale unless the group says otherwise; 0 if there are none.
        kernel_names: The codec's name in kernels.optimizer_work.CODECS for each role that kernels
            have; roles that are missing are left to the reference.
        plain: Whether codes are the values themselves, under the state's own name.
        by_rows: Whether a part of the rows is encoded as it is in the whole.
    """

    name: ClassVar[str]
    block: ClassVar[int] = 0
    kernel_names: ClassVar[dict[Role, str]]
    plain: ClassVar[bool] = False
    by_rows: ClassVar[bool] = True

    def encode(self, values: torch.Tensor, role: Role, block: int) -> Parts:
        """Parts for a state tensor of any shape, which need not be contiguous."""
        shape = values.shape
        rows, row = rows_of(shape)
        return self._encode(values.float().reshape(rows, row), role, block, shape)

    def decode(self, parts: Parts, role: Role, block: int, shape: Sequence[int]) -> torch.Tensor:
        """The fp32 state tensor of that shape."""
        rows, row = rows_of(shape)
        return self._decode(parts, role, block, rows, row).reshape(tuple(shape))

    @abstractmethod
    def _encode(self, values: torch.Tensor, role: Role, block: int, shape: torch.Size) -> Parts:
        """Parts of fp32 [rows, row]."""

    @abstractmethod
    def _decode(self, parts: Parts, role: Role, block: int, rows: int, row: int) -> torch.Tensor:
        """fp32 [rows, row]."""

    @abstractmethod
    def forms(self, shape: Sequence[int], role: Role, block: int) -> dict[str, Form]:
        """Shape and dtype of each part of a state tensor of that shape, by the part's name."""

    def bytes_of(self, shape: Sequence[int], role: Role, block: int) -> int:
        """What the parts of a state tensor of that shape take."""
        forms = self.forms(shape, role, block).values()
        return sum(prod(form.shape) * form.dtype.itemsize for form in forms)


def scales_form(shape: Sequence[int], block: int, each: int = 1) -> Form:
    """Of scales that every block has one of, or several."""
    rows, row = rows_of(shape)
    blocks = (rows, blocks_of(row, block))
    return Form(blocks if each == 1 else (*blocks, each), torch.float32)


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and elements of a row, as codecs see a tensor."""
    if len(shape) < 2:
        return 1, int(shape[0]) if shape else 1
    row = 1
    for size in shape[1:]:
        row *= int(size)
    return int(shape[0]), row


def blocks_of(row: int, block: int) -> int:
    """Blocks of one row."""
    return -(-row // block) if block else 0


def in_blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    """[rows, row] as [rows, blocks, block], filled up with zeros."""
    rows, row = values.shape
    blocks = blocks_of(row, block)
    padded = torch.nn.functional.pad(values, (0, blocks * block - row))
    return padded.reshape(rows, blocks, block)


def out_of_blocks(blocks: torch.Tensor, row: int) -> torch.Tensor:
    """[rows, blocks, block] as contiguous [rows, row], without what was filled up."""
    rows, across, block = blocks.shape
    return blocks.reshape(rows, across * block)[:, :row].contiguous()


def largest(blocks: torch.Tensor) -> torch.Tensor:
    """Each block's largest magnitude, NaN (0x7fc00000) if any of it is infinite or NaN.

    It is the maximum of bit patterns, which is exact in any order.
    """
    bits = blocks.abs().view(torch.int32).amax(-1)
    nan = torch.full_like(bits, 0x7FC00000)
    return torch.where(bits >= _INFINITY_BITS, nan, bits).view(torch.float32)


def root_of(values: torch.Tensor) -> torch.Tensor:
    """The square root to nearest even.

    torch's own in fp32 is off by an ulp at times (it is MKL's). A root in fp64, rounded, is exact.
    """
    return values.double().sqrt().float()


def quotient(number: float, scales: torch.Tensor, least: float = SMALLEST_NORMAL) -> torch.Tensor:
    """number / scale where scale >= least, else 0, also where it is NaN."""
    exact = torch.div(torch.full_like(scales, number), scales)
    return torch.where(scales >= least, exact, torch.zeros_like(scales))


def finite_or_zero(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes [rows, blocks, block], 0 in blocks whose scale [rows, blocks] is NaN."""
    return torch.where(scales.isnan().unsqueeze(-1), torch.zeros_like(codes), codes)


def in_table(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    """A table of fp32 numbers where a tensor is."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)
