"""Questions to a running agent, for the CLI.

Owns the CLI's gRPC channel, the deadlines and the translation of errors. Promises that every
question ends within its deadline and raises only errors of our own tree, `AgentUnavailable` if
nobody answers. Does not start an agent, and shows nothing.
"""

import socket as sockets
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from everstep.proto import agent_pb2 as wire
from everstep.proto import peer_pb2 as peer
from everstep.proto.agent_pb2_grpc import AgentStub
from everstep.proto.errors import AgentUnavailable, Refused
from everstep.proto.peer_pb2_grpc import RecoveryStub
from everstep.proto.places import parse_address
from everstep.proto.wire_errors import decode

STATUS_TIMEOUT_S = 10.0
COLLECT_TIMEOUT_S = 600.0
OVERVIEW_TIMEOUT_S = 60.0
"""The agent itself gives the others a few seconds, for each job."""
PLAN_TIMEOUT_S = 120.0
STREAM_TIMEOUT_S = 86_400.0
"""Each node's part has a deadline of its own, by how much it is."""
MESSAGE_LIMIT_BYTES = 256 << 20
_CONNECT_TIMEOUT_S = 5.0
_VERIFY_FIRST_S = 60.0
_SLOWEST_DISK_BYTES_PER_S = 20e6


class Agent:
    """One agent, to be asked things. Use as a context manager.

    Args:
        address: As `config.agent_address` returns it.

    Raises:
        AgentUnavailable: If nothing listens there.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        path = parse_address(address)
        _knock(address, path)
        limit = MESSAGE_LIMIT_BYTES
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
            ],
        )
        self._stub = AgentStub(self._channel)
        self._recovery: Any = RecoveryStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def status(self, job: str = "", elsewhere: Collection[str] = ()) -> wire.StatusReply:
        """What the agent holds and does.

        Args:
            job: This one only; empty for all.
            elsewhere: Jobs that other nodes know: of those it need not know any.

        Raises:
            AgentUnavailable: If it does not answer in time.
            Refused: If it knows no such job.
        """
        reply: wire.StatusReply = self._call("Status", wire.StatusRequest(), STATUS_TIMEOUT_S)
        if not job:
            return reply
        known = [one.job for one in reply.jobs]
        if job not in known and job not in elsewhere:
            raise unknown_job(job, known, f"the agent at {self.address}")
        kept = [one for one in reply.jobs if one.job == job]
        del reply.jobs[:]
        reply.jobs.extend(kept)
        return reply

    def verify(self, job: str, step: int, level: str, held_bytes: int) -> list[wire.VerifiedShard]:
        """Have one step's digests checked at one level.

        Args:
            job: The job.
            step: The step, of whatever incarnation.
            level: The level.
            held_bytes: About how much that is; sets the deadline.

        Raises:
            AgentUnavailable: If it does not answer in time.
        """
        request = wire.VerifyRequest(job=job, step=step, levels=[level])
        timeout_s = _VERIFY_FIRST_S + held_bytes / _SLOWEST_DISK_BYTES_PER_S
        return list(self._call("Verify", request, timeout_s).shards)

    def collect(self, job: str, *, everything: bool, dry_run: bool) -> list[wire.CollectedItem]:
        """Have a job's snapshots freed that retention does not keep, or all of it.

        Raises:
            AgentUnavailable: If it does not answer in time.
            Refused: If the whole job was named and is in use.
        """
        request = wire.CollectRequest(job=job, everything=everything, dry_run=dry_run)
        return list(self._call("Collect", request, COLLECT_TIMEOUT_S).items)

    def overview(self, job: str = "") -> peer.OverviewReply:
        """How safe each job is, over all nodes.

        Raises:
            AgentUnavailable: If the agent does not answer in time.
        """
        request = peer.OverviewRequest(job=job)
        reply: peer.OverviewReply = self._call(
            "Overview", request, OVERVIEW_TIMEOUT_S, self._recovery
        )
        return reply

    def plan(self, job: str, step: int | None, levels: Sequence[str]) -> peer.PlanReply:
        """What of a job can be recovered from all nodes.

        Raises:
            AgentUnavailable: If the agent does not answer in time.
        """
        request = peer.PlanRequest(job=job, step=step, levels=levels)
        reply: peer.PlanReply = self._call("Plan", request, PLAN_TIMEOUT_S, self._recovery)
        return reply

    def recover(self, request: peer.RecoverRequest) -> Iterator[peer.RecoverProgress]:
        """Have a snapshot recovered; what the nodes tell, as it comes.

        Raises:
            AgentUnavailable: If the agent ends before it is done.
            NothingRecoverable: If that snapshot cannot be recovered.
        """
        return self._stream("Recover", request)

    def examine(self, request: peer.ExamineRequest) -> Iterator[peer.ExamineProgress]:
        """Have the copies on all nodes checked; what is found, as it comes.

        Raises:
            AgentUnavailable: If the agent ends before it is done.
            NothingRecoverable: If a step was named that no node has.
        """
        return self._stream("Examine", request)

    def _stream(self, method: str, request: Any) -> Iterator[Any]:
        try:
            yield from getattr(self._recovery, method)(request, timeout=STREAM_TIMEOUT_S)
        except grpc.RpcError as error:
            raise decode(error, self.address) from error

    def _call(self, method: str, request: Any, timeout_s: float, stub: Any = None) -> Any:
        try:
            return getattr(stub or self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise decode(error, self.address) from error


def unknown_job(job: str, known: list[str], where: str) -> Refused:
    """The error for a job that is not there, with those that are."""
    names = ", ".join(known) or "none at all"
    return Refused(f"{where} knows no job {job!r}; it knows {names}. Nothing was done.")


def _knock(address: str, path: Path) -> None:
    """See that something listens: gRPC would say so less clearly, and later."""
    with sockets.socket(sockets.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except FileNotFoundError as error:
            raise AgentUnavailable(address, "there is no such socket") from error
        except ConnectionRefusedError as error:
            raise AgentUnavailable(address, "the agent that left this socket is gone") from error
        except OSError as error:
            raise AgentUnavailable(address, str(error)) from error
