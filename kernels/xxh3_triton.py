"""Digests of whole units that lie on a GPU: XXH3-128, the same as `kernels/digest.py` gives.

Owns the division of the work: the device turns each unit into its eight accumulators (64 bytes,
`accumulate`, `accumulate_blocks`), the host merges those into digests (`digests`). Launches on
torch's current stream and never waits for the device. Promises that nothing outside the aligned
8-byte words that hold a byte of the unit is read. Does not keep the memory behind an address
alive, nor notice that something else writes to it meanwhile, and does not digest units that are
no multiple of 1 KiB: callers see to all three.

Importing this module imports neither torch nor triton. The first launch of each variant compiles
for about a second; `prepare` does that ahead of time.
"""

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

UNIT_BYTES = 1 << 20
BLOCK_BYTES = 1024
LANES = 8

Words = NDArray[numpy.uint64]

# The default secret of the specification.
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F
_PRIME64_3, _PRIME64_4 = 0x165667B19E3779F9, 0x85EBCA77C2B2AE63
_PRIME64_5 = 0x27D4EB2F165667C5
_AVALANCHE = 0x165667919E3779F9
_WORD = (1 << 64) - 1
# Where the secret is read for the last stripe and for the two merges.
_LAST_STRIPE, _MERGE_LOW, _MERGE_HIGH = 121, 11, 117


def _read(position: int, count: int) -> Words:
    """Words of the secret from any byte on."""
    return numpy.frombuffer(_SECRET, "<u8", count, position).astype(numpy.uint64)


_INITIAL = numpy.array(
    [
        *(_PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3),
        *(_PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1),
    ],
    numpy.uint64,
)
_STRIPE_KEYS = numpy.stack([_read(8 * stripe, LANES) for stripe in range(16)])
_SCRAMBLE_KEYS = _read(128, LANES)
_LAST_KEYS = numpy.concatenate([_STRIPE_KEYS[:15], _read(_LAST_STRIPE, LANES)[None]])


def _signed(words: Words) -> tuple[int, ...]:
    return tuple(words.view(numpy.int64).tolist())


