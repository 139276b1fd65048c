"""What the device runs for `kernels/xxh3_triton.py`: XXH3's accumulators of whole units.

Owns the Triton code alone, written after github.com/Cyan4973/xxHash, doc/xxhash_spec.md. Importing
it imports triton; `xxh3_triton` does so when a launch is wanted, and checks the arguments.
Promises nothing about addresses that are wrong.

The sixteen stripes of a block only add to the accumulators, so the threads of a warp share a block
(one coalesced read of 1 KiB) and add up; the scramble after the block is what goes in sequence.
Even and odd lanes are kept apart: a value also goes to its neighbour's accumulator, and a thread
that reads both lanes of a pair needs no other thread for that. Units are the last axis: where
nothing is contiguous, the compiler gives neighbouring threads neighbours along the first.
"""

import triton
import triton.language as tl

STRIPES = tl.constexpr(16)
LANES = tl.constexpr(8)
PAIRS = tl.constexpr(4)
BLOCK_BYTES = tl.constexpr(1024)
PRIME32_1 = tl.constexpr(0x9E3779B1)
LOW_HALF = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _words(index, WORDS: tl.constexpr):
    """Look up constants, so that no table has to be brought to the device and kept alive there."""
    word = tl.zeros_like(index).to(tl.int64)
    for place in tl.static_range(len(WORDS)):
        word = tl.where(index == place, WORDS[place], word)
    return word.to(tl.uint64)


@triton.jit
def _pairs_aligned(address, clone, CLONES: tl.constexpr, UNITS: tl.constexpr):
    """Both lanes of each pair of blocks at multiples of 16: loads of 16 bytes; copied on the way
    to where a block is to be cloned."""
    place = tl.arange(0, STRIPES * LANES)[:, None]
    block = tl.multiple_of(address.to(tl.pointer_type(tl.uint64)), 16)
    words = tl.load(block[None, :] + place)
    if CLONES:
        target = tl.multiple_of(clone.to(tl.pointer_type(tl.uint64)), 16)
        tl.store(target[None, :] + place, words, mask=(clone != 0)[None, :])
    pairs = words.reshape(STRIPES, PAIRS, 2, UNITS)
    return tl.split(pairs.permute(0, 1, 3, 2))


@triton.jit
def _pairs_of_words(address, UNITS: tl.constexpr):
    """Both lanes of each pair of blocks at multiples of 8: a load for each lane."""
    even = address.to(tl.pointer_type(tl.uint64))[None, :] + _even_places()
    first, second = tl.load(even), tl.load(even + 1)
    return first.reshape(STRIPES, PAIRS, UNITS), second.reshape(STRIPES, PAIRS, UNITS)


@triton.jit
def _pairs_anywhere(address, UNITS: tl.constexpr):
    """Both lanes of each pair of blocks at any address, put together from aligned words.

    No aligned word is touched that holds no byte of the block: where the block is aligned after
    all, the third load repeats the second, and the shift by 1 + 63 drops it.
    """
    shift = ((address & 7) * 8).to(tl.uint64)[None, :]
    even = (address & -8).to(tl.pointer_type(tl.uint64))[None, :] + _even_places()
    third = even + (1 + ((address & 7) != 0).to(tl.int32)[None, :])
    first_word, second_word, third_word = tl.load(even), tl.load(even + 1), tl.load(third)
    first = (first_word >> shift) | ((second_word << 1) << (63 - shift))
    second = (second_word >> shift) | ((third_word << 1) << (63 - shift))
    return first.reshape(STRIPES, PAIRS, UNITS), second.reshape(STRIPES, PAIRS, UNITS)


@triton.jit
def _even_places():
    """Where the even lanes lie in a block."""
    return (tl.arange(0, STRIPES * PAIRS) * 2)[:, None]


@triton.jit
def _product(value, key):
    mixed = value ^ key
    return (mixed & LOW_HALF) * (mixed >> 32)


