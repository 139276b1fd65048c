"""Copies between scattered memory and a shard's image, fused with the digests of its units.

Owns the description of the scattered memory (`Pieces`), the two copies (`capture_units` into the
image, `restore_units` out of it) and the sampled fingerprints that show whether memory was
changed (`Sampler`). Promises that a restored unit matched its digest before its first byte was
written, and that nothing outside the named ranges is touched. Does not keep the memory behind an
address alive, nor notice that something else writes to it meanwhile: callers see to both.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy
import xxhash
from numpy.typing import NDArray

from everstep.kernels.digest import flagged, units_in
from everstep.kernels.native import DIGEST_BYTES, Bytes, Isa, library

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_WORD = (1 << 64) - 1


class Pieces:
    """The memory that an image's bytes come from or go to, ready for native calls.

    Args:
        pieces: One (address, offset in the image, bytes) each, sorted by offset and not
            overlapping; or an array of such rows. Address 0 means, like a gap, that the image's
            own bytes stay as they are, or are not copied out.

    Raises:
        ValueError: If they are unsorted, overlap or are negative.

    Attributes:
        end: One past the last byte of the image that a piece covers.
        address: Of the native array.
    """

    __slots__ = ("_table", "address", "end")

    def __init__(self, pieces: Iterable[tuple[int, int, int]] | NDArray[numpy.int64]) -> None:
        if isinstance(pieces, numpy.ndarray):
            if self._take(pieces[pieces[:, 2] != 0]):
                return
        rows = [(int(piece[0]), int(piece[1]), int(piece[2])) for piece in pieces if piece[2]]
        end = 0
        for address, offset, size in rows:
            if address < 0 or size < 0 or offset < end:
                raise ValueError(
                    f"piece at offset {offset} of {size} bytes: pieces must be sorted by offset "
                    f"and must not overlap, and the one before ends at {end}"
                )
            end = offset + size
        self._table = numpy.array(rows, dtype=numpy.uint64).reshape(len(rows), 3)
        self.address = int(self._table.ctypes.data)
        self.end = end

    def _take(self, rows: NDArray[numpy.int64]) -> bool:
        """Take rows as they are if they are in order; a million of them at once."""
        ends = rows[:, 1] + rows[:, 2]
        if (rows < 0).any() or (rows[1:, 1] < ends[:-1]).any():
            return False
        self._table = numpy.ascontiguousarray(rows, dtype=numpy.uint64)
        self.address = int(self._table.ctypes.data)
        self.end = int(ends[-1]) if len(ends) else 0
        return True

    def __len__(self) -> int:
        return len(self._table)

    def overlaps(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The (address, offset, bytes) of what pieces with an address cover in a range."""
        for row in self._table:
            address, offset, size = map(int, row)
            start, stop = max(begin, offset), min(end, offset + size)
            if address and start < stop:
                yield address + start - offset, start, stop - start


def capture_units(
    pieces: Pieces,
    image_address: int,
    image_bytes: int,
    unit_bytes: int,
    first_unit: int,
    unit_count: int,
    digests: bytearray | memoryview | None,
    isa: Isa = 0,
) -> None:
    """Copy a range of units from the pieces into the image, and write their digests.

    Units may be captured by several threads at once, also into one `digests`. Fastest where the
    image and the unit are multiples of 64 bytes: then each byte is read once, and stored without
    first being fetched into a cache.

    Args:
        pieces: Where the bytes come from.
        image_address: Of the image's first byte.
        image_bytes: The image's length.
        unit_bytes: The size of a unit.
        first_unit: The first unit of the range.
        unit_count: How many there are.
        digests: Takes 16 bytes for each unit of the whole image; None to copy only.
        isa: Which code to run, see `native.Isa`.

    Raises:
        ValueError: If a range does not fit the image, or `digests` has the wrong length.
    """
    total = _check_range(pieces, image_bytes, unit_bytes, first_unit, unit_count)
    target = None if digests is None else _digest_row(digests, total, writable=True)
    if isa == "reference":
        last = first_unit + unit_count
        for unit, begin, end in _units(image_bytes, unit_bytes, first_unit, last):
            for address, offset, size in pieces.overlaps(begin, end):
                ctypes.memmove(image_address + offset, address, size)
            if digests is not None:
                row = unit * DIGEST_BYTES
                digests[row : row + DIGEST_BYTES] = _digest_at(image_address, begin, end)
        return
    library.everstep_capture_units(
        pieces.address,
        len(pieces),
        image_address,
        image_bytes,
        unit_bytes,
        first_unit,
        unit_count,
        None if target is None else target.address,
        isa,
    )


def restore_units(
    pieces: Pieces,
    image_address: int,
    image_bytes: int,
    unit_bytes: int,
    first_unit: int,
    unit_count: int,
    expected: "ReadableBuffer",
    isa: Isa = 0,
) -> list[int]:
    """Check a range of units and copy those that match their digest out to the pieces.

    Args:
        pieces: Where the bytes go.
        image_address: Of the image's first byte; only read.
        image_bytes: The image's length.
        unit_bytes: The size of a unit.
        first_unit: The first unit of the range.
        unit_count: How many there are.
        expected: The digests of all units of the image.
        isa: Which code to run, see `native.Isa`.

    Returns:
        The units that do not match. Nothing of them was copied.

    Raises:
        ValueError: If a range does not fit the image, or `expected` has the wrong length.
    """
    total = _check_range(pieces, image_bytes, unit_bytes, first_unit, unit_count)
    wanted = _digest_row(expected, total)
    if isa == "reference":
        return _reference_restore(
            pieces, image_address, image_bytes, unit_bytes, first_unit, unit_count, bytes(expected)
        )
    bad = bytearray(unit_count)
    flags = Bytes(bad, writable=True)
    found = library.everstep_restore_units(
        pieces.address,
        len(pieces),
        image_address,
        image_bytes,
        unit_bytes,
        first_unit,
        unit_count,
        wanted.address,
        flags.address,
        isa,
    )
    return flagged(bad, first_unit) if found else []


