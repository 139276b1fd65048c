"""Taking one snapshot: what there is, where it goes, whether the agent has room.

Owns the order of these questions, and the pause after an agent that did not answer. Promises that
the training thread waits here for the agent no longer than the limits say, and that whatever ails
the agent or its memory is a skipped snapshot with a reason (P3); only a state that cannot be stored
is raised. Copies nothing: see `client/capturing.py`.
"""

import functools
import logging
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from everstep.client import rng
from everstep.client.arrangement import Arrangement, Arranger
from everstep.client.attachment import Attachment, Collected
from everstep.client.capturing import Capturing
from everstep.client.channel import Channel
from everstep.client.handle import Snapshot
from everstep.client.limits import Limits
from everstep.client.offers import Asked, OfferLine
from everstep.client.recollecting import Recollecting
from everstep.client.session import Session
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import (
    ArenaLost,
    DeadlineExceeded,
    EverstepError,
    NotCapturable,
    OutOfSpace,
    RankClaimed,
    StaleIncarnation,
    StateMismatch,
)
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record, Value

log = logging.getLogger("everstep")
_SKIPPED_FOR: dict[type[Exception], str] = {OutOfSpace: "no room", RankClaimed: "claimed"}
"""Kinds of skipped snapshots, each counted and warned of by itself; the rest is the agent's."""
_ASK_AGAIN_S = 0.005


