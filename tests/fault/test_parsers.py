"""Random bytes under every name that a level reads: problems, never exceptions, never a snapshot.

An agent's start reads all of this before it answers anybody, so that one strange file must cost
no more than itself.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everstep.agent.adoption import adoptions
from everstep.proto.envelope import KINDS, seal
from everstep.proto.errors import FormatInvalid
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Commit, CommittedShard, Member, Membership, Record
from everstep.snapshot.record import open_record, seal_record
from everstep.storage.arena import MemoryLevel
from everstep.storage.identity import parse_commit, parse_record
from everstep.storage.nvme import NvmeLevel

UINT32 = st.integers(0, (1 << 32) - 1)
UINT64 = st.integers(0, (1 << 64) - 1)
SMALL = st.integers(0, 4)
NUMBERS = st.one_of(SMALL, UINT64)
TEXTS = st.one_of(st.sampled_from(["job", "other", "", "../x"]), st.text(max_size=20))

RECORDS = st.builds(
    Record,
    job=TEXTS,
    incarnation=NUMBERS,
    step=NUMBERS,
    rank=st.one_of(SMALL, UINT32),
    world=st.one_of(SMALL, UINT32),
    layout_id=TEXTS,
    image_bytes=st.one_of(st.sampled_from([0, 1, 4096, UNIT_BYTES + 1]), UINT64),
    unit_bytes=st.one_of(st.just(UNIT_BYTES), UINT32),
    unit_digests=st.binary(max_size=48),
    replica_samples=st.binary(max_size=24),
    captured_unix_s=st.floats(),
)
COMMITS = st.builds(
    Commit,
    job=TEXTS,
    incarnation=NUMBERS,
    step=NUMBERS,
    world=st.one_of(SMALL, UINT32),
    shards=st.lists(
        st.builds(
            CommittedShard,
            rank=st.one_of(SMALL, UINT32),
            layout_id=TEXTS,
            image_bytes=UINT64,
            record_digest=st.binary(max_size=20),
        ),
        max_size=3,
    ),
)
MEMBERSHIPS = st.builds(
    Membership,
    job=TEXTS,
    incarnation=NUMBERS,
    world=st.one_of(SMALL, UINT32),
    launch_id=st.text(max_size=20),
    members=st.lists(
        st.builds(
            Member,
            rank=st.one_of(SMALL, UINT32),
            process_id=st.text(max_size=5),
            pid=st.integers(-(1 << 63), (1 << 63) - 1),
            pid_started_s=st.floats(),
        ),
        max_size=3,
    ),
    restored_incarnation=NUMBERS,
    restored_step=NUMBERS,
    restore_decided=st.booleans(),
)


def sealed(messages: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    """Bytes of all kinds of honesty: right in form, wrong in kind, cut, rotten, or noise."""
    bodies = st.one_of(messages.map(lambda m: m.SerializeToString()), st.binary(max_size=200))
    wrapped = st.builds(
        lambda kind, body, repairable: seal(kind, body, repairable=repairable),
        st.sampled_from(sorted(KINDS)),
        bodies,
        st.booleans(),
    )
    cut = st.builds(lambda data, at: data[: at % (len(data) + 1)], wrapped, st.integers(0, 10_000))
    rotten = st.builds(
        lambda data, at, byte: data[: at % len(data)] + bytes([byte]) + data[at % len(data) + 1 :],
        wrapped,
        st.integers(0, 10_000),
        st.integers(0, 255),
    )
    return st.one_of(wrapped, cut, rotten, st.binary(max_size=200))


@given(sealed(RECORDS))
def test_records(data: bytes) -> None:
    for parse in (parse_record, open_record):
        try:
            record = parse(data, "here")
        except FormatInvalid:
            continue
        assert record.rank < record.world
    try:
        record = open_record(data, "here")
    except FormatInvalid:
        return
    assert open_record(seal_record(record), "here") == record


@given(sealed(COMMITS))
def test_commits(data: bytes) -> None:
    try:
        commit = parse_commit(data, "here")
    except FormatInvalid:
        return
    assert all(shard.rank < commit.world for shard in commit.shards)


@pytest.fixture(scope="module")
def memory_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    level = MemoryLevel(root, keep_free_bytes=0)
    level.reserve("job", 0, 1, 2, 8192)
    return root


@pytest.fixture(scope="module")
def nvme_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme")


@pytest.fixture(scope="module")
def nvme(nvme_root: Path) -> Iterator[NvmeLevel]:
    with NvmeLevel(nvme_root) as level:
        yield level


BOUNDED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@BOUNDED
@given(record=sealed(RECORDS), membership=sealed(MEMBERSHIPS))
def test_memory(memory_root: Path, record: bytes, membership: bytes) -> None:
    job = memory_root / "job"
    (job / "rank-00000-g000001-slot-0.record").write_bytes(record)
    (job / "membership").write_bytes(membership)
    level = MemoryLevel(memory_root, keep_free_bytes=0)
    held, problems = level.records("job"), level.problems("job")
    assert len(held) + len(problems) >= 1
    for snapshot in level.snapshots("job"):
        assert level.ranks("job", snapshot) == [0]
    (adopted,) = adoptions(level, None)
    assert [shard.rank for shard in adopted.shards] == [one.rank for one in held]


NAMES = st.one_of(
    st.sampled_from(
        [
            "rank-00000-g000001-s2.arena",
            "rank-00000-g000001-slot-0.record",
            "rank-00001-g000001-slot-9.record",
            "rank-99999-g999999999-slot-0.record",
            "rank-00000-g000001-s0.arena",
            ".rank-00000-g000001-s2.arena.1-1.partial",
            "membership",
            "layouts",
            "commit",
            "rank-00000.record",
            "rank-00000.safetensors",
            "step-000000000001",
            "step-00000000000000000001",
            "step-99999999999999999999",
            ".superseded-step-000000000001",
            ".removed-job",
            ".lock",
        ]
    ),
    st.text(
        st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30
    ).filter(lambda name: name not in (".", "..")),
)


def litter(root: Path, names: list[tuple[str, bytes, bool]]) -> None:
    """Files and directories by any name, with any bytes."""
    for name, data, directory in names:
        path = root / name
        if path.exists() or len(name.encode()) > 255:
            continue
        if directory:
            path.mkdir()
            (path / "commit").write_bytes(data)
        else:
            path.write_bytes(data)


LITTER = st.lists(
    st.tuples(NAMES, sealed(st.one_of(RECORDS, COMMITS, MEMBERSHIPS)), st.booleans()), max_size=6
)


@BOUNDED
@given(names=LITTER)
def test_litter(tmp_path_factory: pytest.TempPathFactory, names: list) -> None:
    memory_root, nvme_root = tmp_path_factory.mktemp("m"), tmp_path_factory.mktemp("n")
    for root in (memory_root, nvme_root):
        (root / "job").mkdir()
        litter(root / "job", names)
        litter(root, [(name, data, False) for name, data, _ in names])
    memory = MemoryLevel(memory_root, keep_free_bytes=0)
    with NvmeLevel(nvme_root) as nvme:
        for level in (memory, nvme):
            for snapshot in level.snapshots("job"):
                level.ranks("job", snapshot)
            level.problems("job")
        found = list(adoptions(memory, nvme))
    assert "job" in [adopted.job for adopted in found]


@BOUNDED
@given(commit=sealed(COMMITS), record=sealed(RECORDS))
def test_nvme(nvme_root: Path, nvme: NvmeLevel, commit: bytes, record: bytes) -> None:
    step = nvme_root / "job" / "step-000000000003"
    step.mkdir(parents=True, exist_ok=True)
    (step / "commit").write_bytes(commit)
    (step / "rank-00000.record").write_bytes(record)
    (step / "rank-00000.safetensors").write_bytes(b"x" * 4096)
    listed, problems = nvme.snapshots("job"), nvme.problems("job")
    assert listed or problems
    for snapshot in listed:
        assert snapshot.step == 3
        for rank in nvme.ranks("job", snapshot):
            for read in (nvme.verify, nvme.open_shard):
                with pytest.raises(FormatInvalid):
                    read("job", snapshot, rank)
