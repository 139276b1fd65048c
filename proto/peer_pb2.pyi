from everstep.proto import agent_pb2 as _agent_pb2
from everstep.proto import state_pb2 as _state_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Sender(_message.Message):
    __slots__ = ("node_id", "boot_id", "epoch", "protocol", "view_digest")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VIEW_DIGEST_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    boot_id: str
    epoch: int
    protocol: int
    view_digest: bytes
    def __init__(self, node_id: _Optional[str] = ..., boot_id: _Optional[str] = ..., epoch: _Optional[int] = ..., protocol: _Optional[int] = ..., view_digest: _Optional[bytes] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("node_id", "boot_id", "since_epoch", "address", "labels", "replaced_by")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    SINCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REPLACED_BY_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    boot_id: str
    since_epoch: int
    address: str
    labels: _containers.ScalarMap[str, str]
    replaced_by: str
    def __init__(self, node_id: _Optional[str] = ..., boot_id: _Optional[str] = ..., since_epoch: _Optional[int] = ..., address: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., replaced_by: _Optional[str] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    def __init__(self, entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ...) -> None: ...

class ClaimRequest(_message.Message):
    __slots__ = ("sender", "address", "labels", "replaces", "view")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SENDER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REPLACES_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    address: str
    labels: _containers.ScalarMap[str, str]
    replaces: str
    view: View
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., address: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., replaces: _Optional[str] = ..., view: _Optional[_Union[View, _Mapping]] = ...) -> None: ...

class ClaimReply(_message.Message):
    __slots__ = ("view", "refusal", "coordinator", "joined")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    view: View
    refusal: str
    coordinator: str
    joined: bool
    def __init__(self, view: _Optional[_Union[View, _Mapping]] = ..., refusal: _Optional[str] = ..., coordinator: _Optional[str] = ..., joined: _Optional[bool] = ...) -> None: ...

class ShardFact(_message.Message):
    __slots__ = ("rank", "layout_id", "image_bytes", "record_digest", "replica_samples")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECORD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REPLICA_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    layout_id: str
    image_bytes: int
    record_digest: bytes
    replica_samples: bytes
    def __init__(self, rank: _Optional[int] = ..., layout_id: _Optional[str] = ..., image_bytes: _Optional[int] = ..., record_digest: _Optional[bytes] = ..., replica_samples: _Optional[bytes] = ...) -> None: ...

class SnapshotFact(_message.Message):
    __slots__ = ("incarnation", "step", "world", "stage", "shards", "reason", "drifted")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DRIFTED_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    world: int
    stage: str
    shards: _containers.RepeatedCompositeFieldContainer[ShardFact]
    reason: str
    drifted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ..., world: _Optional[int] = ..., stage: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[ShardFact, _Mapping]]] = ..., reason: _Optional[str] = ..., drifted: _Optional[_Iterable[int]] = ...) -> None: ...

class RoundFact(_message.Message):
    __slots__ = ("plan_id", "incarnation", "step", "stage", "problem", "members")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    plan_id: str
    incarnation: int
    step: int
    stage: str
    problem: str
    members: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, plan_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., stage: _Optional[str] = ..., problem: _Optional[str] = ..., members: _Optional[_Iterable[str]] = ...) -> None: ...

class FlushedFact(_message.Message):
    __slots__ = ("incarnation", "step", "world", "ranks", "parity")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    world: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    parity: bool
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ..., world: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ..., parity: _Optional[bool] = ...) -> None: ...

class MemberFact(_message.Message):
    __slots__ = ("rank", "process_id", "attached", "joining")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    JOINING_FIELD_NUMBER: _ClassVar[int]
    rank: int
    process_id: str
    attached: bool
    joining: bool
    def __init__(self, rank: _Optional[int] = ..., process_id: _Optional[str] = ..., attached: _Optional[bool] = ..., joining: _Optional[bool] = ...) -> None: ...

