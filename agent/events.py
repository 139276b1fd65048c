"""What happens to the agent: plain data, fed to `agent.state.State.handle`.

Owns the vocabulary only. Everything a decision needs is in the event: whether a process is alive
was looked up before, the time is passed beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from everstep.agent.actions import Place
from everstep.agent.plans import ParityPlan
from everstep.proto.ids import SnapshotId


@dataclass(frozen=True, slots=True)
class Caller:
    """A trainer process within a job."""

    job: str
    rank: int
    world: int
    process_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class InFlight:
    """A snapshot that a re-attaching trainer is still copying."""

    step: int
    place: Place


@dataclass(frozen=True, slots=True)
class Attach:
    """A trainer opens a session. Replied to with the incarnation it belongs to."""

    caller: Caller
    launch_id: str
    pid: int
    pid_started_s: float
    holder_alive: bool
    """Whether the process that held this rank until now is alive (and another one)."""
    nvme_interval_steps: int | None = None
    in_flight: tuple[InFlight, ...] = ()
    decided: int | None = None
    """The incarnation that the coordinator has given it; None where this agent stands alone."""
    live: bool = False
    """Whether it takes its rank over while the others go on: it asks to, where this agent stands
    alone, and does by the coordinator's word otherwise."""
    others_alive: bool = False
    """Whether a process is alive that held another rank of an earlier agent's, and will be back."""


@dataclass(frozen=True, slots=True)
class JoinDecided:
    """What a rank reads that joins live; it stays until the rank offers a step, or is gone."""

    job: str
    rank: int
    incarnation: int
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class SessionLost:
    """A session's stream ended without a `Detach`: the trainer died, or the link to it."""

    job: str
    rank: int
    process_id: str


@dataclass(frozen=True, slots=True)
class Detach:
    """A trainer ends its session in good order."""

    caller: Caller


@dataclass(frozen=True, slots=True)
class ArenaReserved:
    """A rank has an arena now."""

    job: str
    rank: int
    generation: int
    slot_bytes: int
    slot_count: int


@dataclass(frozen=True, slots=True)
class ArenaGone:
    """A rank's arena is not on tmpfs any more, though nobody released it."""

    job: str
    rank: int
    generation: int


@dataclass(frozen=True, slots=True)
class Declare:
    """A rank names the leaves that it believes replicated, with their digests. Replied to as
    `everstep.agent.agreements.Agreements.declare` says."""

    caller: Caller
    round: int
    candidates: tuple[str, ...]
    digests: tuple[bytes, ...]
    participants: tuple[int, ...] = ()
    """The ranks that hold the replicas, ascending, the caller one of them; none for all."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A rank asks for a slot. Replied to with a `Place`, or the reason why not."""

    caller: Caller
    step: int
    patient: bool = False
    """Whether it asks again while the slots are busy, as then all ranks do."""
    captures_in_flight: int = 1
    """How many steps it copies at once, at most."""
    in_flight: tuple[InFlight, ...] = ()
    """Older steps that it still copies; an older one that is not named here it never seals."""


@dataclass(frozen=True, slots=True)
class Seal:
    """A rank's shard is complete in its slot. Replied to with None, or why it was refused. It
    counts once its record is visible: see `Recorded`."""

    caller: Caller
    step: int
    place: Place
    layout_id: str
    image_bytes: int
    replica_samples: bytes
    captured_unix_s: float
    envelope: bytes = field(repr=False)
    record_digest: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A sealed shard's record is visible, so that it survives this agent."""

    job: str
    snapshot: SnapshotId
    rank: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """A rank will not seal this step."""

    caller: Caller
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class AdoptedShard:
    """A record found beside an arena at the start."""

    snapshot: SnapshotId
    rank: int
    world: int
    place: Place
    layout_id: str
    image_bytes: int
    replica_samples: bytes
    captured_unix_s: float
    envelope: bytes = field(repr=False)
    record_digest: bytes = field(default=b"", repr=False)
    commit_id: bytes = field(default=b"", repr=False)
    """As in `CommitOrdered`; empty if it is not known, as for all that is found at the start."""


@dataclass(frozen=True, slots=True)
class AdoptedMember:
    """A process that belonged to the job when the membership was last written."""

    rank: int
    process_id: str
    pid: int
    pid_started_s: float


