"""What the shards of a snapshot say of their replicated leaves, so that drift is noticed.

Owns the bytes of `Record.replica_samples` and their comparison. A *group* is the ranks that hold
replicas of the same leaves; a rank may be in several. The bytes are one block for each group that
the rank is in, ascending by group id, integers big endian::

    group id (4) | count of leaves (4) | plan digest (8) | count x sample of a leaf (8)

Shards that name the same group must have the same plan digest and the same samples; what a shard
says of a group that another one does not name is not compared. The group of all ranks has id 0:
every shard belongs to it, so that one without it counts as one without leaves in it.

Promises that nothing raises, whatever bytes come in: those that do not parse (other versions wrote
other forms) are one opaque group that must be equal everywhere. Does not know what plan digests and
samples are made of, nor who should be in a group: a rank that belongs to one says so even where it
has no leaves in it, else it is not missed. Pure; used by client and agent.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

GROUP_OF_ALL = 0
MAXIMUM_DRIFTED = 1 << 16
"""Leaves that `drifted` names at most; the others are named once these are set apart."""
PLAN_DIGEST_BYTES = 8
SAMPLE_BYTES = 8
_HEADER = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Group:
    """What one rank holds of the replicas of one group.

    Attributes:
        group_id: See `group_id_of`.
        plan_digest: 8 bytes that stand for the leaves and the order of their samples.
        samples: 8 bytes for each leaf.
    """

    group_id: int
    plan_digest: bytes = field(repr=False)
    samples: bytes = field(repr=False)


def group_id_of(participants: Sequence[int]) -> int:
    """The id of a group, the same in every process: `GROUP_OF_ALL`, or never that.

    Two groups of one job that happen to get the same id look drifted apart, or in disagreement:
    that costs storage or a snapshot, never its correctness.

    Args:
        participants: The ranks, ascending; none for all ranks of the world.
    """
    if not participants:
        return GROUP_OF_ALL
    packed = struct.pack(f">{len(participants)}I", *participants)
    digest = int.from_bytes(blake2b(packed, digest_size=4).digest(), "big")
    return digest if digest != GROUP_OF_ALL else 1


def leaf_of(key: int) -> tuple[int, int]:
    """The group id and the index of the leaf in its group that a key of `drifted` names."""
    return key >> 32, key & 0xFFFFFFFF


def encode(groups: Sequence[Group]) -> bytes:
    """The groups of one rank as the bytes of its record."""
    assert len({group.group_id for group in groups}) == len(groups)
    parts = []
    for group in sorted(groups, key=lambda group: group.group_id):
        assert len(group.plan_digest) == PLAN_DIGEST_BYTES
        count, rest = divmod(len(group.samples), SAMPLE_BYTES)
        assert not rest
        parts += [_HEADER.pack(group.group_id, count), group.plan_digest, group.samples]
    return b"".join(parts)


def drifted(all_samples: Iterable[bytes]) -> tuple[int, ...] | None:
    """Which replicated leaves differ between ranks.

    Costs next to nothing where all ranks say the same.

    Args:
        all_samples: `Record.replica_samples` of all shards of a snapshot, in any order.

    Returns:
        A key, `group_id << 32 | index`, for each leaf that differs, ascending, the first
        `MAXIMUM_DRIFTED` of them; None if the ranks of a group disagree on what is replicated.
    """
    distinct = set(all_samples)
    if len(distinct) <= 1:
        return ()
    bodies: dict[int, set[bytes]] = {}
    for samples in distinct:
        blocks = _parsed(samples)
        if blocks is None:
            return None
        for group_id, body in blocks.items():
            bodies.setdefault(group_id, set()).add(body)
        if GROUP_OF_ALL not in blocks:
            bodies.setdefault(GROUP_OF_ALL, set()).add(b"")
    differing = {group_id: _differing(said) for group_id, said in sorted(bodies.items())}
    if any(different is None for different in differing.values()):
        return None
    keys = (
        group_id << 32 | index
        for group_id, different in differing.items()
        for index in _marked(different or b"")
    )
    return tuple(islice(keys, MAXIMUM_DRIFTED))


def _parsed(samples: bytes) -> dict[int, bytes] | None:
    """Plan digest and samples by group id; None if that is not what the bytes are."""
    blocks: dict[int, bytes] = {}
    at = 0
    while at < len(samples):
        if len(samples) - at < _HEADER.size:
            return None
        group_id, count = _HEADER.unpack_from(samples, at)
        begin = at + _HEADER.size
        at = begin + PLAN_DIGEST_BYTES + SAMPLE_BYTES * count
        if at > len(samples) or group_id in blocks:
            return None
        blocks[group_id] = samples[begin:at]
    return blocks


def _differing(bodies: set[bytes]) -> bytes | None:
    """All bodies of a group in one, zeros where they are equal; None if their plans differ."""
    if b"" in bodies:  # only of the group of all ranks: some have no leaves in it, so none may
        if max(map(len, bodies)) > PLAN_DIGEST_BYTES:
            return None
        bodies = bodies - {b""}
    if len(bodies) <= 1:
        return b""
    first = next(iter(bodies))
    plan = first[:PLAN_DIGEST_BYTES]
    if any(len(body) != len(first) or body[:PLAN_DIGEST_BYTES] != plan for body in bodies):
        return None
    reference = int.from_bytes(first, "big")
    different = 0
    for body in bodies:
        different |= reference ^ int.from_bytes(body, "big")
    return different.to_bytes(len(first), "big")


def _marked(different: bytes) -> Iterator[int]:
    """The leaves whose samples are not all zeros."""
    same = bytes(SAMPLE_BYTES)
    for index, at in enumerate(range(PLAN_DIGEST_BYTES, len(different), SAMPLE_BYTES)):
        if different[at : at + SAMPLE_BYTES] != same:
            yield index
