"""Asking the agent what to restore, and bringing it back into the live objects.

Owns the questions to the agent, with the search for another copy when one turns out to be
damaged. Promises that nothing attached is touched before every byte that will be used matched
its digest and everything attached was seen to fit. Chooses nothing: the agent does.
"""

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from everstep.client import loading, rng
from everstep.client.attachment import Attachment, decode_torch_value
from everstep.client.channel import Channel
from everstep.client.limits import Limits
from everstep.client.session import Session
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import (
    Damaged,
    DeadlineExceeded,
    FormatInvalid,
    Retryable,
    ShardCorrupt,
    StaleIncarnation,
)
from everstep.snapshot import values
from everstep.snapshot.device_fill import Pinned
from everstep.snapshot.layout import Layout, decode
from everstep.snapshot.record import open_record
from everstep.snapshot.restore import Restoration, Shard

log = logging.getLogger("everstep")
RNG_PATH = "rng"
_THREADS_LIMIT = 12
_LIVE_TRIES = 3


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore came to.

    Attributes:
        step: None if the job has no snapshot at all.
        levels: Of the copies that were used, each once.
        rejected: The copies that were not, as text, with the reasons.
        replicated: The leaves that were replicated in it.
    """

    step: int | None
    levels: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()


class _CopyDamaged(Exception):
    """Tells which copy failed its check before anything was touched."""

    def __init__(self, copy: wire.RejectedCopy) -> None:
        super().__init__(copy.reason)
        self.copy = copy


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

    def restore(
        self,
        attachments: Mapping[str, Attachment],
        *,
        to: int | None,
        weights_only: bool,
        force: bool,
        levels: tuple[str, ...],
    ) -> Restored:
        """See `everstep.client.client.Client.restore`."""
        request = wire.RestoreRequest(levels=levels)
        if to is not None:
            request.to_step = to
        tries_left = _LIVE_TRIES
        while True:
            reply = self._ask(request)
            self._session.used = True
            if not reply.found:
                return Restored(None)
            try:
                own = self._load(reply, attachments, weights_only=weights_only, force=force)
                break
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
        used = tuple(sorted({shard.level for shard in reply.shards}))
        replicated = tuple(leaf.name for leaf in own.leaves if leaf.replicated)
        return Restored(int(reply.step), used, rejected, replicated)

    def peek(self, name: str, *, to: int | None) -> tuple[int, object] | None:
        """See `everstep.client.client.Client.peek`."""
        request = wire.RestoreRequest()
        if to is not None:
            request.to_step = to
        reply = self._ask(request)
        if not reply.found:
            return None
        found = next(shard for shard in reply.shards if shard.rank == self._rank)
        try:
            own = _shard(reply, found)
        except _CopyDamaged as damaged:
            raise FormatInvalid("the copy to be restored", str(damaged)) from damaged
        saved = loading.Saved.of(own.layout, own.record)
        return int(reply.step), saved.tree(name, {}) if name in saved.classes else None

    def _ask(self, request: wire.RestoreRequest) -> wire.RestoreReply:
        deadline = time.monotonic() + self._limits.restore_s
        while True:
            self._session.wait_attached(self._limits.agent_start_s)
            request.session.CopyFrom(self._session.identity)
            request.live = self._session.joined
            try:
                remaining_s = max(0.1, deadline - time.monotonic())
                reply: wire.RestoreReply = self._channel.call("Restore", request, remaining_s)
                return reply
            except StaleIncarnation:
                if self._session.used:
                    raise
                self._session.renew(as_new_process=False, timeout_s=self._limits.agent_start_s)
            except DeadlineExceeded:
                raise
            except Retryable:
                if time.monotonic() >= deadline:
                    raise
                self._session.await_return(deadline)

    def _load(
        self,
        reply: wire.RestoreReply,
        attachments: Mapping[str, Attachment],
        *,
        weights_only: bool,
        force: bool,
    ) -> Layout:
        shards = {found.rank: _shard(reply, found) for found in reply.shards}
        own = shards[self._rank]
        saved = loading.Saved.of(own.layout, own.record)
        plan = loading.check(attachments, saved, weights_only=weights_only, force=force)
        parts = {name for name in attachments if not weights_only or _is_module(attachments[name])}
        names = [name for name in saved.forms if name.partition("/")[0] in parts]
        with (
            torch.no_grad(),
            ThreadPoolExecutor(_threads(), "everstep-restore") as executor,
            Restoration(shards, self._rank, executor, pinned=self._pinned) as restoration,
        ):
            try:
                restoration.verify(names, plan.devices)
            except (Damaged, OSError) as error:
                raise _CopyDamaged(_rejection(reply, shards, error)) from error
            if restoration.problem:
                log.warning("restoring takes longer than it should: %s", restoration.problem)
            restoration.plan(plan.prepare())
            restoration.run()
            plan.finish()
        if not weights_only:
            states = values.decode(saved.values[RNG_PATH], hook=decode_torch_value)
            for left in rng.restore(states):
                log.warning("not restored: %s", left)
        return own.layout


def _is_module(attached: Attachment) -> bool:
    return attached.part.kind == "module"


def _shard(reply: wire.RestoreReply, found: wire.ShardLocation) -> Shard:
    where = f"{found.path}, rank {found.rank}"
    try:
        record = open_record(found.record, where)
        layout = decode(found.layout, where)
    except FormatInvalid as error:
        raise _CopyDamaged(_copy(reply, found.rank, found.level, str(error))) from error
    return Shard(found.rank, found.path, found.offset, layout, record, found.level)


def _copy(reply: wire.RestoreReply, rank: int, level: str, reason: str) -> wire.RejectedCopy:
    return wire.RejectedCopy(
        step=reply.step, incarnation=reply.incarnation, rank=rank, level=level, reason=reason
    )


def _rejection(
    reply: wire.RestoreReply, shards: Mapping[int, Shard], error: Exception
) -> wire.RejectedCopy:
    """Which copy an error speaks of: its message names the file."""
    place = error.where if isinstance(error, ShardCorrupt | FormatInvalid) else str(error)
    culprit = next((s for s in shards.values() if s.path in place), next(iter(shards.values())))
    return _copy(reply, culprit.rank, culprit.level, str(error))


def _threads() -> int:
    return max(1, min(_THREADS_LIMIT, len(os.sched_getaffinity(0))))