class Sampler:
    """Fingerprints of memory, taken from a few words of each source.

    Equal memory gives equal fingerprints; memory that was changed gives different ones only if a
    sampled word was hit, so take another seed each time.

    Args:
        addresses: Of the sources.
        sizes: In bytes, one for each source.

    Raises:
        ValueError: If the two differ in length, or a source has bytes but no address.
    """

    __slots__ = ("_addresses", "_sizes")

    def __init__(self, addresses: Sequence[int], sizes: Sequence[int]) -> None:
        if len(addresses) != len(sizes):
            raise ValueError(f"{len(addresses)} addresses and {len(sizes)} sizes")
        for address, size in zip(addresses, sizes, strict=True):
            if size < 0 or (size and address <= 0):
                raise ValueError(f"a source of {size} bytes at address {address}")
        self._addresses = numpy.array(addresses, dtype=numpy.uint64)
        self._sizes = numpy.array(sizes, dtype=numpy.uint64)

    def __len__(self) -> int:
        return len(self._sizes)

    def fingerprints(self, samples: int, seed: int, isa: Isa = 0) -> bytes:
        """Return 8 little-endian bytes for each source.

        The first and last 8 bytes are always looked at. A source of up to ``8 * samples`` bytes,
        and any of up to 16, is hashed whole.

        Args:
            samples: How many words of 8 bytes to look at in each source.
            seed: Chooses the words, together with the source's size: not with its place among the
                others, which may be another one on another rank.
            isa: "reference" for the Python reference; the native code knows no other choice.
        """
        seed &= _WORD
        if isa == "reference":
            sources = zip(self._addresses.tolist(), self._sizes.tolist(), strict=True)
            return b"".join(
                _reference_fingerprint(address, size, samples, _stream(seed, size))
                for address, size in sources
            )
        result = numpy.empty(len(self), dtype="<u8")
        library.everstep_sample(
            self._addresses.ctypes.data,
            self._sizes.ctypes.data,
            len(self),
            samples,
            seed,
            result.ctypes.data,
        )
        return result.tobytes()


def _check_range(
    pieces: Pieces, image_bytes: int, unit_bytes: int, first_unit: int, count: int
) -> int:
    total = units_in(image_bytes, unit_bytes)
    if first_unit < 0 or count < 0 or first_unit + count > total:
        raise ValueError(f"units {first_unit} to {first_unit + count} of an image of {total}")
    if pieces.end > image_bytes:
        raise ValueError(f"pieces end at {pieces.end}, the image at {image_bytes}")
    return total


def _digest_row(digests: "ReadableBuffer", units: int, writable: bool = False) -> Bytes:
    row = Bytes(digests, writable)
    if row.bytes != units * DIGEST_BYTES:
        raise ValueError(f"{row.bytes} bytes of digests for {units} units of 16 bytes each")
    return row


def _units(
    image_bytes: int, unit_bytes: int, first_unit: int, last_unit: int
) -> Iterator[tuple[int, int, int]]:
    for unit in range(first_unit, last_unit):
        yield unit, unit * unit_bytes, min(image_bytes, (unit + 1) * unit_bytes)


def _digest_at(image_address: int, begin: int, end: int) -> bytes:
    return xxhash.xxh3_128_digest(ctypes.string_at(image_address + begin, end - begin))


def _reference_restore(
    pieces: Pieces,
    image_address: int,
    image_bytes: int,
    unit_bytes: int,
    first_unit: int,
    count: int,
    expected: bytes,
) -> list[int]:
    bad = []
    for unit, begin, end in _units(image_bytes, unit_bytes, first_unit, first_unit + count):
        row = unit * DIGEST_BYTES
        if _digest_at(image_address, begin, end) != expected[row : row + DIGEST_BYTES]:
            bad.append(unit)
            continue
        for address, offset, size in pieces.overlaps(begin, end):
            ctypes.memmove(address, image_address + offset, size)
    return bad


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def _stream(seed: int, size: int) -> int:
    return _mix((seed + 1) & _WORD) ^ _mix(~size & _WORD)


def _reference_fingerprint(address: int, size: int, samples: int, stream: int) -> bytes:
    data = ctypes.string_at(address, size) if size else b""
    if size <= max(16, 8 * samples):
        return xxhash.xxh3_128_digest(data)[:7:-1]

    def word(position: int) -> int:
        return int.from_bytes(data[position : position + 8], "little")

    state = _mix(word(0) ^ size)
    for _ in range(samples):
        stream = (stream + 0x9E3779B97F4A7C15) & _WORD
        state = _mix((state + word((_mix(stream) * (size - 7)) >> 64)) & _WORD)
    return _mix((state + word(size - 8)) & _WORD).to_bytes(8, "little")
