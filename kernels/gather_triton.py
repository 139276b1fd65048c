"""Many small copies within a GPU in one launch, and fingerprints of sampled words of GPU memory.

Owns `gather`, whose pieces may have any alignment, and `sample`, the device's counterpart of
`kernels.capture.Sampler`: it looks at the same positions but mixes in its own way
(`reference_sample` is the definition), so the two sorts of fingerprints do not compare. Launches
on torch's current stream and never waits for the device. Promises to write nothing but the
targets, and to read nothing outside the aligned 8-byte words that hold a byte of a source. Does
not keep the memory behind an address alive, nor order pieces that overlap: callers see to both.

Importing this module imports neither torch nor triton. The first launch compiles for about a
second; `prepare` does that ahead of time.
"""

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What one program copies before others are started for the same piece, and how many programs a
# launch has at most: with more, starting those that have nothing to do takes longer than the copy.
PART_BYTES = 32 << 10
MAX_PROGRAMS = 1 << 16
MAX_PARTS = (1 << 16) - 1
STEP_WORDS = 1024
MAX_SAMPLES = 1022

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def gather(pieces: "torch.Tensor", largest_bytes: int) -> None:
    """Copy every piece, on the current stream.

    Args:
        pieces: int64 [n, 3], rows (target, source, bytes), in the memory of this tensor's device.
        largest_bytes: Of the largest piece: more programs share a large one. A hint, no limit.

    Raises:
        ValueError: If the tensor has another shape or type.
    """
    import torch

    _check(pieces, 3)
    if not len(pieces):
        return
    from everstep.kernels import gather_program_triton

    parts = -(-largest_bytes // PART_BYTES)
    parts = max(1, min(parts, MAX_PROGRAMS // len(pieces), MAX_PARTS))
    with torch.cuda.device(pieces.get_device()):
        gather_program_triton.gather_pieces[(len(pieces), parts)](pieces, STEP=STEP_WORDS)


def sample(sources: "torch.Tensor", samples: int, seed: int, fingerprints: "torch.Tensor") -> None:
    """Fingerprint every source, on the current stream.

    Args:
        sources: int64 [n, 2], rows (address, bytes), in the memory of this tensor's device.
        samples: How many words to look at in each besides its first and last; at most
            `MAX_SAMPLES`. Another number compiles anew. A source of up to ``8 * samples`` bytes,
            and any of up to 16, is looked at whole.
        seed: Chooses the words, together with the source's size.
        fingerprints: int64 [n], takes the result; on the same device, or in pinned host memory.

    Raises:
        ValueError: If a tensor has another shape, type or device, or there are too many samples.
    """
    import torch

    _check(sources, 2)
    if fingerprints.dtype != torch.int64 or fingerprints.shape != (len(sources),):
        raise ValueError(f"fingerprints of {fingerprints.dtype} {tuple(fingerprints.shape)}")
    here = fingerprints.device == sources.device or fingerprints.is_pinned()
    if not here or not fingerprints.is_contiguous():
        raise ValueError("fingerprints lie elsewhere than the sources, or with gaps")
    if not 0 <= samples <= MAX_SAMPLES:
        raise ValueError(f"{samples} samples: 0 to {MAX_SAMPLES} are possible")
    if not len(sources):
        return
    from everstep.kernels import gather_program_triton

    with torch.cuda.device(sources.get_device()):
        gather_program_triton.sample_source[(len(sources),)](
            sources,
            fingerprints,
            _stream(seed),
            SAMPLES=samples,
            PLACES=1 << (samples + 1).bit_length(),
            num_warps=1,
        )


def prepare(device: "torch.device", samples: Iterable[int]) -> None:
    """Compile for a device and for these numbers of samples, and run once on memory of its own."""
    import torch

    memory = torch.zeros(64, dtype=torch.uint8, device=device)
    start = memory.data_ptr()
    pieces = torch.tensor([[start, start + 32, 32]], dtype=torch.int64, device=device)
    sources = torch.tensor([[start, 64]], dtype=torch.int64, device=device)
    fingerprints = torch.empty(1, dtype=torch.int64, device=device)
    gather(pieces, 32)
    for count in samples:
        sample(sources, count, 0, fingerprints)


def reference_gather(pieces: Iterable[tuple[int, int, int]]) -> None:
    """What `gather` does, in host memory."""
    for target, source, size in pieces:
        ctypes.memmove(target, source, size)


def reference_sample(sources: Iterable[tuple[int, int]], samples: int, seed: int) -> list[int]:
    """What `sample` computes, unsigned, in host memory.

    Word number i is mixed with i, the results are added up, and the sum is mixed with the size:
    a changed word always changes its share. The words are, in this order, the first 8 bytes, the
    sampled ones, the last 8 bytes; or all, the last filled up with zeros, if the source is short.
    """
    return [
        _reference_fingerprint(ctypes.string_at(address, size) if size else b"", samples, stream)
        for address, size in sources
        for stream in [_stream(seed) ^ _mix(~size & _WORD)]
    ]


def _reference_fingerprint(data: bytes, samples: int, stream: int) -> int:
    size = len(data)
    if size <= max(16, 8 * samples):
        positions = list(range(0, size, 8))
    else:
        steps = ((stream + number * _GOLDEN) & _WORD for number in range(1, samples + 1))
        positions = [0, *((_mix(step) * (size - 7)) >> 64 for step in steps), size - 8]
    total = 0
    for number, position in enumerate(positions, 1):
        word = int.from_bytes(data[position : position + 8], "little")
        total += _mix((word + number * _GOLDEN) & _WORD)
    return _mix((total & _WORD) ^ size)


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def _stream(seed: int) -> int:
    # Within 2**62 and 2**63: Triton chooses a parameter's type by the value, and a seed of another
    # type would compile in the training loop.
    return _mix((seed + 1) & _WORD) >> 2 | 1 << 62


def _check(rows: "torch.Tensor", width: int) -> None:
    import torch

    if rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"rows of {rows.dtype} {tuple(rows.shape)}, not int64 [n, {width}]")
    if not rows.is_contiguous():
        raise ValueError("rows with gaps between them")
