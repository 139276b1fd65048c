"""Where each unit of a parity group lies: rotated rows over the members' streams.

Owns the geometry: which member holds which symbol of which row, which units of a stream are that
symbol, and where in a member's parity file a row's parity lies. Everything follows from the
lengths of the streams and the number of parities, so it is computed, never sent. Counts units; how
many bytes a unit has, and what the symbols hold, it does not know.

Promises: in every row each member holds exactly one symbol, so that the loss of f members is the
loss of f symbols of each row; the contributions of a member are its stream, cut into pieces that
neither overlap nor leave anything out; zeros beyond the end of a stream are never sent.
"""

from dataclasses import dataclass
from functools import cached_property

MAX_MEMBERS = 255


@dataclass(frozen=True)
class Rows:
    """The geometry of one group: as many rows as members, each with `parities` parities.

    Attributes:
        member_units: The length of each member's stream.
        parities: How many members may be lost (m).
    """

    member_units: tuple[int, ...]
    parities: int

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: Unless 1 <= parities < members <= 255 and no length is negative.
        """
        if not 1 <= self.parities < len(self.member_units) <= MAX_MEMBERS:
            raise ValueError(
                f"{self.parities} parities in a group of {len(self.member_units)}: at least one, "
                f"fewer than members, and at most {MAX_MEMBERS} members"
            )
        if min(self.member_units) < 0:
            raise ValueError(f"a stream of {min(self.member_units)} units")

    @property
    def members(self) -> int:
        """How many members the group has, and how many rows (p)."""
        return len(self.member_units)

    @property
    def data_symbols(self) -> int:
        """How many members contribute data to a row (k)."""
        return self.members - self.parities

    @cached_property
    def chunk_units(self) -> int:
        """The longest contribution of a member to a row; 0 if all streams are empty."""
        return -(-max(self.member_units) // self.data_symbols)

    def parity_holders(self, row: int) -> tuple[int, ...]:
        """The members that hold the row's parities, in the order of the parities."""
        self._check(row)
        return tuple((row + parity) % self.members for parity in range(self.parities))

    def contributors(self, row: int) -> tuple[int, ...]:
        """The members that contribute data to the row; the position is the data symbol."""
        holders = self.parity_holders(row)
        return tuple(member for member in range(self.members) if member not in holders)

    def symbol_of(self, member: int, row: int) -> int:
        """Which symbol of the row the member holds: 0..k-1 is data, k + t is parity t."""
        self._check(row)
        self._check(member)
        parity = (member - row) % self.members
        if parity < self.parities:
            return self.data_symbols + parity
        # Contributors below `member`: all members below it, less the parity holders there.
        return member - sum(holder < member for holder in self.parity_holders(row))

    def chunk_of(self, member: int, row: int) -> int:
        """Which chunk of its stream the member contributes to the row; 0..k-1."""
        self._check(row)
        self._check(member)
        chunk = (row - member - 1) % self.members
        if chunk >= self.data_symbols:
            raise ValueError(f"member {member} holds a parity of row {row}, it contributes none")
        return chunk

    def contribution(self, member: int, row: int) -> range:
        """The units of the member's stream that are its symbol of the row; may be empty."""
        return self._chunk(member, self.chunk_of(member, row))

    def parity_units(self, row: int) -> int:
        """How long each parity of the row is: as long as the longest contribution."""
        return max(len(self.contribution(member, row)) for member in self.contributors(row))

    def rows_of(self, member: int) -> tuple[tuple[int, int], ...]:
        """The parities that the member holds, as (row, parity), ascending by row."""
        self._check(member)
        return tuple(
            sorted(((member - parity) % self.members, parity) for parity in range(self.parities))
        )

    def parity_extent(self, member: int, row: int) -> range:
        """Where the row's parity lies in the member's parity file.

        Raises:
            ValueError: If the member holds no parity of this row.
        """
        self._check(row)
        first = 0
        for held, _ in self.rows_of(member):
            units = self.parity_units(held)
            if held == row:
                return range(first, first + units)
            first += units
        raise ValueError(f"member {member} holds no parity of row {row}")

    def parity_file_units(self, member: int) -> int:
        """How many units of parity the member holds, of all its rows."""
        return sum(self.parity_units(row) for row, _ in self.rows_of(member))

    def place_of(self, member: int, unit: int) -> tuple[int, int]:
        """The row that a unit of the member's stream belongs to, and its offset in the symbol.

        Raises:
            ValueError: If the stream has no such unit.
        """
        self._check(member)
        if not 0 <= unit < self.member_units[member]:
            raise ValueError(f"unit {unit} of {self.member_units[member]} of member {member}")
        chunk, offset = divmod(unit, self.chunk_units)
        return (chunk + member + 1) % self.members, offset

    def sent_units(self, member: int) -> int:
        """What the member sends in one round: its stream, once for each parity."""
        self._check(member)
        return self.parities * self.member_units[member]

    def received_units(self, member: int) -> int:
        """What the member receives in one round: the contributions to the rows it encodes."""
        return sum(
            len(self.contribution(contributor, row))
            for row, _ in self.rows_of(member)
            for contributor in self.contributors(row)
        )

    def _chunk(self, member: int, chunk: int) -> range:
        """The units of one chunk of the member's stream, cut at its end."""
        units = self.member_units[member]
        first = min(chunk * self.chunk_units, units)
        return range(first, min(first + self.chunk_units, units))

    def _check(self, position: int) -> None:
        """A row or a member is one of the group's."""
        if not 0 <= position < self.members:
            raise ValueError(f"{position} in a group of {self.members}")
