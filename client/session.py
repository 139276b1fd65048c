"""A trainer's session with its agent: attach, listen, and attach again after the agent's restart.

Owns the thread that reads notices and the identity of this process within the job. Promises that
an agent that dies and comes back finds this rank attached again without the trainer's help, that
nothing here blocks the training thread longer than the time it passed, and that a session which
has ended for good (the rank was taken over) says so once.
"""

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence

from everstep.client.channel import Channel
from everstep.client.environment import Launch
from everstep.proto import agent_pb2 as wire
from everstep.proto import processes
from everstep.proto.errors import (
    AgentUnavailable,
    EverstepError,
    OutOfSpace,
    Refused,
    StaleIncarnation,
)

log = logging.getLogger("everstep")
_RETRY_S = 0.05
_RETRY_FIRST_S = 0.1
_RETRY_LAST_S = 2.0


class Session:
    """This process as one rank of a job.

    Args:
        channel: To the agent.
        job: The job's name.
        launch: Rank, world and launch.
        nvme_interval_steps: Overrides the agent's own interval, if given.
        on_notice: Called on the session's thread with each notice but the first.
        in_flight: What this rank is copying at the moment, oldest first, for an agent that comes
            back.
        live: Whether to take the rank over while the others go on, if they do.
    """

    def __init__(
        self,
        channel: Channel,
        job: str,
        launch: Launch,
        nvme_interval_steps: int | None,
        on_notice: Callable[[wire.Notice], None],
        in_flight: Callable[[], Sequence[wire.InFlight]],
        live: bool = False,
    ) -> None:
        self.channel = channel
        self.levels: tuple[str, ...] = ()
        self.ended: EverstepError | None = None
        """Why this process can never attach again; None while it can."""
        self.used = False
        """Whether anything was restored or captured in this incarnation."""
        self.joined = False
        """Whether this process took its rank over while the others go on."""
        self._live = live
        self._identity = wire.Session(
            job=job, rank=launch.rank, world=launch.world, process_id=uuid.uuid4().hex
        )
        self._launch_id = launch.launch_id
        self._nvme_interval_steps = nvme_interval_steps
        self._on_notice = on_notice
        self._in_flight = in_flight
        self._attached = threading.Event()
        self._closed = threading.Event()
        self._renewing = threading.Event()
        self._changed = threading.Condition()
        self._last_error: EverstepError | None = None
        self._stream: object | None = None
        self._started_s = processes.started_s(os.getpid()) or 0.0
        self._thread = threading.Thread(target=self._run, name="everstep-session", daemon=True)

    @property
    def identity(self) -> wire.Session:
        """What every call of this session carries."""
        copy = wire.Session()
        copy.CopyFrom(self._identity)
        return copy

    @property
    def incarnation(self) -> int:
        """The incarnation this process belongs to; 0 before the first attach."""
        return self._identity.incarnation

    def start(self, timeout_s: float) -> None:
        """Attach.

        Raises:
            Refused: If the agent does not want this rank, with the reason.
            AgentUnavailable: If it does not answer in time.
        """
        self._thread.start()
        self.wait_attached(timeout_s)

    def wait_attached(self, timeout_s: float) -> None:
        """Wait until this rank is attached. Raises as `start`."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(
                lambda: self._attached.is_set() or self.ended is not None,
                deadline - time.monotonic(),
            )
        if self.ended is not None:
            raise self.ended
        if not self._attached.is_set():
            raise AgentUnavailable(self.channel.address, self.problem) from self._last_error

    def await_return(self, deadline: float, pause_s: float = _RETRY_S) -> None:
        """After a failed call: give the agent until the deadline to be back; raise nothing."""
        time.sleep(pause_s)
        with contextlib.suppress(EverstepError):
            self.wait_attached(max(_RETRY_S, deadline - time.monotonic()))

    @property
    def problem(self) -> str:
        """Why the stream to the agent is not open, as far as is known."""
        last = self._last_error
        return last.detail if isinstance(last, AgentUnavailable) else str(last or "no answer yet")

    @property
    def attached(self) -> bool:
        """Whether the stream to the agent is open now."""
        return self._attached.is_set()

    def renew(self, *, as_new_process: bool, timeout_s: float) -> None:
        """Attach again within a new incarnation.

        Args:
            as_new_process: End the present incarnation (a rewind); else join the one that has
                replaced it.
            timeout_s: As for `start`.
        """
        with self._changed:
            self._identity.incarnation = 0
            if as_new_process:
                self._identity.process_id = uuid.uuid4().hex
                self._live = False  # it means to end the incarnation
            self.used = False
            self.joined = False
            self._attached.clear()
        self._renewing.set()
        self._cancel()
        self.wait_attached(timeout_s)

    def close(self) -> None:
        """End the session; the agent was told before, or takes this process for dead."""
        self._closed.set()
        self._cancel()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        # gRPC keeps a connection open for as long as a cancelled stream's object lives.
        self._stream = None

    def _cancel(self) -> None:
        stream = self._stream
        if stream is not None:
            stream.cancel()  # type: ignore[attr-defined]

    def _run(self) -> None:
        delay_s = _RETRY_FIRST_S
        while not self._closed.is_set():
            try:
                self._listen()
                delay_s = _RETRY_FIRST_S
            except Refused as error:
                if isinstance(error, StaleIncarnation) and not self.used:
                    # Another rank has begun a new incarnation before this one did anything.
                    self._identity.incarnation = 0
                    self.joined = False
                elif isinstance(error, OutOfSpace) and self._identity.incarnation:
                    # It was attached before, and a full tmpfs may have room again.
                    self._last_error = error
                else:
                    self._end(error)
                    return
            except EverstepError as error:
                self._last_error = error
            was_attached = self._attached.is_set()
            self._attached.clear()
            if was_attached and not self._closed.is_set():
                delay_s = _RETRY_FIRST_S
                log.debug("the session ended: %s", self._last_error)
            if self._renewing.is_set():
                self._renewing.clear()
                continue
            self._closed.wait(delay_s)
            delay_s = min(_RETRY_LAST_S, delay_s * 2)

    def _listen(self) -> None:
        self._stream = self.channel.open_session(self._attach_request())
        for notice in self.channel.notices(self._stream):
            if notice.HasField("attached"):
                with self._changed:
                    self._identity.incarnation = notice.attached.incarnation
                    self.levels = tuple(notice.attached.levels)
                    self.joined = self.joined or notice.attached.joined
                    self._attached.set()
                    self._changed.notify_all()
            else:
                self._on_notice(notice)

    def _attach_request(self) -> wire.AttachRequest:
        request = wire.AttachRequest(
            session=self._identity,
            launch_id=self._launch_id,
            pid=os.getpid(),
            pid_started_s=self._started_s,
            live=self._live,
        )
        if self._nvme_interval_steps is not None:
            request.nvme_interval_steps = self._nvme_interval_steps
        if self._identity.incarnation:
            request.in_flight.extend(self._in_flight())
        return request

    def _end(self, error: EverstepError) -> None:
        with self._changed:
            self.ended = error
            self._attached.clear()
            self._changed.notify_all()
        log.error("no more snapshots from this process: %s", error)
