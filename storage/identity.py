"""What stored bytes say they are, checked once at the door.

Owns opening the envelopes of records and commits and comparing what they say with what was asked
for, so that a swapped or misdirected file is refused. Promises that nothing unparsable leaves as
anything but `FormatInvalid`. Does not check a shard's image: digests do that.
"""

from google.protobuf.message import DecodeError

from everstep.kernels.digest import digest_units
from everstep.proto import state_pb2
from everstep.proto.envelope import open_envelope
from everstep.proto.errors import FormatInvalid
from everstep.proto.ids import MAX_RANKS, UNIT_BYTES, SnapshotId

DIGEST_BYTES = 16


def parse_record(envelope: bytes, where: str) -> state_pb2.Record:
    """Open a record's envelope.

    Raises:
        FormatInvalid: If it is damaged, or its numbers contradict each other.
    """
    record = state_pb2.Record()
    _parse("record", record, envelope, where)
    if record.unit_bytes != UNIT_BYTES:
        raise FormatInvalid(where, f"its units have {record.unit_bytes} bytes, not {UNIT_BYTES}")
    if not 0 <= record.rank < record.world <= MAX_RANKS:
        raise FormatInvalid(where, f"rank {record.rank} of a world of {record.world}")
    wanted_bytes = unit_count(record.image_bytes) * DIGEST_BYTES
    if len(record.unit_digests) not in (0, wanted_bytes):
        raise FormatInvalid(where, "the number of unit digests does not fit the image's length")
    return record


def parse_commit(envelope: bytes, where: str) -> state_pb2.Commit:
    """Open a commit's envelope.

    Raises:
        FormatInvalid: If it is damaged, or names a rank twice or outside the world.
    """
    commit = state_pb2.Commit()
    _parse("commit", commit, envelope, where)
    ranks = [shard.rank for shard in commit.shards]
    if len(set(ranks)) != len(ranks) or any(rank >= commit.world for rank in ranks):
        raise FormatInvalid(where, "it names a rank twice or one outside the world")
    return commit


def _parse(
    kind: str, message: state_pb2.Record | state_pb2.Commit, envelope: bytes, where: str
) -> None:
    try:
        message.ParseFromString(open_envelope(kind, envelope, where))
    except DecodeError as error:
        raise FormatInvalid(where, f"its {kind} cannot be parsed: {error}") from error


def snapshot_of(message: state_pb2.Record | state_pb2.Commit) -> SnapshotId:
    """The snapshot that a record or commit belongs to."""
    return SnapshotId(incarnation=message.incarnation, step=message.step)


def check_snapshot(
    message: state_pb2.Record | state_pb2.Commit, job: str, snapshot: SnapshotId, where: str
) -> None:
    """Check that a record or commit is of this job and snapshot.

    Raises:
        FormatInvalid: If it is of another.
    """
    found = snapshot_of(message)
    if message.job != job or found != snapshot:
        raise FormatInvalid(
            where, f"it is of job {message.job!r}, {found}, not of job {job!r}, {snapshot}"
        )


def check_shard(
    record: state_pb2.Record, job: str, snapshot: SnapshotId, rank: int, where: str
) -> None:
    """Check that a record is of this very shard.

    Raises:
        FormatInvalid: If it is of another job, snapshot or rank.
    """
    check_snapshot(record, job, snapshot, where)
    if record.rank != rank:
        raise FormatInvalid(where, f"it is of rank {record.rank}, not of rank {rank}")


def check_image_bytes(record: state_pb2.Record, found_bytes: int, where: str) -> None:
    """Check that an image is as long as its record says.

    Raises:
        FormatInvalid: If it is shorter or longer.
    """
    if found_bytes != record.image_bytes:
        raise FormatInvalid(
            where, f"the image has {found_bytes} bytes, its record says {record.image_bytes}"
        )


def check_digested(record: state_pb2.Record, where: str) -> None:
    """Check that a record carries the digests of its units: only such shards leave memory.

    Raises:
        FormatInvalid: If it does not.
    """
    if record.image_bytes and not record.unit_digests:
        raise FormatInvalid(where, "its units have no digests yet, so it cannot be verified")


def unit_count(image_bytes: int) -> int:
    """How many units an image of this length has."""
    return -(-image_bytes // UNIT_BYTES)


def record_digest(envelope: bytes, where: str) -> bytes:
    """The digest by which a commit names a record: of its body, however that is wrapped."""
    body = open_envelope("record", envelope, where)
    return digest_units(body, max(1, len(body)))


def check_committed(commit: state_pb2.Commit, records: dict[int, bytes], where: str) -> None:
    """Check that what is stored is what a commit says.

    Args:
        commit: The commit.
        records: The plain envelopes of the records stored here, by rank. A level on one node of
            several holds some of the commit's ranks only.
        where: For the message.

    Raises:
        FormatInvalid: If nothing is stored, or a shard is not the one the commit names.
    """
    if not records:
        raise FormatInvalid(where, "no shard of it is stored here")
    named = {shard.rank: shard for shard in commit.shards}
    for rank, envelope in records.items():
        record = parse_record(envelope, where)
        check_shard(record, commit.job, snapshot_of(commit), rank, where)
        shard = named.get(rank)
        if shard is None or record.world != commit.world:
            raise FormatInvalid(where, f"rank {rank} is stored here but not in the commit")
        if (shard.layout_id, shard.image_bytes) != (record.layout_id, record.image_bytes):
            raise FormatInvalid(where, f"rank {rank} has another layout or length than stored")
        if shard.record_digest and shard.record_digest != record_digest(envelope, where):
            raise FormatInvalid(where, f"rank {rank} has another record than the one stored")
