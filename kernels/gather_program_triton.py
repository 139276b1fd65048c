"""What the device runs for `kernels/gather_triton.py`: scattered copies and sampled fingerprints.

Owns the Triton code alone. Importing it imports triton; `gather_triton` does so when a launch is
wanted, and checks the arguments. Promises nothing about addresses that are wrong.
"""

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def _copy(target, source, count, WORD: tl.constexpr, STEP: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Copy words; the programs of one piece take turns."""
    targets = tl.multiple_of(target.to(tl.pointer_type(WORD)), ALIGNMENT)
    sources = tl.multiple_of(source.to(tl.pointer_type(WORD)), ALIGNMENT)
    start = tl.program_id(1).to(tl.int64) * STEP
    while start < count:
        place = start + tl.arange(0, STEP)
        inside = place < count
        tl.store(targets + place, tl.load(sources + place, mask=inside), mask=inside)
        start += tl.num_programs(1) * STEP


# Nothing may be specialized on a run-time value: each new one would compile in the training loop.
@triton.jit(do_not_specialize=["pieces"])
def gather_pieces(pieces, STEP: tl.constexpr):
    """Copy one piece; the programs of the second axis share it.

    Args:
        pieces: Rows of (target, source, bytes).
        STEP: How many words a program copies at once.
    """
    row = pieces + tl.program_id(0).to(tl.int64) * 3
    target, source, size = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    both = target | source
    copied = size * 0
    if (both & 15) == 0:
        # Twice the count of pairs: the compiler then knows that a mask never splits 16 bytes.
        pairs = size // 16
        _copy(target, source, pairs * 2, tl.uint64, STEP, 16)
        copied = pairs * 16
    elif (both & 3) == 0:
        _copy(target, source, size // 4, tl.uint32, STEP, 4)
        copied = size // 4 * 4
    _copy(target + copied, source + copied, size - copied, tl.uint8, STEP, 1)


@triton.jit
def _mix(value):
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def _load_anywhere(address, valid, inside):
    """A word of `valid` bytes at any address, from the aligned words that hold one of them."""
    shift = ((address & 7) * 8).to(tl.uint64)
    first = (address & -8).to(tl.pointer_type(tl.uint64))
    last = ((address + valid - 1) & -8).to(tl.pointer_type(tl.uint64))
    low, high = tl.load(first, mask=inside, other=0), tl.load(last, mask=inside, other=0)
    word = (low >> shift) | ((high << 1) << (63 - shift))
    # What `last` put beyond the valid bytes goes here, when it is `first` again.
    ones = tl.full(valid.shape, 0xFFFFFFFFFFFFFFFF, tl.uint64)
    return word & (ones >> ((8 - valid) * 8).to(tl.uint64))


@triton.jit(do_not_specialize=["sources", "fingerprints", "stream"])
def sample_source(sources, fingerprints, stream, SAMPLES: tl.constexpr, PLACES: tl.constexpr):
    """Fingerprint one source; `gather_triton.reference_sample` says how.

    Args:
        sources: Rows of (address, bytes).
        fingerprints: Takes one word for each.
        stream: Of this seed.
        SAMPLES: How many words between the first and the last.
        PLACES: A power of two, at least ``SAMPLES + 2``.
    """
    index = tl.program_id(0).to(tl.int64)
    address, size = tl.load(sources + index * 2), tl.load(sources + index * 2 + 1)
    place = tl.arange(0, PLACES).to(tl.int64)
    number = place.to(tl.uint64)
    start = stream.to(tl.uint64) ^ _mix((-1 - size).to(tl.uint64))
    if (size <= 16) | (size <= 8 * SAMPLES):
        position = place * 8
        words = (size + 7) // 8
    else:
        span = (size - 7).to(tl.uint64)
        position = tl.umulhi(_mix(start + number * GOLDEN), span + number * 0).to(tl.int64)
        position = tl.where(place == 0, 0, tl.where(place > SAMPLES, size - 8, position))
        words = size * 0 + (SAMPLES + 2)
    inside = place < words
    valid = tl.minimum(tl.maximum(size - position, 1), 8)
    word = _load_anywhere(address + position, valid, inside)
    mixed = _mix(word + (number + 1) * GOLDEN)
    total = tl.sum(tl.where(inside, mixed, number * 0), axis=0)
    tl.store(fingerprints + index, _mix(total ^ size.to(tl.uint64)).to(tl.int64))