class SnapshotName(_message.Message):
    __slots__ = ("incarnation", "step")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class JobFact(_message.Message):
    __slots__ = ("job", "incarnation", "world", "launch_id", "members", "snapshots", "rounds", "flushed", "durable", "newest_incarnation", "flushing", "flush_failed", "restore_decided", "restored")
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    FLUSHED_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    NEWEST_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FLUSHING_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FAILED_FIELD_NUMBER: _ClassVar[int]
    RESTORE_DECIDED_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    job: str
    incarnation: int
    world: int
    launch_id: str
    members: _containers.RepeatedCompositeFieldContainer[MemberFact]
    snapshots: _containers.RepeatedCompositeFieldContainer[SnapshotFact]
    rounds: _containers.RepeatedCompositeFieldContainer[RoundFact]
    flushed: _containers.RepeatedCompositeFieldContainer[FlushedFact]
    durable: _containers.RepeatedCompositeFieldContainer[SnapshotName]
    newest_incarnation: int
    flushing: SnapshotName
    flush_failed: _containers.RepeatedCompositeFieldContainer[SnapshotName]
    restore_decided: bool
    restored: SnapshotName
    def __init__(self, job: _Optional[str] = ..., incarnation: _Optional[int] = ..., world: _Optional[int] = ..., launch_id: _Optional[str] = ..., members: _Optional[_Iterable[_Union[MemberFact, _Mapping]]] = ..., snapshots: _Optional[_Iterable[_Union[SnapshotFact, _Mapping]]] = ..., rounds: _Optional[_Iterable[_Union[RoundFact, _Mapping]]] = ..., flushed: _Optional[_Iterable[_Union[FlushedFact, _Mapping]]] = ..., durable: _Optional[_Iterable[_Union[SnapshotName, _Mapping]]] = ..., newest_incarnation: _Optional[int] = ..., flushing: _Optional[_Union[SnapshotName, _Mapping]] = ..., flush_failed: _Optional[_Iterable[_Union[SnapshotName, _Mapping]]] = ..., restore_decided: _Optional[bool] = ..., restored: _Optional[_Union[SnapshotName, _Mapping]] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("sender", "sequence", "term", "jobs", "view")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    sequence: int
    term: int
    jobs: _containers.RepeatedCompositeFieldContainer[JobFact]
    view: View
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., sequence: _Optional[int] = ..., term: _Optional[int] = ..., jobs: _Optional[_Iterable[_Union[JobFact, _Mapping]]] = ..., view: _Optional[_Union[View, _Mapping]] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("job", "incarnation", "step", "commit", "drop", "durable", "prepare", "end_round", "begin", "flush")
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    END_ROUND_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    job: str
    incarnation: int
    step: int
    commit: Commit
    drop: Drop
    durable: Durable
    prepare: _state_pb2.ParityPlan
    end_round: EndRound
    begin: Begin
    flush: Flush
    def __init__(self, job: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., drop: _Optional[_Union[Drop, _Mapping]] = ..., durable: _Optional[_Union[Durable, _Mapping]] = ..., prepare: _Optional[_Union[_state_pb2.ParityPlan, _Mapping]] = ..., end_round: _Optional[_Union[EndRound, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., flush: _Optional[_Union[Flush, _Mapping]] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("commit_id",)
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    commit_id: bytes
    def __init__(self, commit_id: _Optional[bytes] = ...) -> None: ...

class Flush(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Drop(_message.Message):
    __slots__ = ("reason", "drifted")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DRIFTED_FIELD_NUMBER: _ClassVar[int]
    reason: str
    drifted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, reason: _Optional[str] = ..., drifted: _Optional[_Iterable[int]] = ...) -> None: ...

class Durable(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EndRound(_message.Message):
    __slots__ = ("plan_id", "commit", "reason")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    plan_id: str
    commit: bool
    reason: str
    def __init__(self, plan_id: _Optional[str] = ..., commit: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("world", "launch_id")
    WORLD_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_ID_FIELD_NUMBER: _ClassVar[int]
    world: int
    launch_id: str
    def __init__(self, world: _Optional[int] = ..., launch_id: _Optional[str] = ...) -> None: ...

class OrdersReply(_message.Message):
    __slots__ = ("sender", "sequence", "orders", "suspected", "view", "coordinator", "term")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    SUSPECTED_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    sequence: int
    orders: _containers.RepeatedCompositeFieldContainer[Order]
    suspected: _containers.RepeatedScalarFieldContainer[str]
    view: View
    coordinator: str
    term: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., sequence: _Optional[int] = ..., orders: _Optional[_Iterable[_Union[Order, _Mapping]]] = ..., suspected: _Optional[_Iterable[str]] = ..., view: _Optional[_Union[View, _Mapping]] = ..., coordinator: _Optional[str] = ..., term: _Optional[int] = ...) -> None: ...

class OrdersRequest(_message.Message):
    __slots__ = ("orders",)
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    orders: OrdersReply
    def __init__(self, orders: _Optional[_Union[OrdersReply, _Mapping]] = ...) -> None: ...

class OrdersAck(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("sender", "session", "launch_id", "live")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_ID_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    session: _agent_pb2.Session
    launch_id: str
    live: bool
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., session: _Optional[_Union[_agent_pb2.Session, _Mapping]] = ..., launch_id: _Optional[str] = ..., live: _Optional[bool] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("incarnation", "launch_id", "joined")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_ID_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    launch_id: str
    joined: bool
    def __init__(self, incarnation: _Optional[int] = ..., launch_id: _Optional[str] = ..., joined: _Optional[bool] = ...) -> None: ...

class AgreeRequest(_message.Message):
    __slots__ = ("sender", "session", "round", "candidates", "candidate_digests", "joining", "participants")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    JOINING_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANTS_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    session: _agent_pb2.Session
    round: int
    candidates: _containers.RepeatedScalarFieldContainer[str]
    candidate_digests: bytes
    joining: bool
    participants: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., session: _Optional[_Union[_agent_pb2.Session, _Mapping]] = ..., round: _Optional[int] = ..., candidates: _Optional[_Iterable[str]] = ..., candidate_digests: _Optional[bytes] = ..., joining: _Optional[bool] = ..., participants: _Optional[_Iterable[int]] = ...) -> None: ...

class AgreeReply(_message.Message):
    __slots__ = ("agreed", "unknown")
    AGREED_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    agreed: _containers.RepeatedScalarFieldContainer[int]
    unknown: bool
    def __init__(self, agreed: _Optional[_Iterable[int]] = ..., unknown: _Optional[bool] = ...) -> None: ...

class DecideRequest(_message.Message):
    __slots__ = ("sender", "job", "incarnation", "to_step", "levels", "live", "failed_plan")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TO_STEP_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    FAILED_PLAN_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    job: str
    incarnation: int
    to_step: int
    levels: _containers.RepeatedScalarFieldContainer[str]
    live: bool
    failed_plan: int
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., job: _Optional[str] = ..., incarnation: _Optional[int] = ..., to_step: _Optional[int] = ..., levels: _Optional[_Iterable[str]] = ..., live: _Optional[bool] = ..., failed_plan: _Optional[int] = ...) -> None: ...

class ParitySource(_message.Message):
    __slots__ = ("plan_id", "node_id", "level")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    plan_id: str
    node_id: str
    level: str
    def __init__(self, plan_id: _Optional[str] = ..., node_id: _Optional[str] = ..., level: _Optional[str] = ...) -> None: ...

class ShardSource(_message.Message):
    __slots__ = ("rank", "node_id", "level", "plan", "image_bytes")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node_id: str
    level: str
    plan: _state_pb2.ParityPlan
    image_bytes: int
    def __init__(self, rank: _Optional[int] = ..., node_id: _Optional[str] = ..., level: _Optional[str] = ..., plan: _Optional[_Union[_state_pb2.ParityPlan, _Mapping]] = ..., image_bytes: _Optional[int] = ...) -> None: ...

class SnapshotPlan(_message.Message):
    __slots__ = ("incarnation", "step", "world", "recoverable", "sources", "missing", "further_losses", "further_loss_level", "parities", "memory_losses", "commit_id")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    RECOVERABLE_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    FURTHER_LOSSES_FIELD_NUMBER: _ClassVar[int]
    FURTHER_LOSS_LEVEL_FIELD_NUMBER: _ClassVar[int]
    PARITIES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LOSSES_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    world: int
    recoverable: bool
    sources: _containers.RepeatedCompositeFieldContainer[ShardSource]
    missing: _containers.RepeatedScalarFieldContainer[str]
    further_losses: int
    further_loss_level: str
    parities: _containers.RepeatedCompositeFieldContainer[ParitySource]
    memory_losses: int
    commit_id: bytes
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ..., world: _Optional[int] = ..., recoverable: _Optional[bool] = ..., sources: _Optional[_Iterable[_Union[ShardSource, _Mapping]]] = ..., missing: _Optional[_Iterable[str]] = ..., further_losses: _Optional[int] = ..., further_loss_level: _Optional[str] = ..., parities: _Optional[_Iterable[_Union[ParitySource, _Mapping]]] = ..., memory_losses: _Optional[int] = ..., commit_id: _Optional[bytes] = ...) -> None: ...

class DecideReply(_message.Message):
    __slots__ = ("found", "plan", "rejected", "plan_number")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    PLAN_NUMBER_FIELD_NUMBER: _ClassVar[int]
    found: bool
    plan: SnapshotPlan
    rejected: _containers.RepeatedCompositeFieldContainer[_agent_pb2.RejectedCopy]
    plan_number: int
    def __init__(self, found: _Optional[bool] = ..., plan: _Optional[_Union[SnapshotPlan, _Mapping]] = ..., rejected: _Optional[_Iterable[_Union[_agent_pb2.RejectedCopy, _Mapping]]] = ..., plan_number: _Optional[int] = ...) -> None: ...

class InventoryRequest(_message.Message):
    __slots__ = ("sender", "job")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    job: str
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., job: _Optional[str] = ...) -> None: ...

class HeldShard(_message.Message):
    __slots__ = ("rank", "level", "image_bytes", "layout_id", "record_digest", "commit_id")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    RECORD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    rank: int
    level: str
    image_bytes: int
    layout_id: str
    record_digest: bytes
    commit_id: bytes
    def __init__(self, rank: _Optional[int] = ..., level: _Optional[str] = ..., image_bytes: _Optional[int] = ..., layout_id: _Optional[str] = ..., record_digest: _Optional[bytes] = ..., commit_id: _Optional[bytes] = ...) -> None: ...

class HeldParity(_message.Message):
    __slots__ = ("plan", "level", "bytes")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    plan: _state_pb2.ParityPlan
    level: str
    bytes: int
    def __init__(self, plan: _Optional[_Union[_state_pb2.ParityPlan, _Mapping]] = ..., level: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class HeldSnapshot(_message.Message):
    __slots__ = ("incarnation", "step", "world", "shards", "parities")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    PARITIES_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    world: int
    shards: _containers.RepeatedCompositeFieldContainer[HeldShard]
    parities: _containers.RepeatedCompositeFieldContainer[HeldParity]
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ..., world: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[HeldShard, _Mapping]]] = ..., parities: _Optional[_Iterable[_Union[HeldParity, _Mapping]]] = ...) -> None: ...

