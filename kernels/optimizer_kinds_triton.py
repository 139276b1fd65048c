"""Which works a launch can take together, and how it is laid out.

Owns `Kind`, what works of one launch have in common, which the device code is compiled for, and the
`Launch` that is best for it. Importing it imports neither torch nor triton.
"""

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from everstep.kernels.optimizer_work import (
    CODECS,
    METHODS,
    STATES_AT_MOST,
    CodedState,
    Work,
)

if TYPE_CHECKING:
    import torch

_PLAIN_WIDTH = 128
_NARROWEST = 16
_BLOCKS = (16, 32, 64, 128, 256, 512)
_WRITES_NO_PARAMETER = frozenset({"hessian", "adam_direction", "momentum_direction"})
_READS_NO_PARAMETER = frozenset({"hessian", "momentum_direction"})


class Launch(NamedTuple):
    """How the work is laid out; every choice gives the same bits, and another one compiles anew.

    Attributes:
        elements: Of a tile, which is what a program holds at a time.
        warps: Of a program.
        tiles: Of a program, one after the other.
    """

    elements: int
    warps: int
    tiles: int = 1


Addresses: TypeAlias = tuple[int, ...]


class Kind(NamedTuple):
    """What the works of one launch have in common, by the names of the program's arguments."""

    READ: str
    WRITTEN: str
    GRADIENTS: str
    CODEC_A: str
    CODEC_B: str
    CODEC_C: str
    BLOCK_A: int
    BLOCK_B: int
    BLOCK_C: int
    WIDTH: int
    FLAT: bool
    VECTOR: int


def layout_of(kind: Kind) -> Launch:
    """The fastest layout on an H100, by `benchmarks.optim_device`.

    Measured for AdamW with fp32 parameters, and taken for what is like it. The longer the code of a
    tile, the smaller tiles are best: instructions are what most codecs wait for.
    """
    codecs = (kind.CODEC_A, kind.CODEC_B, kind.CODEC_C)
    if any(codec.startswith(("fp8", "fourbit")) for codec in codecs):
        launch = Launch(512, 4, 4)
    elif sum(map(bool, (kind.BLOCK_A, kind.BLOCK_B, kind.BLOCK_C))) > 1:
        launch = Launch(1024, 4, 4)
    else:
        launch = Launch(2048, 4)
    # So that each thread has something where it takes more at once than was measured.
    return launch._replace(elements=max(launch.elements, 32 * launch.warps * kind.VECTOR))


def addresses_of(work: Work) -> Addresses:
    """The columns of a work's row that may change: addresses and the seed."""
    found = [
        work.parameter.data_ptr(),
        0 if work.correction is None else work.correction.data_ptr(),
        0 if work.gradient is None else work.gradient.data_ptr(),
        0 if work.direction is None else work.direction.data_ptr(),
        (work.seed & ((1 << 63) - 1)) - (work.seed & 1 << 63),
    ]
    for state in work.states:
        found.append(state.codes.data_ptr())
        found.append(0 if state.scales is None else state.scales.data_ptr())
        found.append(0 if state.correction is None else state.correction.data_ptr())
    return tuple(found)


def alignments_of(addresses: Addresses) -> Addresses:
    """All that a work's kind takes from its addresses."""
    parameter, correction, gradient, direction, seed, *states = addresses
    low = (parameter | correction) & 15, gradient & 15, direction & 15, seed != 0
    return *low, *[address & 15 for address in states]


def kind_of(work: Work, method: str, addresses: Addresses) -> Kind:
    """Which launch a work belongs to.

    Raises:
        ValueError: If it is not what the method works on.
    """
    _check(work, method)
    states = [*work.states, *[_NO_STATE] * (STATES_AT_MOST - len(work.states))]
    _, row = shape_of(work)
    # A block is no wider than a row needs: what is beyond it would be computed for nothing.
    most = max(_NARROWEST, 1 << (row - 1).bit_length())
    blocks = [0 if state.scales is None else min(state.block, most) for state in states]
    width = max(blocks) or _PLAIN_WIDTH
    parameter = _name(work.parameter)
    held = "split" if work.correction is not None else parameter
    written = "random" if work.seed and held == "bf16" else held
    flat = row % width == 0
    return Kind(
        READ="" if method in _READS_NO_PARAMETER else held,
        WRITTEN="" if method in _WRITES_NO_PARAMETER else written,
        GRADIENTS="" if work.gradient is None else _name(work.gradient),
        CODEC_A=states[0].codec,
        CODEC_B=states[1].codec,
        CODEC_C=states[2].codec,
        BLOCK_A=blocks[0],
        BLOCK_B=blocks[1],
        BLOCK_C=blocks[2],
        WIDTH=width,
        FLAT=flat,
        VECTOR=_vector(work, row, flat, addresses),
    )


def shape_of(work: Work) -> tuple[int, int]:
    """Rows and elements of a row; one long row if no state has scales."""
    if any(state.scales is not None for state in work.states):
        return work.rows, work.row
    return 1, work.rows * work.row


def _vector(work: Work, row: int, flat: bool, addresses: Addresses) -> int:
    """How many elements a thread may take at once: those of 16 bytes of the widest type, or 1."""
    sizes = [work.parameter.element_size(), 1]
    sizes += [
        tensor.element_size() for tensor in (work.gradient, work.direction) if tensor is not None
    ]
    sizes += [state.codes.element_size() for state in work.states]
    vector = 16 // max(sizes[0], *sizes[2:], 2)
    if not flat and row % vector:
        return 1
    words = [work.parameter.element_size(), 1, 0, 0, 0]
    words[2] = 0 if work.gradient is None else work.gradient.element_size()
    words[3] = 0 if work.direction is None else work.direction.element_size()
    for state in work.states:
        halved = state.codec.startswith("fourbit")
        words += [0 if halved else state.codes.element_size(), 0, 1]
        if halved and addresses[len(words) - 3] % (vector // 2):
            return 1
    aligned = all(
        address % (vector * word) == 0
        for address, word in zip(addresses, words, strict=True)
        if word
    )
    return vector if aligned else 1


_NO_STATE = CodedState("", 0, None)


def _name(tensor: "torch.Tensor") -> str:
    import torch

    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if tensor.dtype not in names:
        raise ValueError(f"a tensor of {tensor.dtype}: fp32, fp16 and bf16 are possible")
    return names[tensor.dtype]


def _check(work: Work, method: str) -> None:
    wanted = METHODS[method]
    if len(work.states) != len(wanted.states) or len(work.scalars) != len(wanted.scalars):
        raise ValueError(
            f"{method} with {len(work.states)} states and {len(work.scalars)} scalars: it has "
            f"{wanted.states} and {wanted.scalars}"
        )
    tensors = [work.parameter, work.gradient, work.direction, work.correction]
    for state in work.states:
        tensors += [state.codes, state.scales, state.correction]
        if state.codec not in CODECS:
            raise ValueError(f"codec {state.codec!r}: known are {', '.join(CODECS)}")
        if state.scales is not None and (state.block not in _BLOCKS):
            raise ValueError(f"a block of {state.block}: {_BLOCKS} are possible")
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"a tensor {tuple(tensor.shape)} with gaps: {tensor.stride()}")
