"""Errors across gRPC: the same class, with the same facts, on both sides.

Owns the mapping between the exception tree and gRPC's status codes. Promises that an error that
the agent raised on purpose arrives as the class it was raised as; anything else arrives as
`AgentUnavailable`. Executes nothing: only classes of `proto.errors` are ever constructed.
"""

import json
from typing import Any

import grpc

from everstep.proto import errors
from everstep.proto.errors import (
    AgentFault,
    AgentUnavailable,
    DeadlineExceeded,
    EverstepError,
    Refused,
)

METADATA_KEY = "everstep-error-bin"
_MAXIMUM_BYTES = 6000
_CUT_CHARACTERS = (3000, 400)
"""The second fits even if JSON writes each character as two escapes."""
_KINDS = (errors.Retryable, errors.Refused, errors.Damaged, EverstepError)
_CLASSES = {
    name: thing
    for name, thing in vars(errors).items()
    if isinstance(thing, type) and issubclass(thing, EverstepError)
}


def status_of(error: EverstepError) -> grpc.StatusCode:
    """The gRPC status that fits an error best, for clients that know no more."""
    if isinstance(error, DeadlineExceeded):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    if isinstance(error, errors.OutOfSpace):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, Refused):
        return grpc.StatusCode.FAILED_PRECONDITION
    if isinstance(error, errors.Damaged):
        return grpc.StatusCode.DATA_LOSS
    return grpc.StatusCode.UNAVAILABLE


def encode(error: EverstepError) -> bytes:
    """The error as bytes for the trailing metadata; cut to its kind and message if it must be."""
    name = type(error).__name__
    try:
        data = json.dumps([name, error.arguments, error.named]).encode()
    except TypeError:
        data = b""
    if data and len(data) <= _MAXIMUM_BYTES and name in _CLASSES:
        return data
    kind = next(kind for kind in _KINDS if isinstance(error, kind))
    for limit in _CUT_CHARACTERS:
        data = json.dumps([kind.__name__, [str(error)[:limit]]]).encode()
        if len(data) <= _MAXIMUM_BYTES:
            break
    return data


def decode(error: grpc.RpcError, address: str) -> EverstepError:
    """The error that the agent raised, or what a failed call means.

    Args:
        error: What the stub raised.
        address: The agent's, for the message.
    """
    metadata: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    for key, value in metadata or ():
        if key == METADATA_KEY:
            rebuilt = _rebuild(value)
            if rebuilt is not None:
                return rebuilt
    code = error.code() if hasattr(error, "code") else None
    detail = error.details() if hasattr(error, "details") else str(error)
    if code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED):
        return AgentFault(address, str(detail)[:500])
    name = code.name.lower().replace("_", " ") if code is not None else "no answer"
    return AgentUnavailable(address, f"{name}: {detail}"[:500])


def decode_bytes(data: bytes, address: str) -> EverstepError:
    """The error that `encode` made these bytes of; `AgentFault` if they are of none.

    Args:
        data: What came.
        address: The agent's, for the message.
    """
    return _rebuild(data) or AgentFault(address, "its error cannot be read")


def _rebuild(data: bytes) -> EverstepError | None:
    try:
        name, arguments, *more = json.loads(data)
        named = more[0] if more else {}
        return _CLASSES[name](
            *map(_frozen, arguments), **{key: _frozen(value) for key, value in named.items()}
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