class InventoryReply(_message.Message):
    __slots__ = ("node_id", "snapshots", "problems")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    snapshots: _containers.RepeatedCompositeFieldContainer[HeldSnapshot]
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, node_id: _Optional[str] = ..., snapshots: _Optional[_Iterable[_Union[HeldSnapshot, _Mapping]]] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("sender", "job", "incarnation", "step", "ranks", "level", "parity", "repair")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    job: str
    incarnation: int
    step: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    level: str
    parity: bool
    repair: bool
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., job: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ..., level: _Optional[str] = ..., parity: _Optional[bool] = ..., repair: _Optional[bool] = ...) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("damaged", "parity_problem", "repaired_ranks", "parity_repaired", "repair_problem")
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    PARITY_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_RANKS_FIELD_NUMBER: _ClassVar[int]
    PARITY_REPAIRED_FIELD_NUMBER: _ClassVar[int]
    REPAIR_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    damaged: _containers.RepeatedCompositeFieldContainer[_agent_pb2.RejectedCopy]
    parity_problem: str
    repaired_ranks: _containers.RepeatedScalarFieldContainer[int]
    parity_repaired: bool
    repair_problem: str
    def __init__(self, damaged: _Optional[_Iterable[_Union[_agent_pb2.RejectedCopy, _Mapping]]] = ..., parity_problem: _Optional[str] = ..., repaired_ranks: _Optional[_Iterable[int]] = ..., parity_repaired: _Optional[bool] = ..., repair_problem: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("sender", "job", "incarnation", "step", "ranks")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    job: str
    incarnation: int
    step: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., job: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class DescribedShard(_message.Message):
    __slots__ = ("rank", "record", "layout")
    RANK_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    record: bytes
    layout: bytes
    def __init__(self, rank: _Optional[int] = ..., record: _Optional[bytes] = ..., layout: _Optional[bytes] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedCompositeFieldContainer[DescribedShard]
    def __init__(self, shards: _Optional[_Iterable[_Union[DescribedShard, _Mapping]]] = ...) -> None: ...

class UnitRange(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("sender", "job", "incarnation", "step", "level", "shard", "parity", "joining")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    JOINING_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    job: str
    incarnation: int
    step: int
    level: str
    shard: ShardUnits
    parity: ParityUnits
    joining: bool
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., job: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., level: _Optional[str] = ..., shard: _Optional[_Union[ShardUnits, _Mapping]] = ..., parity: _Optional[_Union[ParityUnits, _Mapping]] = ..., joining: _Optional[bool] = ...) -> None: ...

class ShardUnits(_message.Message):
    __slots__ = ("rank", "units")
    RANK_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    units: _containers.RepeatedCompositeFieldContainer[UnitRange]
    def __init__(self, rank: _Optional[int] = ..., units: _Optional[_Iterable[_Union[UnitRange, _Mapping]]] = ...) -> None: ...

class ParityUnits(_message.Message):
    __slots__ = ("plan_id", "row", "units")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    plan_id: str
    row: int
    units: UnitRange
    def __init__(self, plan_id: _Optional[str] = ..., row: _Optional[int] = ..., units: _Optional[_Union[UnitRange, _Mapping]] = ...) -> None: ...

class RebuildRequest(_message.Message):
    __slots__ = ("sender", "plan", "row", "member", "units", "usable", "joining")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    USABLE_FIELD_NUMBER: _ClassVar[int]
    JOINING_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    plan: _state_pb2.ParityPlan
    row: int
    member: int
    units: UnitRange
    usable: _containers.RepeatedScalarFieldContainer[str]
    joining: bool
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., plan: _Optional[_Union[_state_pb2.ParityPlan, _Mapping]] = ..., row: _Optional[int] = ..., member: _Optional[int] = ..., units: _Optional[_Union[UnitRange, _Mapping]] = ..., usable: _Optional[_Iterable[str]] = ..., joining: _Optional[bool] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("token", "address", "units", "bytes")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    address: str
    units: int
    bytes: int
    def __init__(self, token: _Optional[bytes] = ..., address: _Optional[str] = ..., units: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class MendRequest(_message.Message):
    __slots__ = ("sender", "job", "plan", "ranks", "parity")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    job: str
    plan: SnapshotPlan
    ranks: _containers.RepeatedScalarFieldContainer[int]
    parity: bool
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., job: _Optional[str] = ..., plan: _Optional[_Union[SnapshotPlan, _Mapping]] = ..., ranks: _Optional[_Iterable[int]] = ..., parity: _Optional[bool] = ...) -> None: ...

class MendProgress(_message.Message):
    __slots__ = ("what", "done_bytes", "total_bytes", "problem", "ended")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    what: str
    done_bytes: int
    total_bytes: int
    problem: str
    ended: bool
    def __init__(self, what: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., problem: _Optional[str] = ..., ended: _Optional[bool] = ...) -> None: ...

class SurveyRequest(_message.Message):
    __slots__ = ("sender", "job")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    sender: Sender
    job: str
    def __init__(self, sender: _Optional[_Union[Sender, _Mapping]] = ..., job: _Optional[str] = ...) -> None: ...

class SurveyReply(_message.Message):
    __slots__ = ("coordinator", "jobs", "waiting_for", "warnings", "protects")
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    PROTECTS_FIELD_NUMBER: _ClassVar[int]
    coordinator: str
    jobs: _containers.RepeatedCompositeFieldContainer[JobSurvey]
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    protects: bool
    def __init__(self, coordinator: _Optional[str] = ..., jobs: _Optional[_Iterable[_Union[JobSurvey, _Mapping]]] = ..., waiting_for: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ..., protects: _Optional[bool] = ...) -> None: ...

class JobSurvey(_message.Message):
    __slots__ = ("job", "incarnation", "world", "ranks", "newest", "pending", "round", "groups", "problems", "restored", "excluded")
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    job: str
    incarnation: int
    world: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankSurvey]
    newest: _containers.RepeatedCompositeFieldContainer[LevelSurvey]
    pending: _containers.RepeatedCompositeFieldContainer[PendingSurvey]
    round: RoundSurvey
    groups: _containers.RepeatedCompositeFieldContainer[GroupSurvey]
    problems: _containers.RepeatedScalarFieldContainer[str]
    restored: SnapshotName
    excluded: _containers.RepeatedCompositeFieldContainer[SnapshotName]
    def __init__(self, job: _Optional[str] = ..., incarnation: _Optional[int] = ..., world: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankSurvey, _Mapping]]] = ..., newest: _Optional[_Iterable[_Union[LevelSurvey, _Mapping]]] = ..., pending: _Optional[_Iterable[_Union[PendingSurvey, _Mapping]]] = ..., round: _Optional[_Union[RoundSurvey, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[GroupSurvey, _Mapping]]] = ..., problems: _Optional[_Iterable[str]] = ..., restored: _Optional[_Union[SnapshotName, _Mapping]] = ..., excluded: _Optional[_Iterable[_Union[SnapshotName, _Mapping]]] = ...) -> None: ...