class Snapshotting:
    """Takes the snapshots of one client.

    Args:
        channel: To the agent.
        session: Of this process.
        arranger: Keeps layout and arena.
        capturing: Copies.
        limits: How long to wait.
        patient: Whether to wait for a slot and for a capture under way, rather than to skip.
        captures_in_flight: How many captures may be under way; None: two with state on a device.
        incremental: Whether frozen parameters count as guarded.

    Attributes:
        setup_s: What arranging a new layout has cost the last snapshot.
    """

    def __init__(
        self,
        channel: Channel,
        session: Session,
        arranger: Arranger,
        capturing: Capturing,
        limits: Limits,
        *,
        patient: bool,
        captures_in_flight: int | None,
        incremental: bool,
    ) -> None:
        self.setup_s = 0.0
        self._channel = channel
        self._offers = OfferLine(channel)
        self._session = session
        self._arranger = arranger
        self._capturing = capturing
        self._limits = limits
        self._patient = patient
        self._captures_in_flight = captures_in_flight
        self._incremental = incremental
        self._recollecting = Recollecting()
        self._paused_until_s = 0.0
        self._paused_for = ""
        arranger.before_change = self._before_change

    def take(
        self, step: int, attachments: Mapping[str, Attachment], ddp: frozenset[str]
    ) -> Snapshot:
        """Begin a capture, or say why not.

        Raises:
            NotCapturable: If something attached cannot be stored.
        """
        self.setup_s = 0.0
        reason = self._not_ready()
        if reason:
            return Snapshot(step, reason)
        asked: Asked | None = None
        try:
            # The agent answers while this thread looks at the state.
            if self._arranger.is_arranged:
                asked = self._ask(step)
            collected = self._recollecting.collect(
                attachments, ddp, frozen_guarded=self._incremental
            )
            generators = rng.capture()
            if not self._capturing.begun:
                self._choose_captures(collected)
            arrangement, offer = self._granted(attachments, collected, step, asked)
        except (NotCapturable, StateMismatch) as error:
            if asked is not None:
                self._withdraw(asked, step, str(error))
            raise
        except StaleIncarnation as error:
            return Snapshot(step, str(error))
        except (EverstepError, OSError) as error:
            # Whatever ails the agent or its memory, training goes on without a snapshot.
            self._paused_for = f"{_SKIPPED_FOR.get(type(error), 'agent')}: {error}"
            self._paused_until_s = time.monotonic() + self._limits.pause_s
            return Snapshot(step, self._paused_for)
        if not offer.granted:
            return Snapshot(step, offer.reason)
        self._session.used = True
        record = self._record(step, arrangement)
        record.values.extend(Value(path=path, json=json) for path, json in collected.values)
        return self._capturing.begin(step, arrangement, offer.slot, record, generators)

    def _choose_captures(self, collected: Collected) -> None:
        """As given, else two if anything is on an accelerator: its copies outlast the fence."""
        if self._captures_in_flight is None:
            on_device = any(tensor.device.type != "cpu" for _, tensor in collected.tensors)
            self._captures_in_flight = 2 if on_device else 1
        self._capturing.captures_in_flight = self._captures_in_flight
        self._arranger.captures_in_flight = self._captures_in_flight

    def _before_change(self) -> None:
        if not self._capturing.settle():
            raise DeadlineExceeded("the captures under way", self._limits.seal_s, ("this rank",))

    def _granted(
        self,
        attachments: Mapping[str, Attachment],
        collected: Collected,
        step: int,
        asked: Asked | None,
    ) -> tuple[Arrangement, wire.OfferReply]:
        before = self._arranger.arena
        arrangement = self._arrange(attachments, collected, step)
        try:
            # What was granted in the arena before is of no use in another one.
            offer = self._offer(step, asked if arrangement.arena is before else None)
            if _fits(offer, arrangement):
                return arrangement, offer
        except ArenaLost as error:
            log.warning("%s", error)
        self._before_change()
        self._arranger.forget()
        arrangement, offer = self._arrange(attachments, collected, step), self._offer(step)
        if not _fits(offer, arrangement):
            offer = wire.OfferReply(granted=False, reason="busy: the arena is being replaced")
        return arrangement, offer

    def _not_ready(self) -> str:
        """Why no snapshot can be begun now; empty if one can."""
        if self._session.ended is not None:
            return str(self._session.ended)
        under_way = self._capturing.under_way()
        if under_way is not None and not self._patient:
            return f"busy: step {under_way.step} is still being copied"
        if under_way is not None and not self._capturing.make_room():
            return f"busy: step {under_way.step} is not sealed yet"
        if not self._session.attached:
            return f"agent: not connected: {self._session.problem}"
        if time.monotonic() < self._paused_until_s:
            return self._paused_for
        return ""

    def _arrange(
        self, attachments: Mapping[str, Attachment], collected: Collected, step: int
    ) -> Arrangement:
        begun = time.perf_counter()
        parts = [attached.part for attached in attachments.values()]
        session = self._session.identity
        arrangement = self._arranger.arrange(session, parts, collected, step)
        self.setup_s = time.perf_counter() - begun
        return arrangement

    def _ask(self, step: int) -> Asked:
        request = wire.OfferRequest(
            session=self._session.identity,
            step=step,
            patient=self._patient,
            captures_in_flight=self._capturing.captures_in_flight,
            in_flight=self._capturing.in_flight(),
        )
        return self._offers.ask(request, self._limits.offer_s)

    def close(self) -> None:
        """Ask for nothing more."""
        self._offers.hang_up()

    def _withdraw(self, asked: Asked, step: int, reason: str) -> None:
        """Nothing will be copied to the slot that was asked for."""
        request = wire.AbandonRequest(session=self._session.identity, step=step, reason=reason)
        with suppress(EverstepError):
            asked.result()  # or else it may be granted after it was given back
        try:
            self._channel.call("Abandon", request, self._limits.offer_s)
        except EverstepError:
            log.debug("the agent was not told that step %d is abandoned", step)

    def _offer(self, step: int, asked: Asked | None = None) -> wire.OfferReply:
        deadline = time.monotonic() + (self._limits.seal_s if self._patient else 0.0)
        while True:
            reply = (asked or self._ask(step)).result()
            asked = None
            busy = not reply.granted and reply.reason.startswith("busy")
            if not busy or time.monotonic() >= deadline:
                return reply
            time.sleep(_ASK_AGAIN_S)

    def _record(self, step: int, arrangement: Arrangement) -> Record:
        return Record(
            job=self._session.identity.job,
            incarnation=self._session.incarnation,
            step=step,
            rank=self._session.identity.rank,
            world=self._session.identity.world,
            layout_id=arrangement.layout.layout_id,
            image_bytes=arrangement.layout.image_bytes,
            unit_bytes=UNIT_BYTES,
            captured_unix_s=time.time(),
            producer=_producer(),
        )


@functools.cache
def _producer() -> str:
    try:
        everstep = version("everstep")
    except PackageNotFoundError:
        everstep = "source"
    return f"everstep {everstep}, torch {torch.__version__}, python {platform.python_version()}"


def _fits(offer: wire.OfferReply, arrangement: Arrangement) -> bool:
    """Whether a slot, if one was granted, lies in the arena that is mapped here.

    A reservation that this process did not hear of (its answer came too late, or it was made for
    the process before) may be the present one: the same slot of the older arena may hold the
    newest commit. And the arena that is mapped here may have been removed, and made anew for
    another reservation of the same number.
    """
    arena = arrangement.arena
    return not offer.granted or (offer.generation == arena.generation and arena.is_linked())
