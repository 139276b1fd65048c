from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Session(_message.Message):
    __slots__ = ("job", "rank", "world", "process_id", "incarnation")
    JOB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    job: str
    rank: int
    world: int
    process_id: str
    incarnation: int
    def __init__(self, job: _Optional[str] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., process_id: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class InFlight(_message.Message):
    __slots__ = ("step", "slot", "generation")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    slot: int
    generation: int
    def __init__(self, step: _Optional[int] = ..., slot: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("session", "launch_id", "pid", "pid_started_s", "nvme_interval_steps", "in_flight", "live")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PID_STARTED_S_FIELD_NUMBER: _ClassVar[int]
    NVME_INTERVAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    session: Session
    launch_id: str
    pid: int
    pid_started_s: float
    nvme_interval_steps: int
    in_flight: _containers.RepeatedCompositeFieldContainer[InFlight]
    live: bool
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., launch_id: _Optional[str] = ..., pid: _Optional[int] = ..., pid_started_s: _Optional[float] = ..., nvme_interval_steps: _Optional[int] = ..., in_flight: _Optional[_Iterable[_Union[InFlight, _Mapping]]] = ..., live: _Optional[bool] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("attached", "committed", "dropped")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    attached: Attached
    committed: Committed
    dropped: Dropped
    def __init__(self, attached: _Optional[_Union[Attached, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., dropped: _Optional[_Union[Dropped, _Mapping]] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("incarnation", "node_id", "agent_version", "levels", "joined")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    node_id: str
    agent_version: str
    levels: _containers.RepeatedScalarFieldContainer[str]
    joined: bool
    def __init__(self, incarnation: _Optional[int] = ..., node_id: _Optional[str] = ..., agent_version: _Optional[str] = ..., levels: _Optional[_Iterable[str]] = ..., joined: _Optional[bool] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("incarnation", "step", "level")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    level: str
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ..., level: _Optional[str] = ...) -> None: ...

class Dropped(_message.Message):
    __slots__ = ("incarnation", "step", "reason", "drifted")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DRIFTED_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    reason: str
    drifted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ..., reason: _Optional[str] = ..., drifted: _Optional[_Iterable[int]] = ...) -> None: ...

class DeclareRequest(_message.Message):
    __slots__ = ("session", "layout", "layout_id", "candidates", "candidate_digests", "round", "joining", "captures_in_flight", "participants")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    JOINING_FIELD_NUMBER: _ClassVar[int]
    CAPTURES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANTS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    layout: bytes
    layout_id: str
    candidates: _containers.RepeatedScalarFieldContainer[str]
    candidate_digests: bytes
    round: int
    joining: bool
    captures_in_flight: int
    participants: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., layout: _Optional[bytes] = ..., layout_id: _Optional[str] = ..., candidates: _Optional[_Iterable[str]] = ..., candidate_digests: _Optional[bytes] = ..., round: _Optional[int] = ..., joining: _Optional[bool] = ..., captures_in_flight: _Optional[int] = ..., participants: _Optional[_Iterable[int]] = ...) -> None: ...

class DeclareReply(_message.Message):
    __slots__ = ("agreed", "arena_path", "slot_bytes", "slot_count", "generation", "unknown")
    AGREED_FIELD_NUMBER: _ClassVar[int]
    ARENA_PATH_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    agreed: _containers.RepeatedScalarFieldContainer[int]
    arena_path: str
    slot_bytes: int
    slot_count: int
    generation: int
    unknown: bool
    def __init__(self, agreed: _Optional[_Iterable[int]] = ..., arena_path: _Optional[str] = ..., slot_bytes: _Optional[int] = ..., slot_count: _Optional[int] = ..., generation: _Optional[int] = ..., unknown: _Optional[bool] = ...) -> None: ...

class OfferRequest(_message.Message):
    __slots__ = ("session", "step", "patient", "captures_in_flight", "in_flight")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PATIENT_FIELD_NUMBER: _ClassVar[int]
    CAPTURES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    session: Session
    step: int
    patient: bool
    captures_in_flight: int
    in_flight: _containers.RepeatedCompositeFieldContainer[InFlight]
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., step: _Optional[int] = ..., patient: _Optional[bool] = ..., captures_in_flight: _Optional[int] = ..., in_flight: _Optional[_Iterable[_Union[InFlight, _Mapping]]] = ...) -> None: ...

class OfferReply(_message.Message):
    __slots__ = ("granted", "slot", "generation", "reason")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    granted: bool
    slot: int
    generation: int
    reason: str
    def __init__(self, granted: _Optional[bool] = ..., slot: _Optional[int] = ..., generation: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class OfferAnswer(_message.Message):
    __slots__ = ("reply", "error")
    REPLY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    reply: OfferReply
    error: bytes
    def __init__(self, reply: _Optional[_Union[OfferReply, _Mapping]] = ..., error: _Optional[bytes] = ...) -> None: ...

class SealRequest(_message.Message):
    __slots__ = ("session", "step", "slot", "generation", "record")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    session: Session
    step: int
    slot: int
    generation: int
    record: bytes
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., step: _Optional[int] = ..., slot: _Optional[int] = ..., generation: _Optional[int] = ..., record: _Optional[bytes] = ...) -> None: ...

class SealReply(_message.Message):
    __slots__ = ("accepted", "reason")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class AbandonRequest(_message.Message):
    __slots__ = ("session", "step", "reason")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session: Session
    step: int
    reason: str
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., step: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AbandonReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("session", "to_step", "levels", "rejected", "live")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TO_STEP_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    session: Session
    to_step: int
    levels: _containers.RepeatedScalarFieldContainer[str]
    rejected: _containers.RepeatedCompositeFieldContainer[RejectedCopy]
    live: bool
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., to_step: _Optional[int] = ..., levels: _Optional[_Iterable[str]] = ..., rejected: _Optional[_Iterable[_Union[RejectedCopy, _Mapping]]] = ..., live: _Optional[bool] = ...) -> None: ...

class ShardLocation(_message.Message):
    __slots__ = ("rank", "level", "path", "offset", "image_bytes", "record", "layout")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    level: str
    path: str
    offset: int
    image_bytes: int
    record: bytes
    layout: bytes
    def __init__(self, rank: _Optional[int] = ..., level: _Optional[str] = ..., path: _Optional[str] = ..., offset: _Optional[int] = ..., image_bytes: _Optional[int] = ..., record: _Optional[bytes] = ..., layout: _Optional[bytes] = ...) -> None: ...

class RejectedCopy(_message.Message):
    __slots__ = ("step", "rank", "level", "reason", "incarnation")
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    rank: int
    level: str
    reason: str
    incarnation: int
    def __init__(self, step: _Optional[int] = ..., rank: _Optional[int] = ..., level: _Optional[str] = ..., reason: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class RestoreReply(_message.Message):
    __slots__ = ("found", "incarnation", "step", "shards", "rejected")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    found: bool
    incarnation: int
    step: int
    shards: _containers.RepeatedCompositeFieldContainer[ShardLocation]
    rejected: _containers.RepeatedCompositeFieldContainer[RejectedCopy]
    def __init__(self, found: _Optional[bool] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[ShardLocation, _Mapping]]] = ..., rejected: _Optional[_Iterable[_Union[RejectedCopy, _Mapping]]] = ...) -> None: ...