class RankSurvey(_message.Message):
    __slots__ = ("rank", "node_id", "attached")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node_id: str
    attached: bool
    def __init__(self, rank: _Optional[int] = ..., node_id: _Optional[str] = ..., attached: _Optional[bool] = ...) -> None: ...

class LevelSurvey(_message.Message):
    __slots__ = ("level", "incarnation", "step")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    level: str
    incarnation: int
    step: int
    def __init__(self, level: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class PendingSurvey(_message.Message):
    __slots__ = ("incarnation", "step", "late_ranks", "late_nodes")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LATE_RANKS_FIELD_NUMBER: _ClassVar[int]
    LATE_NODES_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    late_ranks: _containers.RepeatedScalarFieldContainer[int]
    late_nodes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ..., late_ranks: _Optional[_Iterable[int]] = ..., late_nodes: _Optional[_Iterable[str]] = ...) -> None: ...

class RoundSurvey(_message.Message):
    __slots__ = ("incarnation", "step", "waiting_for", "running_s")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    RUNNING_S_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    running_s: float
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ..., waiting_for: _Optional[_Iterable[str]] = ..., running_s: _Optional[float] = ...) -> None: ...

class GroupSurvey(_message.Message):
    __slots__ = ("plan_id", "incarnation", "step", "members", "missing")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    plan_id: str
    incarnation: int
    step: int
    members: _containers.RepeatedScalarFieldContainer[str]
    missing: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, plan_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., members: _Optional[_Iterable[str]] = ..., missing: _Optional[_Iterable[str]] = ...) -> None: ...

class OverviewRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class OverviewReply(_message.Message):
    __slots__ = ("survey", "problem", "jobs")
    SURVEY_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    survey: SurveyReply
    problem: str
    jobs: _containers.RepeatedCompositeFieldContainer[JobOverview]
    def __init__(self, survey: _Optional[_Union[SurveyReply, _Mapping]] = ..., problem: _Optional[str] = ..., jobs: _Optional[_Iterable[_Union[JobOverview, _Mapping]]] = ...) -> None: ...

class JobOverview(_message.Message):
    __slots__ = ("job", "plans", "silent", "problems", "held")
    JOB_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    job: str
    plans: _containers.RepeatedCompositeFieldContainer[SnapshotPlan]
    silent: _containers.RepeatedScalarFieldContainer[str]
    problems: _containers.RepeatedScalarFieldContainer[str]
    held: _containers.RepeatedCompositeFieldContainer[HeldOverview]
    def __init__(self, job: _Optional[str] = ..., plans: _Optional[_Iterable[_Union[SnapshotPlan, _Mapping]]] = ..., silent: _Optional[_Iterable[str]] = ..., problems: _Optional[_Iterable[str]] = ..., held: _Optional[_Iterable[_Union[HeldOverview, _Mapping]]] = ...) -> None: ...

class HeldOverview(_message.Message):
    __slots__ = ("incarnation", "step", "copies", "captured_unix_s")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    copies: _containers.RepeatedCompositeFieldContainer[CopiesOverview]
    captured_unix_s: float
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ..., copies: _Optional[_Iterable[_Union[CopiesOverview, _Mapping]]] = ..., captured_unix_s: _Optional[float] = ...) -> None: ...

