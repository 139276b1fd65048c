"""Which units are needed, and how they are cut and grouped."""

from hypothesis import given
from hypothesis import strategies as st

from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.stretches import Stretch, cut, packed, stretches


def test_stretches() -> None:
    unit = UNIT_BYTES
    ranges = [
        (5 * unit, 6 * unit),
        (0, 1),
        (unit, unit),
        (10, 2 * unit + 1),
        (5 * unit + 3, 7 * unit),
    ]
    assert list(stretches(4, ranges)) == [Stretch(4, 0, 3), Stretch(4, 5, 2)]
    assert [(s.first, s.count) for s in stretches(0, [(0, 7 * unit)], 3)] == [
        (0, 3),
        (3, 3),
        (6, 1),
    ]
    assert list(stretches(0, [])) == []


@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 100))
def test_cuts_are_at_multiples(first: int, count: int, most: int) -> None:
    runs = list(cut(Stretch(2, first, count, 4096), most))
    assert [u for run in runs for u in range(run.first, run.first + run.count)] == list(
        range(first, first + count)
    )
    assert all(run.first // most == (run.first + run.count - 1) // most for run in runs)
    assert all(run.address == 4096 + (run.first - first) * UNIT_BYTES for run in runs)
    # No more of them than there must be.
    assert len(runs) == (first + count - 1) // most - first // most + 1


@given(st.lists(st.integers(1, 9)), st.integers(9, 30))
def test_groups(counts: list[int], most: int) -> None:
    wanted = [Stretch(0, 10 * at, count) for at, count in enumerate(counts)]
    groups = list(packed(wanted, most))
    assert [stretch for group in groups for stretch in group] == wanted
    sizes = [sum(stretch.count for stretch in group) for group in groups]
    assert all(0 < size <= most for size in sizes)
    firsts = [group[0].count for group in groups]
    assert all(size + then > most for size, then in zip(sizes, firsts[1:], strict=False))
