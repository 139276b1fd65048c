"""Digests of the units of a byte range, and their check.

Owns what a digest is: the XXH3-128 of one unit (default secret, seed 0), 16 bytes in canonical
big-endian order, one after the other. Promises the same bytes on every machine. Guards against
rot and torn writes, not against an attacker.
"""

from typing import TYPE_CHECKING

import xxhash

from everstep.kernels.native import DIGEST_BYTES, Bytes, Isa, library

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def units_in(image_bytes: int, unit_bytes: int) -> int:
    """How many units `image_bytes` make, the last one possibly shorter.

    Raises:
        ValueError: If a size is negative or the unit empty.
    """
    if unit_bytes <= 0 or image_bytes < 0:
        raise ValueError(f"{image_bytes} bytes in units of {unit_bytes} make no sense")
    return -(-image_bytes // unit_bytes)


def digest_units(data: "ReadableBuffer", unit_bytes: int, isa: Isa = 0) -> bytes:
    """Return the digests of all units of `data`, in order.

    Args:
        data: Any contiguous buffer, read-only ones included; it is not copied.
        unit_bytes: The size of a unit.
        isa: Which code to run, see `native.Isa`.
    """
    source = Bytes(data)
    digests = bytearray(units_in(source.bytes, unit_bytes) * DIGEST_BYTES)
    if isa == "reference":
        return _reference_digests(data, unit_bytes)
    target = Bytes(digests, writable=True)
    library.everstep_digest_units(source.address, source.bytes, unit_bytes, target.address, isa)
    return bytes(digests)


def verify_units(
    data: "ReadableBuffer", unit_bytes: int, expected: "ReadableBuffer", isa: Isa = 0
) -> list[int]:
    """Return the indices of the units whose digest is not the expected one.

    Args:
        data: Any contiguous buffer.
        unit_bytes: The size of a unit.
        expected: What `digest_units` returned for the right bytes.
        isa: Which code to run, see `native.Isa`.

    Raises:
        ValueError: If `expected` holds another number of digests than `data` has units.
    """
    source, wanted = Bytes(data), Bytes(expected)
    units = units_in(source.bytes, unit_bytes)
    if wanted.bytes != units * DIGEST_BYTES:
        raise ValueError(f"{wanted.bytes} bytes of digests for {units} units of 16 bytes each")
    if isa == "reference":
        return differing_units(_reference_digests(data, unit_bytes), bytes(expected))
    bad = bytearray(units)
    flags = Bytes(bad, writable=True)
    found = library.everstep_verify_units(
        source.address, source.bytes, unit_bytes, wanted.address, flags.address, isa
    )
    return flagged(bad, 0) if found else []


def flagged(bad: bytearray, first_unit: int) -> list[int]:
    """The units that `bad` marks, where its first byte stands for `first_unit`."""
    return [unit for unit, flag in enumerate(bad, first_unit) if flag]


def differing_units(left: bytes, right: bytes) -> list[int]:
    """The units whose digests differ between two equally long rows of digests."""
    return [
        start // DIGEST_BYTES
        for start in range(0, len(left), DIGEST_BYTES)
        if left[start : start + DIGEST_BYTES] != right[start : start + DIGEST_BYTES]
    ]


def _reference_digests(data: "ReadableBuffer", unit_bytes: int) -> bytes:
    view = memoryview(data).cast("B")
    return b"".join(
        xxhash.xxh3_128_digest(view[start : start + unit_bytes])
        for start in range(0, len(view), unit_bytes)
    )