class UnitSpan(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Need(_message.Message):
    __slots__ = ("rank", "units")
    RANK_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    units: _containers.RepeatedCompositeFieldContainer[UnitSpan]
    def __init__(self, rank: _Optional[int] = ..., units: _Optional[_Iterable[_Union[UnitSpan, _Mapping]]] = ...) -> None: ...

class GatherRequest(_message.Message):
    __slots__ = ("session", "incarnation", "step", "needs")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    incarnation: int
    step: int
    needs: _containers.RepeatedCompositeFieldContainer[Need]
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., needs: _Optional[_Iterable[_Union[Need, _Mapping]]] = ...) -> None: ...

class GatherReply(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedCompositeFieldContainer[ShardLocation]
    def __init__(self, shards: _Optional[_Iterable[_Union[ShardLocation, _Mapping]]] = ...) -> None: ...

class PersistRequest(_message.Message):
    __slots__ = ("job", "timeout_s")
    JOB_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    job: str
    timeout_s: float
    def __init__(self, job: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class PersistReply(_message.Message):
    __slots__ = ("durable", "step", "reason")
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    durable: bool
    step: int
    reason: str
    def __init__(self, durable: _Optional[bool] = ..., step: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class DetachReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class SnapshotStatus(_message.Message):
    __slots__ = ("incarnation", "step", "level", "committed", "sealed_ranks", "bytes", "captured_unix_s")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    SEALED_RANKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    step: int
    level: str
    committed: bool
    sealed_ranks: _containers.RepeatedScalarFieldContainer[int]
    bytes: int
    captured_unix_s: float
    def __init__(self, incarnation: _Optional[int] = ..., step: _Optional[int] = ..., level: _Optional[str] = ..., committed: _Optional[bool] = ..., sealed_ranks: _Optional[_Iterable[int]] = ..., bytes: _Optional[int] = ..., captured_unix_s: _Optional[float] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "pid", "attached", "arena_bytes", "last_sealed_step")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_SEALED_STEP_FIELD_NUMBER: _ClassVar[int]
    rank: int
    pid: int
    attached: bool
    arena_bytes: int
    last_sealed_step: int
    def __init__(self, rank: _Optional[int] = ..., pid: _Optional[int] = ..., attached: _Optional[bool] = ..., arena_bytes: _Optional[int] = ..., last_sealed_step: _Optional[int] = ...) -> None: ...

class JobStatus(_message.Message):
    __slots__ = ("job", "incarnation", "world", "ranks", "snapshots", "counters", "last_error")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    job: str
    incarnation: int
    world: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    snapshots: _containers.RepeatedCompositeFieldContainer[SnapshotStatus]
    counters: _containers.ScalarMap[str, int]
    last_error: str
    def __init__(self, job: _Optional[str] = ..., incarnation: _Optional[int] = ..., world: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., snapshots: _Optional[_Iterable[_Union[SnapshotStatus, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., last_error: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("node_id", "version", "pid", "uptime_s", "memory_dir", "nvme_dir", "jobs", "memory_reserved_bytes", "cluster")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_DIR_FIELD_NUMBER: _ClassVar[int]
    NVME_DIR_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    version: str
    pid: int
    uptime_s: float
    memory_dir: str
    nvme_dir: str
    jobs: _containers.RepeatedCompositeFieldContainer[JobStatus]
    memory_reserved_bytes: int
    cluster: ClusterStatus
    def __init__(self, node_id: _Optional[str] = ..., version: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_s: _Optional[float] = ..., memory_dir: _Optional[str] = ..., nvme_dir: _Optional[str] = ..., jobs: _Optional[_Iterable[_Union[JobStatus, _Mapping]]] = ..., memory_reserved_bytes: _Optional[int] = ..., cluster: _Optional[_Union[ClusterStatus, _Mapping]] = ...) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("joined", "epoch", "coordinator", "fenced_by", "refusal", "members", "waiting_for", "refused_calls", "bulk_counters")
    class RefusedCallsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class BulkCountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    JOINED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    FENCED_BY_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    REFUSED_CALLS_FIELD_NUMBER: _ClassVar[int]
    BULK_COUNTERS_FIELD_NUMBER: _ClassVar[int]
    joined: bool
    epoch: int
    coordinator: str
    fenced_by: str
    refusal: str
    members: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    refused_calls: _containers.ScalarMap[str, int]
    bulk_counters: _containers.ScalarMap[str, int]
    def __init__(self, joined: _Optional[bool] = ..., epoch: _Optional[int] = ..., coordinator: _Optional[str] = ..., fenced_by: _Optional[str] = ..., refusal: _Optional[str] = ..., members: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ..., waiting_for: _Optional[_Iterable[str]] = ..., refused_calls: _Optional[_Mapping[str, int]] = ..., bulk_counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("node_id", "address", "labels", "state", "replaced_by", "since_epoch")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REPLACED_BY_FIELD_NUMBER: _ClassVar[int]
    SINCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    address: str
    labels: _containers.ScalarMap[str, str]
    state: str
    replaced_by: str
    since_epoch: int
    def __init__(self, node_id: _Optional[str] = ..., address: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., state: _Optional[str] = ..., replaced_by: _Optional[str] = ..., since_epoch: _Optional[int] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("job", "step", "levels")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    job: str
    step: int
    levels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job: _Optional[str] = ..., step: _Optional[int] = ..., levels: _Optional[_Iterable[str]] = ...) -> None: ...

class VerifiedShard(_message.Message):
    __slots__ = ("job", "incarnation", "step", "rank", "level", "intact", "problem", "bytes")
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    INTACT_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    job: str
    incarnation: int
    step: int
    rank: int
    level: str
    intact: bool
    problem: str
    bytes: int
    def __init__(self, job: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., level: _Optional[str] = ..., intact: _Optional[bool] = ..., problem: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedCompositeFieldContainer[VerifiedShard]
    def __init__(self, shards: _Optional[_Iterable[_Union[VerifiedShard, _Mapping]]] = ...) -> None: ...

class CollectRequest(_message.Message):
    __slots__ = ("job", "everything", "dry_run")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    job: str
    everything: bool
    dry_run: bool
    def __init__(self, job: _Optional[str] = ..., everything: _Optional[bool] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class CollectedItem(_message.Message):
    __slots__ = ("level", "step", "incarnation", "bytes", "reason")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    level: str
    step: int
    incarnation: int
    bytes: int
    reason: str
    def __init__(self, level: _Optional[str] = ..., step: _Optional[int] = ..., incarnation: _Optional[int] = ..., bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class CollectReply(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[CollectedItem]
    def __init__(self, items: _Optional[_Iterable[_Union[CollectedItem, _Mapping]]] = ...) -> None: ...
