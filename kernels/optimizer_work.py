"""What one optimizer step asks of a kernel: tensors, codecs and scalars, the same for every device.

Owns the names and order of methods, codecs, states and scalars, which the native code, the Triton
programs and their callers share. Promises nothing of its own: it is a table and two records. The
arithmetic of a method is stated in `client/optim/methods`, that of a codec in
`client/optim/codecs`; the kernels give the same bits.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

CHUNK_ELEMENTS = 512
"""Elements of one row that a kernel holds at a time; every block size divides it."""

CODECS = (
    "fp32",
    "bf16",
    "bf16_int8",
    "int8_signed",
    "int8_second",
    "dynamic_signed",
    "dynamic_second",
    "fourbit_signed",
    "fourbit_second",
    "fp8_signed",
    "fp8_second",
)
"""A codec's number is its place here; `_signed` and `_second` are one codec in two roles."""


class Method(NamedTuple):
    """What one update rule reads and writes.

    Attributes:
        states: Names of its states, in the order that kernels take them.
        scalars: Names of its fp32 scalars, in the order that kernels take them.
    """

    states: tuple[str, ...]
    scalars: tuple[str, ...]


_MOMENTS = ("step_size", "decay", "l2", "b1", "c1", "b2", "c2")
_ADAM = (*_MOMENTS, "root", "eps")

METHODS: dict[str, Method] = {
    "adam": Method(("m", "v"), _ADAM),
    "lion": Method(("m",), _MOMENTS),
    "sgd": Method(("m",), ("step_size", "decay", "l2", "momentum", "c1", "x", "y")),
    "ademamix": Method(
        ("fast", "slow", "v"),
        (*_MOMENTS, "b3", "c3", "inverse1", "alpha", "root", "eps"),
    ),
    "exadam": Method(
        ("m", "v"),
        (*_MOMENTS, "inverse1", "inverse2", "b1t", "b2t", "eps"),
    ),
    "sophia": Method(("m", "h"), ("step_size", "decay", "l2", "b1", "c1", "rho")),
    "hessian": Method(("h",), ("b2", "c2")),
    "spam": Method(("m", "v"), (*_ADAM, "theta")),
    "adam_direction": Method(("m", "v"), _ADAM),
    "momentum_direction": Method(("m",), ("b1", "c1", "x", "y")),
    "apply": Method((), ("step_size", "decay")),
}
"""A method's number is its place here."""

STATES_AT_MOST = 3
SCALARS_AT_MOST = 16


@dataclass(slots=True)
class CodedState:
    """One state tensor of one parameter, as it is stored.

    Attributes:
        codec: One of `CODECS`.
        block: Elements that share a scale; 0 if the codec has none.
        codes: The codes; for `fp32` and `bf16` the values themselves. Contiguous.
        scales: fp32, one a block (two for FP8), or None. Contiguous.
        correction: int8, of `bf16_int8` only, or None. Contiguous.
        columns: Scales of columns, of codecs that kernels do not have.
    """

    codec: str
    block: int
    codes: Any
    scales: Any = None
    correction: Any = None
    columns: Any = None


@dataclass(slots=True)
class Work:
    """One parameter's part of a step. Tensors are torch tensors of one device, all contiguous.

    Attributes:
        rows: Rows of the parameter as codecs see it.
        row: Elements of a row.
        parameter: fp32, fp16 or bf16; changed in place.
        gradient: fp32, fp16 or bf16, or None where the method reads none.
        states: In the method's order.
        scalars: In the method's order, already rounded to fp32.
        correction: int8, what the bf16 parameter lacks of its master value, or None.
        direction: fp32, written by the direction methods and read by `apply`, else None.
        seed: Of stochastic rounding, 64 bits; 0 rounds to nearest.
    """

    rows: int
    row: int
    parameter: Any
    gradient: Any
    states: tuple[CodedState, ...]
    scalars: tuple[float, ...]
    correction: Any = None
    direction: Any = None
    seed: int = 0
