from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Leaf(_message.Message):
    __slots__ = ("name", "dtype", "shape", "offset", "start", "stop", "replicated", "tensor", "global_shape", "block_offset", "group")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    REPLICATED_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_SHAPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_OFFSET_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    start: int
    stop: int
    replicated: bool
    tensor: str
    global_shape: _containers.RepeatedScalarFieldContainer[int]
    block_offset: _containers.RepeatedScalarFieldContainer[int]
    group: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., replicated: _Optional[bool] = ..., tensor: _Optional[str] = ..., global_shape: _Optional[_Iterable[int]] = ..., block_offset: _Optional[_Iterable[int]] = ..., group: _Optional[int] = ...) -> None: ...

class Alias(_message.Message):
    __slots__ = ("name", "of")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    name: str
    of: str
    def __init__(self, name: _Optional[str] = ..., of: _Optional[str] = ...) -> None: ...

class Container(_message.Message):
    __slots__ = ("path", "kind")
    PATH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    path: str
    kind: str
    def __init__(self, path: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("name", "kind", "class_name", "per_rank")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    PER_RANK_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    class_name: str
    per_rank: bool
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., class_name: _Optional[str] = ..., per_rank: _Optional[bool] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("parts", "leaves", "aliases", "containers", "image_bytes")
    PARTS_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    CONTAINERS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    leaves: _containers.RepeatedCompositeFieldContainer[Leaf]
    aliases: _containers.RepeatedCompositeFieldContainer[Alias]
    containers: _containers.RepeatedCompositeFieldContainer[Container]
    image_bytes: int
    def __init__(self, parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., leaves: _Optional[_Iterable[_Union[Leaf, _Mapping]]] = ..., aliases: _Optional[_Iterable[_Union[Alias, _Mapping]]] = ..., containers: _Optional[_Iterable[_Union[Container, _Mapping]]] = ..., image_bytes: _Optional[int] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("path", "json")
    PATH_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    path: str
    json: str
    def __init__(self, path: _Optional[str] = ..., json: _Optional[str] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("job", "incarnation", "step", "rank", "world", "layout_id", "image_bytes", "unit_bytes", "unit_digests", "values", "replica_samples", "captured_unix_s", "producer")
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNIT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    REPLICA_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    job: str
    incarnation: int
    step: int
    rank: int
    world: int
    layout_id: str
    image_bytes: int
    unit_bytes: int
    unit_digests: bytes
    values: _containers.RepeatedCompositeFieldContainer[Value]
    replica_samples: bytes
    captured_unix_s: float
    producer: str
    def __init__(self, job: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., layout_id: _Optional[str] = ..., image_bytes: _Optional[int] = ..., unit_bytes: _Optional[int] = ..., unit_digests: _Optional[bytes] = ..., values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ..., replica_samples: _Optional[bytes] = ..., captured_unix_s: _Optional[float] = ..., producer: _Optional[str] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("job", "incarnation", "step", "world", "shards", "committed_unix_s", "commit_id")
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ID_FIELD_NUMBER: _ClassVar[int]
    job: str
    incarnation: int
    step: int
    world: int
    shards: _containers.RepeatedCompositeFieldContainer[CommittedShard]
    committed_unix_s: float
    commit_id: bytes
    def __init__(self, job: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., world: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[CommittedShard, _Mapping]]] = ..., committed_unix_s: _Optional[float] = ..., commit_id: _Optional[bytes] = ...) -> None: ...

class CommittedShard(_message.Message):
    __slots__ = ("rank", "layout_id", "image_bytes", "record_digest")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECORD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    rank: int
    layout_id: str
    image_bytes: int
    record_digest: bytes
    def __init__(self, rank: _Optional[int] = ..., layout_id: _Optional[str] = ..., image_bytes: _Optional[int] = ..., record_digest: _Optional[bytes] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("job", "incarnation", "world", "launch_id", "members", "restored_incarnation", "restored_step", "restore_decided")
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RESTORED_STEP_FIELD_NUMBER: _ClassVar[int]
    RESTORE_DECIDED_FIELD_NUMBER: _ClassVar[int]
    job: str
    incarnation: int
    world: int
    launch_id: str
    members: _containers.RepeatedCompositeFieldContainer[Member]
    restored_incarnation: int
    restored_step: int
    restore_decided: bool
    def __init__(self, job: _Optional[str] = ..., incarnation: _Optional[int] = ..., world: _Optional[int] = ..., launch_id: _Optional[str] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., restored_incarnation: _Optional[int] = ..., restored_step: _Optional[int] = ..., restore_decided: _Optional[bool] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("rank", "process_id", "pid", "pid_started_s")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PID_STARTED_S_FIELD_NUMBER: _ClassVar[int]
    rank: int
    process_id: str
    pid: int
    pid_started_s: float
    def __init__(self, rank: _Optional[int] = ..., process_id: _Optional[str] = ..., pid: _Optional[int] = ..., pid_started_s: _Optional[float] = ...) -> None: ...

class ParityPlan(_message.Message):
    __slots__ = ("plan_id", "job", "incarnation", "step", "world", "code", "parities", "unit_bytes", "members")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    PARITIES_FIELD_NUMBER: _ClassVar[int]
    UNIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    plan_id: str
    job: str
    incarnation: int
    step: int
    world: int
    code: str
    parities: int
    unit_bytes: int
    members: _containers.RepeatedCompositeFieldContainer[PlannedMember]
    def __init__(self, plan_id: _Optional[str] = ..., job: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., world: _Optional[int] = ..., code: _Optional[str] = ..., parities: _Optional[int] = ..., unit_bytes: _Optional[int] = ..., members: _Optional[_Iterable[_Union[PlannedMember, _Mapping]]] = ...) -> None: ...

class PlannedMember(_message.Message):
    __slots__ = ("node_id", "shards")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    shards: _containers.RepeatedCompositeFieldContainer[PlannedShard]
    def __init__(self, node_id: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[PlannedShard, _Mapping]]] = ...) -> None: ...

class PlannedShard(_message.Message):
    __slots__ = ("rank", "image_bytes", "layout_id", "record_digest")
    RANK_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    RECORD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    rank: int
    image_bytes: int
    layout_id: str
    record_digest: bytes
    def __init__(self, rank: _Optional[int] = ..., image_bytes: _Optional[int] = ..., layout_id: _Optional[str] = ..., record_digest: _Optional[bytes] = ...) -> None: ...

class ShardRecord(_message.Message):
    __slots__ = ("rank", "record")
    RANK_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    rank: int
    record: bytes
    def __init__(self, rank: _Optional[int] = ..., record: _Optional[bytes] = ...) -> None: ...

class ParityManifest(_message.Message):
    __slots__ = ("plan", "member", "unit_digests", "records", "encoded_unix_s", "parity_bytes")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    UNIT_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    ENCODED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    PARITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    plan: ParityPlan
    member: int
    unit_digests: bytes
    records: _containers.RepeatedCompositeFieldContainer[ShardRecord]
    encoded_unix_s: float
    parity_bytes: int
    def __init__(self, plan: _Optional[_Union[ParityPlan, _Mapping]] = ..., member: _Optional[int] = ..., unit_digests: _Optional[bytes] = ..., records: _Optional[_Iterable[_Union[ShardRecord, _Mapping]]] = ..., encoded_unix_s: _Optional[float] = ..., parity_bytes: _Optional[int] = ...) -> None: ...
