"""An error that the agent raises on purpose arrives as itself; nothing else is ever constructed."""

import inspect
import json
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.proto import errors
from everstep.proto.errors import AgentUnavailable, EverstepError
from everstep.proto.wire_errors import METADATA_KEY, decode, encode, status_of

ADDRESS = "unix:/run/agent.sock"
SAMPLES: Sequence[EverstepError] = (
    errors.AgentUnavailable(ADDRESS, "it is dead"),
    errors.ArenaLost("job", 3),
    errors.NotPersisted(3, "no space left"),
    errors.AgentFault(ADDRESS, "KeyError: 3"),
    errors.DeadlineExceeded("the commit of step 3", 1.5, ("rank 0", "rank 3")),
    errors.DeadlineExceeded("the commit of step 3", 1.5),
    errors.Refused("no."),
    errors.InvalidName("job", "../x"),
    errors.InvalidConfiguration("slots", "must be 2 or more", "everstep.toml"),
    errors.RankClaimed("job", 3, 4711),
    errors.StaleIncarnation("job", 1, 2),
    errors.PeerUnavailable("n3", "the connection was closed after 5 units"),
    errors.PeerBusy("n3", "it decodes 16 segments"),
    errors.CoordinatorUnknown(("n1", "n2")),
    errors.StaleEpoch("n3", 4, 7),
    errors.Fenced("n3", "n9"),
    errors.OutOfSpace("/dev/shm/everstep", 5_000_000, 1_000_000, "Free some."),
    errors.OutOfSpace("/dev/shm/everstep", 5_000_000, None),
    errors.NotCapturable("model/x", "Generator", "detail"),
    errors.NotCompressible("LBFGS", "its state is lists"),
    errors.Misplaced("model/x: its extents overlap", "model/y: is outside"),
    errors.StateMismatch("differs", ("a",), ("b", "c"), ("d: f32 -> bf16",)),
    errors.StateMismatch("differs", divergent=("e",), contradictory=("f: as i8 and u8",)),
    errors.StateMismatch("differs", reshaped=("d: f32 -> bf16",)),
    errors.PermissionRefused(1001),
    errors.Damaged("gone."),
    errors.ShardCorrupt("arena, rank 0", tuple(range(12))),
    errors.FormatInvalid("membership", "it is truncated"),
    errors.TooFewSymbols(6, 5),
    errors.NothingRecoverable("job", ("step 3: rotten", "step 2: rotten")),
)


class Failed(grpc.RpcError):
    """What a stub raises."""

    def __init__(
        self,
        metadata: Sequence[tuple[str, Any]] | None,
        code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
        details: str = "failed to connect",
    ) -> None:
        self._metadata = metadata
        self._code = code
        self._details = details

    def trailing_metadata(self) -> Any:
        return self._metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


def arrived(data: bytes) -> EverstepError:
    return decode(Failed([("other", "x"), (METADATA_KEY, data)]), ADDRESS)


def facts(error: EverstepError) -> dict[str, object]:
    return {name: value for name, value in vars(error).items() if not name.startswith("_")}


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_arrives_as_itself(error: EverstepError) -> None:
    found = arrived(encode(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert facts(found) == facts(error)


def test_what_may_cross_the_wire_is_sampled() -> None:
    """A class whose facts do not survive would otherwise go unnoticed."""
    # A cause is an exception of the operating system's, which stays on its side: see below.
    stays = {errors.EverstepError, errors.Retryable, errors.WriteFailed}
    everything = {
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, EverstepError)
    }
    assert everything - stays == {type(error) for error in SAMPLES}


def test_facts_that_cannot_travel_leave_the_message() -> None:
    error = errors.WriteFailed("/nvme/x", OSError(28, "No space left on device"))
    found = arrived(encode(error))
    assert "No space left on device" in str(found)
    # The caller may still try again, as it could have before.
    assert type(found) is errors.Retryable


def test_an_error_that_is_too_long_keeps_its_kind() -> None:
    long = ("x" * 100,) * 200
    refused = encode(errors.StateMismatch("differs", missing=long))
    damaged = encode(errors.NothingRecoverable("job", long))
    assert len(refused) <= 6000
    assert len(damaged) <= 6000
    assert type(arrived(refused)) is errors.Refused
    assert type(arrived(damaged)) is errors.Damaged
    assert str(arrived(damaged)).startswith("job 'job' has snapshots")


def test_long_messages_that_json_makes_longer_still_fit_the_metadata() -> None:
    assert len(encode(errors.Refused("\u2603" * 5000))) <= 6000


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_the_status_tells_other_clients_what_to_do(error: EverstepError) -> None:
    status = status_of(error)
    if isinstance(error, errors.DeadlineExceeded):
        assert status is grpc.StatusCode.DEADLINE_EXCEEDED
    elif isinstance(error, errors.OutOfSpace):
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    elif isinstance(error, errors.Refused):
        assert status is grpc.StatusCode.FAILED_PRECONDITION
    elif isinstance(error, errors.Damaged):
        assert status is grpc.StatusCode.DATA_LOSS
    else:
        assert status is grpc.StatusCode.UNAVAILABLE


def test_anything_else_means_that_no_agent_answered() -> None:
    found = decode(Failed(None), ADDRESS)
    assert isinstance(found, AgentUnavailable)
    assert found.address == ADDRESS
    assert "unavailable: failed to connect" in found.detail
    assert isinstance(decode(grpc.RpcError("bare"), ADDRESS), AgentUnavailable)
    long = decode(Failed((), details="x" * 5000), ADDRESS)
    assert isinstance(long, AgentUnavailable)
    assert len(long.detail) <= 500


def test_an_agent_that_fails_unexpectedly_is_not_taken_for_a_dead_one() -> None:
    found = decode(Failed((), grpc.StatusCode.UNKNOWN, "KeyError: 3"), ADDRESS)
    assert type(found) is errors.AgentFault
    assert "KeyError: 3" in str(found)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"Refused"',
        b'["Refused"]',
        b'["Refused", null]',
        b'["RankClaimed", ["one argument"]]',
        b'["RankClaimed", {"job": 1}]',
        b'["OutOfSpace", ["x", "not a number", null]]',
        b'["ShardCorrupt", ["x", 3]]',
        b'["ValueError", ["not ours"]]',
        b'["__import__", ["os"]]',
        b'[["Refused"], ["x"]]',
        b'["Refused", ["x"], "more"]',
        b'["Refused", ["x"], {"other": 1}]',
        b'["Refused", ["x"], {}, "more"]',
        b"\xff\xfe",
        b"[" * 5000,
    ],
)
def test_bytes_that_are_no_error_are_no_answer(data: bytes) -> None:
    assert isinstance(arrived(data), AgentUnavailable | errors.Refused)


@given(st.binary(max_size=200))
def test_no_bytes_can_do_more_than_fail(data: bytes) -> None:
    assert isinstance(arrived(data), EverstepError)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
class_names = st.sampled_from(sorted(name for name in vars(errors) if name[0].isupper()))


@given(class_names | st.text(), json_values)
def test_no_arguments_can_do_more_than_fail(name: str, arguments: object) -> None:
    assert isinstance(arrived(json.dumps([name, arguments]).encode()), EverstepError)
