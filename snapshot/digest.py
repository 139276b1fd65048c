"""Unit digests of shard images against their records.

Owns the question "are these the bytes that were captured?". Promises that an image is called
intact only if its length and every unit's xxh3_128 equal the record's. Says nothing about whether
the record itself is authentic: that is the envelope's and, between hosts, TLS's part.
"""

from concurrent.futures import Executor

from everstep.kernels.digest import digest_units, verify_units
from everstep.proto.errors import FormatInvalid, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record

DIGEST_BYTES = 16
_UNITS_A_TASK = 32


def unit_count(image_bytes: int, unit_bytes: int = UNIT_BYTES) -> int:
    """How many units an image of this length has."""
    return -(-image_bytes // unit_bytes)


def check_image(
    image: memoryview, record: Record, where: str, executor: Executor | None = None
) -> None:
    """Return only if every byte of the image is what the record says.

    Args:
        image: The shard's image.
        record: Its record, already parsed from an intact envelope.
        where: For the message.
        executor: Spreads the work, which runs without the GIL, over its threads.

    Raises:
        FormatInvalid: If lengths do not fit.
        ShardCorrupt: With the units that differ.
    """
    units = unit_count(record.image_bytes, record.unit_bytes or UNIT_BYTES)
    if len(image) != record.image_bytes:
        raise FormatInvalid(where, f"has {len(image)} bytes instead of {record.image_bytes}")
    if not record.unit_bytes or len(record.unit_digests) != units * DIGEST_BYTES:
        raise FormatInvalid(where, "its record does not have one digest a unit")

    def damaged(first: int) -> list[int]:
        last = min(first + _UNITS_A_TASK, units)
        piece = image[first * record.unit_bytes : last * record.unit_bytes]
        expected = record.unit_digests[first * DIGEST_BYTES : last * DIGEST_BYTES]
        return [first + unit for unit in verify_units(piece, record.unit_bytes, expected)]

    firsts = range(0, units, _UNITS_A_TASK)
    results = executor.map(damaged, firsts) if executor is not None else map(damaged, firsts)
    bad = [unit for part in results for unit in part]
    if bad:
        raise ShardCorrupt(where, tuple(bad))


def check_unit(data: bytes | memoryview, record: Record, unit: int, where: str) -> None:
    """Return only if these are the bytes of one unit of the image.

    Args:
        data: The bytes.
        record: The shard's record, already parsed from an intact envelope.
        unit: Which unit.
        where: For the message.

    Raises:
        ShardCorrupt: If they are not.
    """
    begin = unit * record.unit_bytes
    expected = record.unit_digests[unit * DIGEST_BYTES : (unit + 1) * DIGEST_BYTES]
    right_length = len(data) == min(record.unit_bytes, record.image_bytes - begin)
    if not right_length or verify_units(data, record.unit_bytes, expected):
        raise ShardCorrupt(where, (unit,))


def unit_digest(data: bytes | bytearray | memoryview) -> bytes:
    """The digest of these bytes taken as one unit: 16 bytes."""
    assert 0 < len(data) <= UNIT_BYTES, len(data)
    return digest_units(data, UNIT_BYTES)


def unit_matches(data: bytes | bytearray | memoryview, digest: bytes) -> bool:
    """Whether these bytes, taken as one unit, have this digest."""
    assert 0 < len(data) <= UNIT_BYTES, len(data)
    return not verify_units(data, UNIT_BYTES, digest)
