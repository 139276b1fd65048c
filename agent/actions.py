"""What the agent's decisions ask for: plain data, performed by `agent.pipeline` and `agent.server`.

Owns the vocabulary only. An action never carries tensors or file handles. Actions marked
*before the reply* must have taken effect before the trainer is answered, because the answer
promises them.
"""

from dataclasses import dataclass

from everstep.agent.plans import ParityPlan
from everstep.proto.ids import SnapshotId


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank's shard lies in this node's memory."""

    generation: int
    slot: int


@dataclass(frozen=True, slots=True)
class DropRecord:
    """Withdraw a slot's record, so that the slot claims nothing (before the reply)."""

    job: str
    rank: int
    place: Place


@dataclass(frozen=True, slots=True)
class PublishRecord:
    """Make a sealed shard's record visible beside its slot (before the reply); answered by
    `Recorded` once it is."""

    job: str
    snapshot: SnapshotId
    rank: int
    place: Place
    envelope: bytes


@dataclass(frozen=True, slots=True)
class WriteMembership:
    """Keep the job's incarnation and members beside its arenas (before the reply)."""

    job: str


@dataclass(frozen=True, slots=True)
class ReleaseArena:
    """Give back an arena that a larger one has replaced and that holds nothing needed."""

    job: str
    rank: int
    generation: int


@dataclass(frozen=True, slots=True)
class NotifyCommitted:
    """Tell the job's trainers that a snapshot is committed at a level."""

    job: str
    snapshot: SnapshotId
    level: str


@dataclass(frozen=True, slots=True)
class NotifyDropped:
    """Tell the job's trainers that a snapshot will never commit, and why."""

    job: str
    snapshot: SnapshotId
    reason: str
    drifted: tuple[int, ...] = ()
    """Keys of leaves: see `everstep.snapshot.samples`."""


@dataclass(frozen=True, slots=True)
class Flush:
    """Write a committed snapshot to NVMe; answered by `FlushEnded`. Its slots stay pinned."""

    job: str
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class VerifyAdopted:
    """Check the digests of a snapshot found at the start; answered by `AdoptedVerified`."""

    job: str
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class DeleteDurable:
    """Delete a snapshot that the retention rule no longer keeps on NVMe."""

    job: str
    snapshot: SnapshotId
    reason: str


@dataclass(frozen=True, slots=True)
class Encode:
    """Encode this node's parity of a plan; answered by `Encoded`. The sources stay pinned."""

    plan: ParityPlan


@dataclass(frozen=True, slots=True)
class StopEncoding:
    """A round ended without this node's parity: whatever is under way for it is in vain."""

    job: str
    plan_id: str


@dataclass(frozen=True, slots=True)
class DeleteParity:
    """Free the parity of a round in memory: a newer one is committed, or it never was."""

    job: str
    plan_id: str


@dataclass(frozen=True, slots=True)
class FlushParity:
    """Write a committed round's parity to NVMe, beside the shards that it protects."""

    plan: ParityPlan


Action = (
    DropRecord
    | PublishRecord
    | WriteMembership
    | ReleaseArena
    | NotifyCommitted
    | NotifyDropped
    | Flush
    | VerifyAdopted
    | DeleteDurable
    | Encode
    | StopEncoding
    | DeleteParity
    | FlushParity
)