@dataclass(frozen=True, slots=True)
class Adopt:
    """Everything found of a job in memory and on NVMe at the agent's start."""

    job: str
    incarnation: int
    world: int
    launch_id: str
    members: Sequence[AdoptedMember]
    arenas: Sequence[ArenaReserved]
    shards: Sequence[AdoptedShard]
    durable: Sequence[tuple[SnapshotId, int]]
    """Snapshots committed on NVMe, each with its number of ranks."""
    restored: SnapshotId | None = None
    """See `Job.restored`."""
    restore_decided: bool = False
    problems: Sequence[str] = ()
    """What was found of the job and cannot be used, and why."""
    parities: Sequence[ParityPlan] = ()
    """Plans whose parity was found whole in memory."""
    flushed_ranks: Mapping[SnapshotId, tuple[int, ...]] = field(default_factory=dict)
    """Of `durable`: the ranks whose shards are on this node's NVMe."""


@dataclass(frozen=True, slots=True)
class AdoptedVerified:
    """The digests of an adopted snapshot were checked; `damaged` says what was wrong."""

    job: str
    snapshot: SnapshotId
    damaged: str = ""


@dataclass(frozen=True, slots=True)
class Damaged:
    """A committed snapshot in memory failed its digests."""

    job: str
    snapshot: SnapshotId
    reason: str


@dataclass(frozen=True, slots=True)
class FlushEnded:
    """A flush to NVMe ended; `problem` is empty if the snapshot is committed there."""

    job: str
    snapshot: SnapshotId
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PersistWanted:
    """Somebody waits for the newest committed snapshot to be on NVMe. Replied to with its id."""

    job: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Somebody reads what is sealed of a snapshot. Replied to with whether it is still there."""

    job: str
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class Unpin:
    """The reader of a `Pin` is done."""

    job: str
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class Removed:
    """A whole job is to be forgotten; refused while it is in use."""

    job: str


@dataclass(frozen=True, slots=True)
class RestoreDecided:
    """The snapshot that all ranks of this incarnation restore, or None for a fresh start."""

    job: str
    incarnation: int
    snapshot: SnapshotId | None


@dataclass(frozen=True, slots=True)
class CommitOrdered:
    """All ranks, on all nodes, have sealed a snapshot."""

    job: str
    snapshot: SnapshotId
    commit_id: bytes
    """Digest of all ranks' records: parts of two runs never make up one snapshot."""


@dataclass(frozen=True, slots=True)
class DropOrdered:
    """A snapshot will never commit: some node has dropped it."""

    job: str
    snapshot: SnapshotId
    reason: str
    drifted: tuple[int, ...] = ()
    """Keys of leaves: see `everstep.snapshot.samples`."""


@dataclass(frozen=True, slots=True)
class DurableOrdered:
    """Every node has its part of a snapshot on NVMe."""

    job: str
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class FlushOrdered:
    """Another node flushes this snapshot: only with all parts is it durable."""

    job: str
    snapshot: SnapshotId


@dataclass(frozen=True, slots=True)
class BeginOrdered:
    """The job was started anew, maybe on other nodes only."""

    job: str
    incarnation: int
    world: int
    launch_id: str


@dataclass(frozen=True, slots=True)
class PrepareOrdered:
    """This node takes part in a parity round."""

    plan: ParityPlan

    @property
    def job(self) -> str:
        """The plan's."""
        return self.plan.job


@dataclass(frozen=True, slots=True)
class Encoded:
    """This node's parity of a plan is whole and published; `problem` says why not."""

    job: str
    plan_id: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """All members' parity is whole (`commit`), or the round was given up."""

    job: str
    plan_id: str
    commit: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ParityDamaged:
    """This node's parity of a round was found damaged."""

    job: str
    plan_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Installed:
    """A shard was brought back into this node's memory: decoded, or fetched from a peer."""

    job: str
    arena: ArenaReserved
    shard: AdoptedShard


Event = (
    Attach
    | SessionLost
    | Detach
    | ArenaReserved
    | ArenaGone
    | Declare
    | Offer
    | Seal
    | Recorded
    | Abandon
    | Adopt
    | AdoptedVerified
    | Damaged
    | FlushEnded
    | PersistWanted
    | Pin
    | Unpin
    | Removed
    | RestoreDecided
    | JoinDecided
    | CommitOrdered
    | DropOrdered
    | DurableOrdered
    | FlushOrdered
    | BeginOrdered
    | PrepareOrdered
    | Encoded
    | RoundEnded
    | ParityDamaged
    | Installed
)