class CopiesOverview(_message.Message):
    __slots__ = ("level", "ranks", "parity_nodes", "bytes")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    PARITY_NODES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    level: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    parity_nodes: _containers.RepeatedScalarFieldContainer[str]
    bytes: int
    def __init__(self, level: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., parity_nodes: _Optional[_Iterable[str]] = ..., bytes: _Optional[int] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("job", "step", "levels")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    job: str
    step: int
    levels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job: _Optional[str] = ..., step: _Optional[int] = ..., levels: _Optional[_Iterable[str]] = ...) -> None: ...

class PlanReply(_message.Message):
    __slots__ = ("plans", "destinations", "silent", "problems", "alone")
    PLANS_FIELD_NUMBER: _ClassVar[int]
    DESTINATIONS_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[SnapshotPlan]
    destinations: _containers.RepeatedCompositeFieldContainer[Destination]
    silent: _containers.RepeatedScalarFieldContainer[str]
    problems: _containers.RepeatedScalarFieldContainer[str]
    alone: bool
    def __init__(self, plans: _Optional[_Iterable[_Union[SnapshotPlan, _Mapping]]] = ..., destinations: _Optional[_Iterable[_Union[Destination, _Mapping]]] = ..., silent: _Optional[_Iterable[str]] = ..., problems: _Optional[_Iterable[str]] = ..., alone: _Optional[bool] = ...) -> None: ...

