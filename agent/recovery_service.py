"""The gRPC face of what the command line asks about all nodes: the service `Recovery`.

Owns its registration beside the service `Agent`, on the same socket. Promises that an error raised
on purpose arrives as itself. What the answers are is in `agent.overseeing` and `agent.examining`.
"""

from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import grpc

from everstep.agent.answering import abort
from everstep.agent.cluster import Cluster
from everstep.agent.examining import Examining
from everstep.agent.overseeing import Overseeing
from everstep.agent.pipeline import Pipeline
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import EverstepError, Refused
from everstep.proto.peer_pb2_grpc import RecoveryServicer, add_RecoveryServicer_to_server

_Message = TypeVar("_Message")


class RecoveryService(RecoveryServicer):
    """See `Recovery` in peer.proto."""

    def __init__(self, pipeline: Pipeline, cluster: Cluster | None) -> None:
        """Answer for an agent; `cluster` is None if it stands alone."""
        self._overseeing = Overseeing(pipeline, cluster)
        self._examining = None
        if cluster is not None:
            self._examining = Examining(self._overseeing, cluster)

    async def Overview(self, request: wire.OverviewRequest, context: Any) -> Any:
        """See peer.proto."""
        return await _answered(context, self._overseeing.overview(request))

    async def Plan(self, request: wire.PlanRequest, context: Any) -> Any:
        """See peer.proto."""
        return await _answered(context, self._overseeing.plan(request))

    async def Recover(
        self, request: wire.RecoverRequest, context: Any
    ) -> AsyncIterator[wire.RecoverProgress]:
        """See peer.proto."""
        async for told in _streamed(context, self._overseeing.recover(request)):
            yield told

    async def Examine(
        self, request: wire.ExamineRequest, context: Any
    ) -> AsyncIterator[wire.ExamineProgress]:
        """See peer.proto."""
        if self._examining is None:
            await abort(context, Refused("this agent stands alone: ask it with Verify."))
            return
        async for told in _streamed(context, self._examining.examine(request)):
            yield told


def serve_recovery(server: grpc.aio.Server, pipeline: Pipeline, cluster: Cluster | None) -> None:
    """Answer on a server that is not started yet."""
    add_RecoveryServicer_to_server(RecoveryService(pipeline, cluster), server)


async def _answered(context: Any, answer: Awaitable[_Message]) -> Any:
    try:
        return await answer
    except EverstepError as error:
        return await abort(context, error)


async def _streamed(context: Any, messages: AsyncIterator[_Message]) -> AsyncIterator[_Message]:
    try:
        async for message in messages:
            yield message
    except EverstepError as error:
        await abort(context, error)
