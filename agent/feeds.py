"""Bytes held here, as sources of the bulk plane: units of a shard's image or of a row's parity.

Owns opening the files and checking what is asked for against what is there. Promises that a source
names only units that the file has, each with the digest that its record or manifest says, and that
a descriptor is closed with its source, or at once if there will be none. Does not read the bytes:
who receives them checks them. Blocks: call it in a thread.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from everstep.agent import plans
from everstep.agent.sending import FilePiece, Source
from everstep.proto.errors import FormatInvalid, Refused
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.proto.peer_pb2 import ParityUnits, UnitRange
from everstep.proto.state_pb2 import Record
from everstep.snapshot.digest import DIGEST_BYTES
from everstep.storage.parity import ParityImage, protected_snapshot


def shard_feed(
    path: Path,
    offset: int,
    record: Record,
    ranges: Iterable[UnitRange],
    release: Callable[[], None],
) -> Source:
    """Units of a shard's image; their index is that in the image.

    Args:
        path: The file that holds the image.
        offset: Where in it the image begins.
        record: The shard's.
        ranges: Which units, ascending.
        release: Called once, when the file is not needed any more, also if this raises.

    Raises:
        Refused: If the image has no such units.
        FormatInvalid: If the file is gone, or too short.
    """
    try:
        units = units_of(ranges, -(-record.image_bytes // UNIT_BYTES), str(path))
        descriptor = _opened(path, offset + record.image_bytes)
    except BaseException:
        release()
        raise

    def piece(unit: int) -> FilePiece:
        begin = unit * UNIT_BYTES
        length = min(UNIT_BYTES, record.image_bytes - begin)
        digest = _digest(record.unit_digests, unit)
        return FilePiece(unit, descriptor, offset + begin, length, digest)

    def close() -> None:
        try:
            os.close(descriptor)
        finally:
            release()

    return Source([piece(unit) for unit in units], close)


def parity_feed(image: ParityImage, snapshot: SnapshotId, wanted: ParityUnits) -> Source:
    """Units of a row's parity; their index is that in the row's chunk.

    Args:
        image: This node's parity of the plan; is not needed afterwards.
        snapshot: Whose parity it should be.
        wanted: Which units of which row.

    Raises:
        Refused: If there are no such units.
        FormatInvalid: If it is another snapshot's parity, the plan makes no sense, or the file is
            gone or too short.
    """
    where = str(image.path)
    manifest = image.manifest
    if protected_snapshot(manifest) != snapshot:
        raise FormatInvalid(where, f"it is of {protected_snapshot(manifest)}, not of {snapshot}")
    rows = plans.parsed(manifest.plan, where).rows()
    if rows.parity_file_units(manifest.member) * UNIT_BYTES != image.image.nbytes:
        raise FormatInvalid(where, "its length does not follow from its plan")
    try:
        extent = rows.parity_extent(manifest.member, wanted.row)
    except ValueError as error:
        raise Refused(f"{where}: {error}. Nothing was sent.") from error
    units = units_of([wanted.units], len(extent), where)
    descriptor = _opened(image.path, image.offset + image.image.nbytes)

    def piece(unit: int) -> FilePiece:
        held = extent[unit]
        digest = _digest(manifest.unit_digests, held)
        return FilePiece(unit, descriptor, image.offset + held * UNIT_BYTES, UNIT_BYTES, digest)

    return Source([piece(unit) for unit in units], lambda: os.close(descriptor))


def units_of(ranges: Iterable[UnitRange], limit: int, where: str) -> Sequence[int]:
    """The units that are asked for.

    Args:
        ranges: As received.
        limit: How many units there are.
        where: For the message.

    Raises:
        Refused: If they do not ascend, or some are empty or beyond the end.
    """
    units: list[int] = []
    following = 0
    for asked in ranges:
        stop = asked.first + asked.count
        if not asked.count or asked.first < following or stop > limit:
            raise Refused(
                f"{where}: units {asked.first} to {stop} were asked for where {following} to "
                f"{limit} could be. Nothing was sent."
            )
        units += range(asked.first, stop)
        following = stop
    if not units:
        raise Refused(f"{where}: no units were asked for. Nothing was sent.")
    return units


def _opened(path: Path, least_bytes: int) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise FormatInvalid(str(path), f"it cannot be opened: {error}") from error
    if os.fstat(descriptor).st_size < least_bytes:
        os.close(descriptor)
        raise FormatInvalid(str(path), "it is shorter than when it was found")
    return descriptor


def _digest(digests: bytes, unit: int) -> bytes:
    return digests[unit * DIGEST_BYTES : (unit + 1) * DIGEST_BYTES]
