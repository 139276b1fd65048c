"""Who holds which bytes of the leaves that are equal on all ranks.

Owns the division at capture and the collection at restore; pure arithmetic. The leaves are laid
end to end in the order given and cut in as many nearly equal parts as there are ranks. A leaf
under 64 KiB is never cut; a larger one is cut at multiples of 4096 of its bytes, which are whole
elements of every type and whole pages of the image.

Promises that the parts hold every byte exactly once, that each is within 64 KiB of the mean, and
that equal arguments give equal answers on every rank. Collecting depends on no division: it takes
any ranges, so the number of ranks may have changed since. Does not check that replicas agree.
"""

import heapq
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from everstep.proto.errors import FormatInvalid

CUT_BYTES = 4096
WHOLE_BELOW_BYTES = 64 << 10

Range = tuple[int, int]
Piece = tuple[int, int, int]
"""Rank, start, stop."""


def divide(leaves: Sequence[tuple[str, int, int]], world: int) -> list[dict[str, Range]]:
    """What each rank holds of each leaf.

    Args:
        leaves: Name, bytes and bytes of an element of each.
        world: How many ranks.

    Returns:
        For each rank, start and stop by name; (0, 0) for a leaf that it holds nothing of.
    """
    return [share(leaves, rank, world) for rank in range(world)]


def share(leaves: Sequence[tuple[str, int, int]], rank: int, world: int) -> dict[str, Range]:
    """What one rank holds of each leaf: an item of what `divide` returns, without the others."""
    assert 0 <= rank < world
    assert all(CUT_BYTES % element_bytes == 0 for _, _, element_bytes in leaves)
    begins = list(itertools.accumulate((nbytes for _, nbytes, _ in leaves), initial=0))
    first = _cut(begins, begins[-1] * rank // world)
    last = _cut(begins, begins[-1] * (rank + 1) // world)
    ranges = {}
    for (name, nbytes, _), begin in zip(leaves, begins, strict=False):
        start = min(max(first - begin, 0), nbytes)
        stop = min(max(last - begin, 0), nbytes)
        ranges[name] = (start, stop) if start < stop else (0, 0)
    return ranges


def _cut(begins: list[int], ideal: int) -> int:
    """The allowed place nearest to `ideal`."""
    leaf = bisect_right(begins, ideal) - 1
    if leaf == len(begins) - 1:
        return ideal
    begin, end = begins[leaf], begins[leaf + 1]
    if end - begin < WHOLE_BELOW_BYTES:
        return begin if ideal - begin <= end - ideal else end
    return min(begin + (ideal - begin + CUT_BYTES // 2) // CUT_BYTES * CUT_BYTES, end)


def gather(
    name: str,
    whole_bytes: int,
    holders: Mapping[int, Sequence[Range]],
    own_rank: int | None = None,
) -> list[Piece]:
    """From whom to take which bytes of a leaf, so that each is taken exactly once, in order.

    Args:
        name: The leaf, for the error.
        whole_bytes: Its size.
        holders: By rank, the ranges it holds; they may overlap.
        own_rank: The rank whose copy is nearest, and taken wherever it has one.

    Raises:
        FormatInvalid: If a range is impossible, or some bytes are held by nobody; they are named.
    """
    for rank, ranges in holders.items():
        for start, stop in ranges:
            if not 0 <= start <= stop <= whole_bytes:
                raise FormatInvalid(
                    name, f"rank {rank} claims bytes {start} to {stop} of {whole_bytes}"
                )
    own = () if own_rank is None else holders.get(own_rank, ())
    near = [(start, stop, own_rank or 0) for start, stop in own]
    pieces, missing = _covered(near, 0, whole_bytes)
    if missing:
        far = [
            (start, stop, rank)
            for rank, ranges in holders.items()
            if rank != own_rank
            for start, stop in ranges
        ]
        others, missing = _filled(far, missing)
        pieces = sorted(pieces + others, key=lambda piece: piece[1])
    if missing:
        shown = ", ".join(f"{start} to {stop}" for start, stop in missing[:8])
        more = f" and {len(missing) - 8} more ranges" if len(missing) > 8 else ""
        raise FormatInvalid(name, f"no rank holds its bytes {shown}{more}")
    return pieces


def _filled(
    ranges: Iterable[tuple[int, int, int]], gaps: list[Range]
) -> tuple[list[Piece], list[Range]]:
    """Pieces for the gaps, and the gaps that remain."""
    held, remaining = _covered(ranges, gaps[0][0], gaps[-1][1])
    pieces = _within(held, gaps)
    spans = _within([(0, start, stop) for start, stop in remaining], gaps)
    return pieces, [(start, stop) for _, start, stop in spans]


def _within(pieces: list[Piece], gaps: list[Range]) -> list[Piece]:
    """What of the pieces lies in the gaps; both are in order and do not overlap themselves."""
    result = []
    at = 0
    for rank, start, stop in pieces:
        while at < len(gaps) and gaps[at][1] <= start:
            at += 1
        index = at
        while index < len(gaps) and gaps[index][0] < stop:
            result.append((rank, max(start, gaps[index][0]), min(stop, gaps[index][1])))
            index += 1
    return result


def _covered(
    ranges: Iterable[tuple[int, int, int]], begin: int, end: int
) -> tuple[list[Piece], list[Range]]:
    """Pieces and gaps of [begin, end), always going on with the range that reaches farthest."""
    pieces: list[Piece] = []
    gaps: list[Range] = []
    coming = sorted(ranges, reverse=True)
    reaching: list[tuple[int, int]] = []
    while begin < end:
        while coming and coming[-1][0] <= begin:
            _, stop, rank = coming.pop()
            heapq.heappush(reaching, (-stop, rank))
        if reaching and -reaching[0][0] > begin:
            stop, rank = min(-reaching[0][0], end), reaching[0][1]
            pieces.append((rank, begin, stop))
        else:
            stop = min(coming[-1][0], end) if coming else end
            gaps.append((begin, stop))
        begin = stop
    return pieces, gaps