class Destination(_message.Message):
    __slots__ = ("rank", "node_id", "reason")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node_id: str
    reason: str
    def __init__(self, rank: _Optional[int] = ..., node_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RecoverRequest(_message.Message):
    __slots__ = ("job", "snapshot", "levels")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    job: str
    snapshot: SnapshotName
    levels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job: _Optional[str] = ..., snapshot: _Optional[_Union[SnapshotName, _Mapping]] = ..., levels: _Optional[_Iterable[str]] = ...) -> None: ...

class RecoverProgress(_message.Message):
    __slots__ = ("node_id", "progress", "plan")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    progress: MendProgress
    plan: PlanReply
    def __init__(self, node_id: _Optional[str] = ..., progress: _Optional[_Union[MendProgress, _Mapping]] = ..., plan: _Optional[_Union[PlanReply, _Mapping]] = ...) -> None: ...

class ExamineRequest(_message.Message):
    __slots__ = ("job", "step", "levels", "repair")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    job: str
    step: int
    levels: _containers.RepeatedScalarFieldContainer[str]
    repair: bool
    def __init__(self, job: _Optional[str] = ..., step: _Optional[int] = ..., levels: _Optional[_Iterable[str]] = ..., repair: _Optional[bool] = ...) -> None: ...

class ExamineProgress(_message.Message):
    __slots__ = ("examined", "total", "unexamined", "outlook")
    EXAMINED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNEXAMINED_FIELD_NUMBER: _ClassVar[int]
    OUTLOOK_FIELD_NUMBER: _ClassVar[int]
    examined: Examined
    total: ExamineTotal
    unexamined: Unexamined
    outlook: JobOverview
    def __init__(self, examined: _Optional[_Union[Examined, _Mapping]] = ..., total: _Optional[_Union[ExamineTotal, _Mapping]] = ..., unexamined: _Optional[_Union[Unexamined, _Mapping]] = ..., outlook: _Optional[_Union[JobOverview, _Mapping]] = ...) -> None: ...

class ExamineTotal(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class Examined(_message.Message):
    __slots__ = ("job", "incarnation", "step", "node_id", "level", "parity", "rank", "bytes", "problem", "repaired", "repair_problem")
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_FIELD_NUMBER: _ClassVar[int]
    REPAIR_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    job: str
    incarnation: int
    step: int
    node_id: str
    level: str
    parity: bool
    rank: int
    bytes: int
    problem: str
    repaired: bool
    repair_problem: str
    def __init__(self, job: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., node_id: _Optional[str] = ..., level: _Optional[str] = ..., parity: _Optional[bool] = ..., rank: _Optional[int] = ..., bytes: _Optional[int] = ..., problem: _Optional[str] = ..., repaired: _Optional[bool] = ..., repair_problem: _Optional[str] = ...) -> None: ...

class Unexamined(_message.Message):
    __slots__ = ("node_id", "problem")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    problem: str
    def __init__(self, node_id: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...