_CONSTANTS = {
    "INITIAL": _signed(_INITIAL),
    "SECRET": _signed(_read(0, 24)),
    "LAST_SECRET": _signed(_LAST_KEYS[-1]),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """How the work is laid out on the device; the digests are the same for all.

    Attributes:
        units: Of one program, a power of two. Few programs leave multiprocessors idle, and many
            units in one need many registers.
        warps: Of one program. With one, a block is added up without shared memory.
        stages: Of the compiler's software pipeline; 1 for none.
    """

    units: int = 2
    warps: int = 1
    stages: int = 1


DEFAULT = Launch()


def available() -> bool:
    """Whether triton can be imported, without importing it. Says nothing about a GPU."""
    return importlib.util.find_spec("triton") is not None


def accumulate(
    addresses: "torch.Tensor",
    accumulators: "torch.Tensor",
    alignment: int,
    *,
    clones: "torch.Tensor | None" = None,
    unit_bytes: int = UNIT_BYTES,
    launch: Launch = DEFAULT,
) -> None:
    """Digest whole units up to the merge, on the current stream, and clone some of them.

    Args:
        addresses: int64 [n]: of units without gaps, in the memory of this tensor's device.
        accumulators: int64 [n, 8], takes the result; unsigned words behind the signed type. On the
            same device, or in pinned host memory: no copy waits behind others then.
        alignment: What every address is a multiple of; 16 or more is fastest, then 8.
        clones: int64 [n], as the addresses: where each unit is copied to by the same pass, at a
            multiple of 16; 0 for nowhere. Only with an alignment of 16.
        unit_bytes: Of each unit, a multiple of 1024; another size compiles anew.
        launch: How to lay out the work.

    Raises:
        ValueError: If a tensor has another shape, type or device, or a number makes no sense.
    """
    _launch(addresses, accumulators, alignment, unit_bytes, launch, clones=clones)


def accumulate_blocks(
    blocks: "torch.Tensor",
    accumulators: "torch.Tensor",
    alignment: int,
    *,
    unit_bytes: int = UNIT_BYTES,
    launch: Launch = DEFAULT,
) -> None:
    """The same as `accumulate` for units in pieces: blocks of 1 KiB, wherever each lies.

    Args:
        blocks: int64 [n, 1024], or as many columns as a unit has blocks: their addresses, in order.
        accumulators: As for `accumulate`.
        alignment: What every address is a multiple of.
        unit_bytes: Of each unit.
        launch: How to lay out the work.

    Raises:
        ValueError: As for `accumulate`.
    """
    _launch(blocks, accumulators, alignment, unit_bytes, launch, scattered=True)


def prepare(device: "torch.device") -> None:
    """Compile every variant for a device and run it once, on memory of its own."""
    import torch

    unit = torch.zeros(UNIT_BYTES, dtype=torch.uint8, device=device)
    addresses = torch.full((1,), unit.data_ptr(), dtype=torch.int64, device=device)
    blocks = torch.full(
        (1, UNIT_BYTES // BLOCK_BYTES), unit.data_ptr(), dtype=torch.int64, device=device
    )
    accumulators = torch.empty((1, LANES), dtype=torch.int64, device=device)
    for alignment in (16, 8, 1):
        accumulate(addresses, accumulators, alignment)
        accumulate_blocks(blocks, accumulators, alignment)
    accumulate(addresses, accumulators, 16, clones=torch.zeros_like(addresses))


def digests(accumulators: Words, unit_bytes: int = UNIT_BYTES) -> bytes:
    """Return the digests of the units that these accumulators were computed from.

    Args:
        accumulators: uint64 [n, 8].
        unit_bytes: Of each unit.

    Returns:
        16 bytes for each unit, equal to `kernels.digest.digest_units`.

    Raises:
        ValueError: If the shape or type is another.
    """
    if accumulators.ndim != 2 or accumulators.shape[1] != LANES or accumulators.dtype != "u8":
        raise ValueError(f"accumulators of {accumulators.dtype} {accumulators.shape}, not u8 [n,8]")
    low = _merge(accumulators, _MERGE_LOW, unit_bytes * _PRIME64_1 & _WORD)
    high = _merge(accumulators, _MERGE_HIGH, ~(unit_bytes * _PRIME64_2) & _WORD)
    return numpy.stack([high, low], axis=1).astype(">u8").tobytes()


def reference_accumulate(units: NDArray[numpy.uint8]) -> Words:
    """What the device must compute, of units in host memory: bytes [n, unit_bytes]."""
    count, unit_bytes = units.shape
    words = units.reshape(count, unit_bytes // BLOCK_BYTES, 16, LANES * 8).view("<u8")
    state = numpy.repeat(_INITIAL[None], count, axis=0)
    for block in range(words.shape[1] - 1):
        state += _contributions(words[:, block], _STRIPE_KEYS)
        state ^= state >> 47
        state ^= _SCRAMBLE_KEYS
        state *= numpy.uint64(_PRIME32_1)
    return state + _contributions(words[:, -1], _LAST_KEYS)


def _contributions(stripes: Words, keys: Words) -> Words:
    """What blocks, [n, stripe, lane], add to the accumulators."""
    mixed = stripes ^ keys
    products = (mixed & 0xFFFFFFFF) * (mixed >> 32)
    swapped = stripes.reshape(len(stripes), 16, LANES // 2, 2)[..., ::-1].reshape(stripes.shape)
    return numpy.asarray((products + swapped).sum(axis=1, dtype=numpy.uint64))


def _merge(accumulators: Words, position: int, start: int) -> Words:
    mixed = accumulators ^ _read(position, LANES)
    folded = _multiply_and_fold(mixed[:, 0::2], mixed[:, 1::2])
    total: Words = folded.sum(axis=1, dtype=numpy.uint64)
    total += numpy.uint64(start)
    total ^= total >> 37
    total *= numpy.uint64(_AVALANCHE)
    total ^= total >> 32
    return total


def _multiply_and_fold(left: Words, right: Words) -> Words:
    """The low half of each 128-bit product, exclusive or the high half."""
    left_low, left_high = left & 0xFFFFFFFF, left >> 32
    right_low, right_high = right & 0xFFFFFFFF, right >> 32
    cross = left_low * right_low >> 32
    cross += left_high * right_low  # at most (2**32 - 1)**2 + 2**32 - 1: no overflow
    carry = cross >> 32
    cross = (cross & 0xFFFFFFFF) + left_low * right_high
    folded: Words = left * right
    folded ^= left_high * right_high + carry + (cross >> 32)
    return folded


def _launch(
    table: "torch.Tensor",
    accumulators: "torch.Tensor",
    alignment: int,
    unit_bytes: int,
    launch: Launch,
    *,
    scattered: bool = False,
    clones: "torch.Tensor | None" = None,
) -> None:
    import torch

    units, blocks = len(table), unit_bytes // BLOCK_BYTES
    _check(table, (units, blocks) if scattered else (units,), "addresses")
    _check(accumulators, (units, LANES), "accumulators")
    if accumulators.device != table.device and not accumulators.is_pinned():
        raise ValueError(f"accumulators on {accumulators.device}, addresses on {table.device}")
    if alignment <= 0 or unit_bytes <= 0 or unit_bytes % BLOCK_BYTES:
        raise ValueError(f"an alignment of {alignment}, units of {unit_bytes} bytes")
    if clones is not None:
        _check(clones, (units,), "clones")
        if alignment % 16:
            raise ValueError(f"clones of units that are aligned to {alignment}, not to 16")
    if not units:
        return
    from everstep.kernels import xxh3_program_triton

    with torch.cuda.device(table.get_device()):
        xxh3_program_triton.accumulate_units[(-(-units // launch.units),)](
            table,
            table if clones is None else clones,
            accumulators,
            units,
            **_CONSTANTS,
            BLOCKS=blocks,
            SCATTERED=scattered,
            ALIGNMENT=16 if alignment % 16 == 0 else 8 if alignment % 8 == 0 else 1,
            CLONES=clones is not None,
            UNITS=launch.units,
            STAGES=launch.stages,
            num_warps=launch.warps,
        )


def _check(tensor: "torch.Tensor", shape: tuple[int, ...], name: str) -> None:
    import torch

    if tensor.dtype != torch.int64 or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} of {tensor.dtype} {tuple(tensor.shape)}, not int64 {shape}")
