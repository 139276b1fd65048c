"""Asking the agent what to restore, and bringing it back into the live objects.

Owns the questions to the agent, with the search for another copy when one turns out to be
damaged. Promises that nothing attached is touched before every byte that will be used matched
its digest and everything attached was seen to fit. Chooses nothing: the agent does.
"""

import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from everstep.client import checking, rng
from everstep.client.attachment import Attachment, decode_torch_value
from everstep.client.channel import Channel
from everstep.client.limits import Limits
from everstep.client.resizing import derived_seed
from everstep.client.saved import Saved
from everstep.client.session import Session
from everstep.client.terms import Terms
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import (
    Damaged,
    DeadlineExceeded,
    FormatInvalid,
    Retryable,
    ShardCorrupt,
    StaleIncarnation,
)
from everstep.proto.state_pb2 import Record
from everstep.snapshot import values
from everstep.snapshot.device_fill import Pinned
from everstep.snapshot.layout import Layout, decode
from everstep.snapshot.record import open_record
from everstep.snapshot.reshard import Holdings
from everstep.snapshot.restore import Need, Restoration, Shard

log = logging.getLogger("everstep")
_THREADS_LIMIT = 16
_LIVE_TRIES = 3
_PAUSE_FIRST_S = 0.05
_PAUSE_LAST_S = 2.0


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore came to.

    Attributes:
        step: None if the job has no snapshot at all.
        levels: Of the copies that were used, each once.
        rejected: The copies that were not, as text, with the reasons.
        replicated: The leaves that were replicated in it.
        notes: What other ranks than those that saved it have changed, in words.
        moved_bytes: How many bytes were copied into tensors.
    """

    step: int | None
    levels: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    moved_bytes: int = 0


class _CopyDamaged(Exception):
    """Tells which copy failed its check before anything was touched."""

    def __init__(self, copy: wire.RejectedCopy) -> None:
        super().__init__(copy.reason)
        self.copy = copy


class _AskAnew(Exception):
    """The bytes are not where the agent said, or it is another agent: nothing was touched yet."""

    def __init__(self, cause: Retryable) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Patience:
    """A restore that cannot go on yet: it waits, longer each time, and says for what."""

    def __init__(self, session: Session, rank: int, limit_s: float) -> None:
        self._session = session
        self._rank = rank
        self._deadline = time.monotonic() + limit_s
        self._pause_s = _PAUSE_FIRST_S
        self._told = ""

    @property
    def remaining_s(self) -> float:
        """Until it gives up."""
        return self._deadline - time.monotonic()

    def wait(self, problem: Retryable) -> None:
        """Give whatever is wrong some time.

        Raises:
            Retryable: The problem itself, once there is no time left.
        """
        if self.remaining_s <= 0:
            raise problem from None
        if str(problem) != self._told:
            self._told = str(problem)
            log.warning("rank %d waits to restore, and asks again: %s", self._rank, self._told)
        self._session.await_return(self._deadline, min(self._pause_s, self.remaining_s))
        self._pause_s = min(_PAUSE_LAST_S, self._pause_s * 2)


class Restoring:
    """Restores for one rank.

    Args:
        channel: To the agent.
        session: Of this process.
        rank: Its rank.
        limits: How long to wait.
        pinned: Tells what of an arena is mapped here and pinned already.
    """

    def __init__(
        self,
        channel: Channel,
        session: Session,
        rank: int,
        limits: Limits,
        pinned: Pinned | None = None,
    ) -> None:
        self._pinned = pinned
        self._channel = channel
        self._session = session
        self._rank = rank
        self._limits = limits
        # What came last, and how it was understood: `rewind` gets it again and again.
        self._known: dict[bytes, Layout] = {}
        self._holdings: Holdings | None = None
        self._needs: list[Need] = []

    def restore(
        self,
        attachments: Mapping[str, Attachment],
        terms: Terms,
        *,
        to: int | None,
        levels: tuple[str, ...],
    ) -> Restored:
        """See `everstep.client.client.Client.restore`."""
        request = wire.RestoreRequest(levels=levels)
        if to is not None:
            request.to_step = to
        tries_left = _LIVE_TRIES
        patience = self._patience()
        while True:
            reply = self._ask(request)
            self._session.used = True
            if not reply.found:
                return Restored(None)
            try:
                with _uncollected():
                    restored = self._load(reply, attachments, terms)
                break
            except _AskAnew as anew:
                patience.wait(anew.cause)
            except _CopyDamaged as found:
                if request.live and tries_left:
                    # The others go on: they may have overwritten it. The agent looks anew.
                    tries_left -= 1
                    log.warning("step %d is not what it was: %s", reply.step, found)
                    continue
                alone = request.session.world == 1
                if not alone or len(request.rejected) >= len(reply.rejected) + 64:
                    raise FormatInvalid("a copy that the agent had checked", str(found)) from found
                request.rejected.append(found.copy)
        rejected = tuple(
            f"step {copy.step}, rank {copy.rank}, {copy.level}: {copy.reason}"
            for copy in reply.rejected
        )
        for line in rejected:
            log.warning("a damaged copy was not used: %s", line)
        log.info("rank %d restored step %d", self._rank, reply.step)
        for note in restored.notes:
            log.info("step %d in %d ranks: %s", reply.step, self._world, note)
        return replace(restored, rejected=rejected)

    def peek(self, name: str, *, to: int | None) -> tuple[int, object] | None:
        """See `everstep.client.client.Client.peek`."""
        request = wire.RestoreRequest()
        if to is not None:
            request.to_step = to
        reply = self._ask(request)
        if not reply.found:
            return None
        try:
            shards = {found.rank: _shard(reply, found, self._known) for found in reply.shards}
        except _CopyDamaged as damaged:
            raise FormatInvalid("the copy to be restored", str(damaged)) from damaged
        saved = _saved(shards, self._rank, self._world)
        return int(reply.step), saved.tree(name, {}) if name in saved.classes else None

    def _ask(self, request: wire.RestoreRequest) -> wire.RestoreReply:
        patience = self._patience()
        while True:
            self._session.wait_attached(self._limits.agent_start_s)
            request.session.CopyFrom(self._session.identity)
            request.live = self._session.joined
            try:
                timeout_s = max(0.1, patience.remaining_s)
                reply: wire.RestoreReply = self._channel.call("Restore", request, timeout_s)
                return reply
            except StaleIncarnation:
                if self._session.used:
                    raise
                self._session.renew(as_new_process=False, timeout_s=self._limits.agent_start_s)
            except DeadlineExceeded:
                raise
            except Retryable as error:
                patience.wait(error)

    def _patience(self) -> _Patience:
        return _Patience(self._session, self._rank, self._limits.restore_s)

    @property
    def _world(self) -> int:
        return int(self._session.identity.world)

    def _load(
        self, reply: wire.RestoreReply, attachments: Mapping[str, Attachment], terms: Terms
    ) -> Restored:
        shards = {found.rank: _shard(reply, found, self._known) for found in reply.shards}
        holdings = self._understood(reply, shards)
        with (
            torch.no_grad(),
            ThreadPoolExecutor(_threads(), "everstep-restore") as executor,
            Restoration(
                shards, self._rank, executor, pinned=self._pinned, holdings=holdings
            ) as restoration,
        ):
            with _blamed(reply, shards):
                restoration.begin(self._needs)
            saved = _saved(shards, self._rank, self._world, holdings)
            plan = checking.check(attachments, saved, terms, self._rank, self._world)
            with _blamed(reply, shards):
                self._gather(reply, restoration, plan.needs)
                restoration.verify(plan.needs)
            if restoration.problem:
                log.warning("restoring takes longer than it should: %s", restoration.problem)
            restoration.plan(plan.prepare())
            restoration.run()
            plan.finish()
        self._needs = plan.needs if self._known else []
        notes = list(plan.resizing.notes)
        if not terms.weights_only and terms.takes(rng.RNG_PATH):
            notes += self._restore_generators(saved, shards[saved.rank].record)
        own = shards.get(self._rank)
        return Restored(
            int(reply.step),
            tuple(sorted({shards[rank].level or "peers" for rank in restoration.read_from})),
            replicated=tuple(x.name for x in own.layout.leaves if x.replicated) if own else (),
            notes=tuple(notes),
            moved_bytes=restoration.moved_bytes,
        )

    def _understood(self, reply: wire.RestoreReply, shards: Mapping[int, Shard]) -> Holdings:
        """What the shards hold; remembered with its layout, if that is one alone."""
        known = {found.layout: shards[found.rank].layout for found in reply.shards}
        if self._holdings is None or known.keys() != self._known.keys():
            self._holdings = Holdings({rank: shard.layout for rank, shard in shards.items()})
            self._needs = []
        self._known = known if len(reply.shards) == 1 else {}
        return self._holdings

    def _gather(
        self, reply: wire.RestoreReply, restoration: Restoration, needs: Sequence[Need]
    ) -> None:
        """Have those units brought to this host that are on others, and are needed."""
        absent = restoration.absent(needs)
        if not absent:
            return
        request = wire.GatherRequest(
            session=self._session.identity, incarnation=reply.incarnation, step=reply.step
        )
        for rank, units in absent.items():
            spans = [wire.UnitSpan(first=u.start, count=len(u)) for u in units]
            request.needs.append(wire.Need(rank=rank, units=spans))
        try:
            gathered = self._channel.call("Gather", request, self._limits.restore_s)
        except DeadlineExceeded:
            raise
        except Retryable as error:
            raise _AskAnew(error) from error
        for found in gathered.shards:
            restoration.locate(found.rank, found.path, found.offset, found.level)

    def _restore_generators(self, saved: Saved, record: Record) -> list[str]:
        """Those of a rank that is new are seeded from the snapshot, its own from its own state."""
        states = values.decode(saved.values[rng.RNG_PATH], hook=decode_torch_value)
        notes: list[str] = []
        if saved.rank != self._rank:
            about = {"job": record.job, "incarnation": record.incarnation, "step": record.step}
            seed = derived_seed(about, self._rank)
            rng.derive(seed, states)
            return [f"rank {self._rank} is new: its random generators were seeded with {seed}"]
        for left in rng.restore(states):
            log.warning("not restored: %s", left)
            notes.append(f"not restored: {left}")
        return notes


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection for a moment: with all of torch's and the model's objects to look at,
    one took half the time of a `rewind` (0.15 s on an H100's host)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _saved(
    shards: Mapping[int, Shard], rank: int, world: int, holdings: Holdings | None = None
) -> Saved:
    layouts = {holder: shard.layout for holder, shard in shards.items()}
    records = {holder: shard.record for holder, shard in shards.items()}
    return Saved.of(layouts, records, rank, world, holdings)


def _shard(
    reply: wire.RestoreReply,
    found: wire.ShardLocation,
    known: Mapping[bytes, Layout] = MappingProxyType({}),
) -> Shard:
    where = f"{found.path}, rank {found.rank}"
    try:
        record = open_record(found.record, where)
        layout = known.get(found.layout) or decode(found.layout, where)
    except FormatInvalid as error:
        raise _CopyDamaged(_copy(reply, found.rank, found.level, str(error))) from error
    return Shard(found.rank, found.path, found.offset, layout, record, found.level)


def _copy(reply: wire.RestoreReply, rank: int, level: str, reason: str) -> wire.RejectedCopy:
    return wire.RejectedCopy(
        step=reply.step, incarnation=reply.incarnation, rank=rank, level=level, reason=reason
    )


@contextmanager
def _blamed(reply: wire.RestoreReply, shards: Mapping[int, Shard]) -> Iterator[None]:
    """What is found to be damaged is said to be."""
    try:
        yield
    except (Damaged, OSError) as error:
        raise _CopyDamaged(_rejection(reply, shards, error)) from error


def _rejection(
    reply: wire.RestoreReply, shards: Mapping[int, Shard], error: Exception
) -> wire.RejectedCopy:
    """Which copy an error speaks of: its message names the file."""
    place = error.where if isinstance(error, ShardCorrupt | FormatInvalid) else str(error)
    named = (s for s in shards.values() if s.path and s.path in place)
    culprit = next(named, next(iter(shards.values())))
    return _copy(reply, culprit.rank, culprit.level, str(error))


def _threads() -> int:
    return max(1, min(_THREADS_LIMIT, len(os.sched_getaffinity(0))))