@triton.jit
def _sums(
    address,
    clone,
    even_key,
    odd_key,
    ALIGNMENT: tl.constexpr,
    CLONES: tl.constexpr,
    UNITS: tl.constexpr,
):
    """What one block adds to the even and to the odd accumulators."""
    if ALIGNMENT == 16:
        even, odd = _pairs_aligned(address, clone, CLONES, UNITS)
    elif ALIGNMENT == 8:
        even, odd = _pairs_of_words(address, UNITS)
    else:
        even, odd = _pairs_anywhere(address, UNITS)
    return (
        tl.sum(_product(even, even_key) + odd, axis=0),
        tl.sum(_product(odd, odd_key) + even, axis=0),
    )


@triton.jit
def _scramble(accumulator, key):
    return (accumulator ^ (accumulator >> 47) ^ key) * PRIME32_1


# Nothing may be specialized on a run-time value: each new one would compile in the training loop.
@triton.jit(do_not_specialize=["table", "clones", "accumulators", "unit_count"])
def accumulate_units(
    table,
    clones,
    accumulators,
    unit_count,
    INITIAL: tl.constexpr,
    SECRET: tl.constexpr,
    LAST_SECRET: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCATTERED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CLONES: tl.constexpr,
    UNITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Digest `UNITS` units up to, not including, the merge of their eight accumulators.

    Args:
        table: An address for each unit, or with `SCATTERED` for each of its blocks.
        clones: With `CLONES`, where each unit is copied to, at multiples of 16; 0 for nowhere.
        accumulators: Takes eight words for each of `unit_count` units.
        INITIAL: The accumulators to begin with.
        SECRET: The 24 words of the secret, as signed numbers.
        LAST_SECRET: The eight words of the secret for the last stripe, likewise.
        BLOCKS: Of 1 KiB, in a unit.
        SCATTERED: Whether the blocks of a unit lie apart.
        ALIGNMENT: 16, 8 or 1: what all addresses are multiples of.
        CLONES: Whether units are copied; only with an alignment of 16, and not `SCATTERED`.
        UNITS: Of one program, a power of two; `STAGES` of its pipeline, 1 for none.
    """
    row = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    # The rows past the end repeat the last unit and are not stored: no load needs a mask.
    inner = tl.minimum(row, unit_count - 1).to(tl.int64)
    entry = table + inner * (BLOCKS if SCATTERED else 1)
    stripe = tl.arange(0, STRIPES)[:, None, None]
    pair = tl.arange(0, PAIRS)[:, None]
    place = stripe + 2 * pair[None, :, :]
    even_key, odd_key = _words(place, SECRET), _words(place + 1, SECRET)
    even_scramble = _words(2 * pair + STRIPES, SECRET)
    odd_scramble = _words(2 * pair + (STRIPES + 1), SECRET)
    zero = tl.zeros((PAIRS, UNITS), tl.uint64)
    even = zero + _words(2 * pair, INITIAL)
    odd = zero + _words(2 * pair + 1, INITIAL)

    address = tl.load(entry)
    clone = tl.load(clones + inner) if CLONES else address
    clone_step = tl.where(clone != 0, BLOCK_BYTES, 0)
    for block in tl.range(0, BLOCKS - 1, num_stages=STAGES):
        if SCATTERED:
            following = tl.load(entry + (block + 1))  # early: the next loads need it
        else:
            following = address + BLOCK_BYTES
        more_even, more_odd = _sums(address, clone, even_key, odd_key, ALIGNMENT, CLONES, UNITS)
        even = _scramble(even + more_even, even_scramble)
        odd = _scramble(odd + more_odd, odd_scramble)
        address = following
        clone += clone_step

    # A unit ends with a whole block, whose last stripe has a key of its own; no scramble follows.
    last = stripe == STRIPES - 1
    even_key = tl.where(last, _words(2 * pair, LAST_SECRET)[None, :, :], even_key)
    odd_key = tl.where(last, _words(2 * pair + 1, LAST_SECRET)[None, :, :], odd_key)
    more_even, more_odd = _sums(address, clone, even_key, odd_key, ALIGNMENT, CLONES, UNITS)

    inside = (row < unit_count)[None, :]
    target = accumulators + (row.to(tl.int64)[None, :] * LANES + 2 * pair)
    tl.store(target, (even + more_even).to(tl.int64), mask=inside)
    tl.store(target + 1, (odd + more_odd).to(tl.int64), mask=inside)
