"""What a `Work` must be for native code to read and write its tensors.

Owns the rules on sizes, types and contiguity. Promises that a work that passes reaches no memory
beyond its tensors; raises ValueError with the field and its value otherwise. Torch is not imported:
tensors are known by `data_ptr`, `dtype`, `numel`, `is_contiguous` and, if they have one, `device`.
"""

import math
from typing import Any

from everstep.kernels.optimizer_work import CHUNK_ELEMENTS, CODECS, METHODS, CodedState, Work

TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
"""The numbers of what parameters and gradients may be."""

UNBLOCKED = ("fp32", "bf16", "bf16_int8")
"""Codecs without scales."""

_CODES_TYPES = {
    "fp32": ("float32",),
    "bf16": ("bfloat16",),
    "bf16_int8": ("bfloat16",),
    "int8_signed": ("int8",),
    "fp8_signed": ("uint8", "float8_e4m3fn"),
    "fp8_second": ("uint8", "float8_e4m3fn"),
}
_WITHOUT_GRADIENT = ("apply",)
_WITH_DIRECTION = ("adam_direction", "momentum_direction", "apply")
_COUNTED = 2**32
"""Elements that stochastic rounding can tell apart."""


def check(work: Work, method: str, name: str) -> None:
    """Check one work.

    Args:
        work: What is checked.
        method: One of `METHODS`.
        name: What messages call the work.

    Raises:
        ValueError: If it does not fit the method, its codecs or its tensors.
    """
    if work.rows < 0 or work.row < 0:
        raise ValueError(f"{name}.rows, row: {work.rows} x {work.row}")
    elements = work.rows * work.row
    check_tensor(work.parameter, f"{name}.parameter", elements, tuple(TYPES))
    if method not in _WITHOUT_GRADIENT:
        check_tensor(work.gradient, f"{name}.gradient", elements, tuple(TYPES))
    if method in _WITH_DIRECTION:
        check_tensor(work.direction, f"{name}.direction", elements, ("float32",))
    if work.correction is not None:
        check_tensor(work.correction, f"{name}.correction", elements, ("int8",))
        check_tensor(work.parameter, f"{name}.parameter", elements, ("bfloat16",))
    _check_numbers(work, method, name)
    for number, state in enumerate(work.states):
        _check_state(state, work.rows, work.row, f"{name}.states[{number}]")


def check_tensor(tensor: Any, name: str, elements: int, types: tuple[str, ...]) -> None:
    """Check one tensor.

    Raises:
        ValueError: If it is missing, not in host memory, or of another size or type.
    """
    if tensor is None:
        raise ValueError(f"{name}: None, where a tensor of {elements} elements is needed")
    if type_name(tensor.dtype) not in types:
        raise ValueError(f"{name}: {tensor.dtype}, where {' or '.join(types)} is needed")
    if tensor.numel() != elements:
        raise ValueError(f"{name}: {tensor.numel()} elements, where {elements} are needed")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: not contiguous")
    if str(getattr(tensor, "device", "cpu")).partition(":")[0] != "cpu":
        raise ValueError(f"{name}: on {tensor.device}, where host memory is needed")


def type_name(kind: Any) -> str:
    """`float32` for torch's or NumPy's type."""
    return str(kind).rpartition(".")[2]


def _check_numbers(work: Work, method: str, name: str) -> None:
    wanted = METHODS[method]
    for field, found, needed in (
        ("states", work.states, wanted.states),
        ("scalars", work.scalars, wanted.scalars),
    ):
        if len(found) != len(needed):
            raise ValueError(f"{name}.{field}: {len(found)}, where {method} has {needed}")
    if not 0 <= work.seed < 2**64:
        raise ValueError(f"{name}.seed: {work.seed} has more than 64 bits")
    if work.seed and work.rows * work.row > _COUNTED:
        raise ValueError(
            f"{name}.seed: {work.rows * work.row} elements, and random numbers for {_COUNTED}"
        )


def _check_state(state: CodedState, rows: int, row: int, name: str) -> None:
    if state.codec not in CODECS:
        raise ValueError(f"{name}.codec: {state.codec!r} is none of {', '.join(CODECS)}")
    nibbles = state.codec.startswith("fourbit")
    codes = rows * (-(-row // 2) if nibbles else row)
    check_tensor(state.codes, f"{name}.codes", codes, _CODES_TYPES.get(state.codec, ("uint8",)))
    if state.codec == "bf16_int8":
        check_tensor(state.correction, f"{name}.correction", codes, ("int8",))
    if state.codec in UNBLOCKED:
        return
    if state.block < 16 or math.gcd(state.block, CHUNK_ELEMENTS) != state.block:
        raise ValueError(
            f"{name}.block: {state.block} is no divisor of {CHUNK_ELEMENTS} from 16 on"
        )
    numbers = 2 if state.codec.startswith("fp8") else 1
    scales = rows * -(-row // state.block) * numbers
    check_tensor(state.scales, f"{name}.scales", scales, ("float32",))
