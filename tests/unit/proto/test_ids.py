import pytest

from everstep.proto.errors import InvalidName
from everstep.proto.ids import (
    ShardId,
    SnapshotId,
    checked_name,
    parse_step_directory,
    rank_stem,
    step_directory,
)


@pytest.mark.parametrize("name", ["gpt", "a", "A-1_b.c", "x" * 128])
def test_a_harmless_name_is_returned(name: str) -> None:
    assert checked_name("job", name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../a", "a b", "a\n", "a\0", "é", "x" * 129, "a\\b"]
)
def test_a_name_that_could_leave_its_directory_is_refused(name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        checked_name("job", name)
    assert (caught.value.kind, caught.value.name) == ("job", name)


@pytest.mark.parametrize("step", [0, 1234, 10**12 - 1, 10**12, 2**63])
def test_a_step_directory_is_parsed_back(step: int) -> None:
    assert parse_step_directory(step_directory(step)) == step


@pytest.mark.parametrize(
    "name", ["", "step-1", "step-000000001234.tmp", " step-000000001234", "step-000000001234\n"]
)
def test_another_directory_is_no_step(name: str) -> None:
    assert parse_step_directory(name) is None


def test_step_directories_sort_as_their_steps() -> None:
    steps = [0, 9, 10, 999, 123_456_789]
    assert sorted(map(step_directory, reversed(steps))) == [step_directory(step) for step in steps]


def test_a_later_incarnation_supersedes() -> None:
    assert SnapshotId(2, 10) > SnapshotId(1, 500)
    assert ShardId(SnapshotId(1, 2), 3) < ShardId(SnapshotId(1, 3), 0)
    assert str(ShardId(SnapshotId(1, 2), 3)) == "rank 3 of step 2 (incarnation 1)"
    assert rank_stem(3) == "rank-00003"
