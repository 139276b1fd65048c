"""The record of a shard: what changes from step to step, and travels with each shard.

Owns the check that a record is one of ours and sane. The message is `proto/state.proto`'s
`Record` inside an envelope of kind "record" (`proto/envelope.py` has the bytes). Promises that
what `open_record` returns has passed its digest and that its numbers are in range; says nothing
about the image it describes (see `snapshot/digest.py`).
"""

import xxhash
from google.protobuf.message import DecodeError

from everstep.proto.envelope import open_envelope, seal
from everstep.proto.errors import EverstepError, FormatInvalid
from everstep.proto.ids import MAX_RANKS, checked_name
from everstep.proto.state_pb2 import Record

MAXIMUM_IMAGE_BYTES = 1 << 50


def seal_record(record: Record) -> bytes:
    """The record as an envelope, for the agent and the levels."""
    return seal("record", record.SerializeToString(deterministic=True))


def record_digest(envelope: bytes) -> bytes:
    """What a commit holds of each record: xxh3_128 of the record's body."""
    return xxhash.xxh3_128_digest(open_envelope("record", envelope, "record"))


def open_record(envelope: bytes | memoryview, where: str) -> Record:
    """Parse a record from outside.

    Args:
        envelope: As stored or received.
        where: For the message.

    Raises:
        FormatInvalid: If it is not an intact record of a known version.
    """
    body = open_envelope("record", envelope, where)
    try:
        record = Record.FromString(body)
        checked_name("job", record.job)
    except (DecodeError, EverstepError) as error:
        raise FormatInvalid(where, f"holds no record: {error}") from error
    units = -(-record.image_bytes // record.unit_bytes) if record.unit_bytes else -1
    sane = (
        0 <= record.rank < record.world <= MAX_RANKS
        and record.image_bytes <= MAXIMUM_IMAGE_BYTES
        and len(record.unit_digests) == 16 * units
        and len(record.replica_samples) % 8 == 0
    )
    if not sane:
        raise FormatInvalid(where, "its record contradicts itself")
    return record
