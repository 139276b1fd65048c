"""The geometry of a parity group: who holds what, and how much of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.erasure.rows import MAX_MEMBERS, Rows


@st.composite
def some_rows(draw: st.DrawFn) -> Rows:
    units = draw(st.lists(st.integers(0, 60), min_size=2, max_size=18))
    return Rows(tuple(units), draw(st.integers(1, len(units) - 1)))


def test_four_members_one_parity() -> None:
    """Written out by hand, so that the layout cannot change by accident: it is a stored format."""
    rows = Rows((5, 6, 2, 0), 1)
    assert (rows.members, rows.data_symbols, rows.chunk_units) == (4, 3, 2)
    assert [rows.parity_holders(row) for row in range(4)] == [(0,), (1,), (2,), (3,)]
    assert [rows.contributors(row) for row in range(4)] == [
        (1, 2, 3),
        (0, 2, 3),
        (0, 1, 3),
        (0, 1, 2),
    ]
    assert [rows.contribution(0, row) for row in (1, 2, 3)] == [
        range(0, 2),
        range(2, 4),
        range(4, 5),
    ]
    assert [rows.contribution(1, row) for row in (2, 3, 0)] == [
        range(0, 2),
        range(2, 4),
        range(4, 6),
    ]
    assert [len(rows.contribution(2, row)) for row in (3, 0, 1)] == [2, 0, 0]
    assert [rows.parity_units(row) for row in range(4)] == [2, 2, 2, 2]


def test_two_parities_are_held_by_neighbours() -> None:
    rows = Rows((12,) * 6, 2)
    assert [rows.parity_holders(row) for row in (0, 4, 5)] == [(0, 1), (4, 5), (5, 0)]
    assert rows.rows_of(0) == ((0, 0), (5, 1))
    assert rows.rows_of(3) == ((2, 1), (3, 0))
    assert rows.parity_extent(3, 2) == range(0, 3)
    assert rows.parity_extent(3, 3) == range(3, 6)
    assert rows.chunk_of(3, 4) == 0
    assert rows.chunk_of(3, 1) == 3


@given(some_rows())
def test_each_member_holds_one_symbol_of_each_row(rows: Rows) -> None:
    for row in range(rows.members):
        holders, contributors = rows.parity_holders(row), rows.contributors(row)
        assert sorted((*holders, *contributors)) == list(range(rows.members))
        assert (len(holders), len(contributors)) == (rows.parities, rows.data_symbols)
        assert list(contributors) == sorted(contributors)
        symbols = [rows.symbol_of(member, row) for member in (*contributors, *holders)]
        assert symbols == list(range(rows.members))


@given(some_rows())
def test_contributions_are_the_stream_in_pieces(rows: Rows) -> None:
    for member, units in enumerate(rows.member_units):
        chunks = {}
        for row in range(rows.members):
            if member in rows.contributors(row):
                chunks[rows.chunk_of(member, row)] = (row, rows.contribution(member, row))
        assert sorted(chunks) == list(range(rows.data_symbols))
        pieces = [
            (row, offset, unit)
            for _, (row, piece) in sorted(chunks.items())
            for offset, unit in enumerate(piece)
        ]
        assert [unit for _, _, unit in pieces] == list(range(units))
        for row, offset, unit in pieces:
            assert rows.place_of(member, unit) == (row, offset)
            assert offset < rows.chunk_units


@given(some_rows())
def test_parity_is_as_long_as_the_longest_contribution(rows: Rows) -> None:
    for row in range(rows.members):
        lengths = [len(rows.contribution(member, row)) for member in rows.contributors(row)]
        assert rows.parity_units(row) == max(lengths)


@given(some_rows())
def test_the_parity_file_holds_each_row_once(rows: Rows) -> None:
    held = []
    for member in range(rows.members):
        extents = [rows.parity_extent(member, row) for row, _ in rows.rows_of(member)]
        joined = [unit for extent in extents for unit in extent]
        assert joined == list(range(rows.parity_file_units(member)))
        for (row, parity), extent in zip(rows.rows_of(member), extents, strict=True):
            assert rows.parity_holders(row)[parity] == member
            assert len(extent) == rows.parity_units(row)
            held.append((row, parity))
        assert [row for row, _ in rows.rows_of(member)] == sorted(
            r for r, _ in rows.rows_of(member)
        )
    every = [(row, parity) for row in range(rows.members) for parity in range(rows.parities)]
    assert sorted(held) == every


@given(some_rows())
def test_traffic_is_what_the_contributions_say(rows: Rows) -> None:
    sent = [0] * rows.members
    received = [0] * rows.members
    for row in range(rows.members):
        for holder in rows.parity_holders(row):
            for contributor in rows.contributors(row):
                units = len(rows.contribution(contributor, row))
                sent[contributor] += units
                received[holder] += units
    assert [rows.sent_units(member) for member in range(rows.members)] == sent
    assert [rows.received_units(member) for member in range(rows.members)] == received
    assert sent == [rows.parities * units for units in rows.member_units]


@given(some_rows())
def test_memory_and_traffic_stay_within_the_formulas(rows: Rows) -> None:
    """At most m / (p - m) of the largest stream in memory, and m times as much received."""
    largest = max(rows.member_units)
    chunk_units = -(-largest // rows.data_symbols)
    for member in range(rows.members):
        assert rows.parity_file_units(member) <= rows.parities * chunk_units
        assert rows.received_units(member) <= rows.parities * rows.data_symbols * chunk_units


@pytest.mark.parametrize(
    ("members", "parities"), [(2, 1), (4, 1), (4, 2), (8, 1), (8, 2), (16, 2), (255, 3)]
)
def test_equal_streams_cost_what_the_formulas_say(members: int, parities: int) -> None:
    units = 7 * (members - parities)
    rows = Rows((units,) * members, parities)
    for member in (0, members // 2, members - 1):
        assert rows.parity_file_units(member) * (members - parities) == parities * units
        assert rows.received_units(member) == rows.sent_units(member) == parities * units


def test_a_pair_is_a_mirror() -> None:
    rows = Rows((5, 3), 1)
    assert rows.contribution(0, 1) == range(0, 5)
    assert rows.contribution(1, 0) == range(0, 3)
    assert (rows.parity_file_units(0), rows.parity_file_units(1)) == (3, 5)


def test_empty_streams_need_no_parity() -> None:
    rows = Rows((0, 0, 0), 1)
    assert rows.chunk_units == 0
    assert [rows.parity_file_units(member) for member in range(3)] == [0, 0, 0]
    assert rows.contribution(0, 1) == range(0)
    with pytest.raises(ValueError, match="unit 0 of 0"):
        rows.place_of(0, 0)


@pytest.mark.parametrize(
    ("units", "parities"),
    [((), 0), ((), 1), ((1,), 0), ((1,), 1), ((1, 1), 0), ((1, 1), 2), ((1, 1), -1), ((1, -1), 1)],
)
def test_impossible_groups_are_refused(units: tuple[int, ...], parities: int) -> None:
    with pytest.raises(ValueError, match=r"parities|stream"):
        Rows(units, parities)


def test_the_largest_group() -> None:
    assert Rows((1,) * MAX_MEMBERS, 254).data_symbols == 1
    with pytest.raises(ValueError, match="255"):
        Rows((1,) * (MAX_MEMBERS + 1), 2)


def test_positions_outside_the_group_are_refused() -> None:
    rows = Rows((4, 4, 4), 1)
    for position in (-1, 3):
        for ask in (rows.parity_holders, rows.contributors, rows.parity_units, rows.rows_of):
            with pytest.raises(ValueError, match="group of 3"):
                ask(position)
        with pytest.raises(ValueError, match="group of 3"):
            rows.symbol_of(position, 0)
        with pytest.raises(ValueError, match="group of 3"):
            rows.contribution(0, position)
    with pytest.raises(ValueError, match="holds a parity"):
        rows.contribution(0, 0)
    with pytest.raises(ValueError, match="holds no parity"):
        rows.parity_extent(0, 1)
    with pytest.raises(ValueError, match="unit 4 of 4"):
        rows.place_of(1, 4)
