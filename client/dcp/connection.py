"""One client for each job in a process, which `EverstepWriter` and `EverstepReader` share.

Owns the client's life: it is connected at first use, and closed by `close` or at the process's end,
with the last snapshot brought to the strongest level as `Client.close` does. Promises that a save
is a snapshot of what it was given and nothing else, or an error; that a load is answered alike on
all ranks; and that no tensor is touched before all bytes that it will take matched their digests.
A load of another step than before, or after a save, ends the incarnation, as `Client.rewind` does:
so every rank must load, which they do in `dcp.load`. Knows nothing of plans and items.
"""

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from everstep.client import restoring
from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.client.dcp.packing import OBJECTS_PART, STATE_PART, Packed
from everstep.client.handle import Snapshot
from everstep.client.limits import Limits
from everstep.client.saved import Saved
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import (
    Damaged,
    EverstepError,
    NothingRecoverable,
    Refused,
    Retryable,
)
from everstep.snapshot.placement import Extent
from everstep.snapshot.restore import Need, Restoration, Shard, Wanted

_TRIES = 16
_LIMITS = Limits(offer_s=30.0, pause_s=0.0)
"""A save is not a snapshot that may be skipped: it waits for an agent that is slow to answer."""


@dataclass(slots=True)
class Opened:
    """A snapshot to be loaded from.

    Attributes:
        reply: What the agent said.
        shards: Of all ranks that saved it.
        saved: What they hold.
    """

    reply: wire.RestoreReply
    shards: dict[int, Shard]
    saved: Saved

    @property
    def identity(self) -> tuple[int, int]:
        """Incarnation and step: what one snapshot is known by."""
        return int(self.reply.incarnation), int(self.reply.step)


@dataclass(frozen=True, slots=True)
class Address:
    """Which rank of which job a process is, and where its agent is."""

    job: str
    agent: str | None
    rank: int
    world: int


class Connection:
    """This process's client of one job.

    Attributes:
        address: Whose.
        options: For `everstep.connect`, beyond that.
        last_step: The last one that was saved here.
    """

    def __init__(self, address: Address, options: Mapping[str, Any]) -> None:
        self.address = address
        self.options = dict(options)
        self.last_step: int | None = None
        self._state: dict[str, torch.Tensor] = {}
        self._objects: dict[str, object] = {}
        self._extents: dict[str, list[Extent]] = {}
        self._asked: tuple[int, int | None] | None = None
        self._rejected: list[wire.RejectedCopy] = []
        self._lock = threading.RLock()
        self.client = _connected(address, options)
        parts: dict[str, Any] = {STATE_PART: self._state, OBJECTS_PART: self._objects}
        self.client.attach(placement={STATE_PART: self._placed}, **parts)

    def _placed(self, name: str, _: torch.Tensor) -> Sequence[Extent] | None:
        return self._extents.get(name)

    def save(self, step: int, packed: Packed) -> Snapshot:
        """Snapshot this, and nothing else; what is given may change once this returns.

        Raises:
            Retryable: If it was skipped; says why.
            NotCapturable: If a tensor's bytes are not its whole value.
        """
        with self._lock:
            self.client._session.wait_attached(self.client.limits.agent_start_s)
            self._extents = packed.extents
            self._state.update(packed.tensors)
            self._objects.update(packed.objects)
            try:
                handle = self.client.snapshot(step, force=True)
            finally:
                self._state.clear()
                self._objects.clear()
            if handle.skipped:
                raise Retryable(
                    f"step {step} of job {self.address.job!r} was not saved: {handle.skipped}. "
                    "Older snapshots are untouched. Steps must grow from save to save; save again "
                    "under the next one."
                )
            self.last_step = step
            return handle

    def following_step(self) -> int:
        """One more than any step that is known here: 1 for a new job."""
        if self.last_step is not None:
            return self.last_step + 1
        client = self.client
        status = client._channel.call(
            "Status", wire.StatusRequest(job=self.address.job), client.limits.offer_s
        )
        known = (s.step for job in status.jobs for s in job.snapshots if s.committed)
        return 1 + max(known, default=0)

    def open(self, step: int | None) -> Opened:
        """Have the agent say what all ranks load, and where it is.

        Args:
            step: Which; None: the newest.

        Raises:
            NothingRecoverable: If there is no such snapshot, or none that is whole.
        """
        with self._lock:
            client = self.client
            asked = self._asked is not None and self._asked != (client.incarnation, step)
            if client._capturing.begun or asked:
                self._begin_anew()
            request = wire.RestoreRequest(rejected=self._rejected)
            if step is not None:
                request.to_step = step
            reply = self._ask(request)
            self._asked = (client.incarnation, step)
            return self._opened(reply)

    def _begin_anew(self) -> None:
        """End the incarnation: what was decided in it stays, and steps may be taken again."""
        client = self.client
        client._capturing.settle()
        with contextlib.suppress(EverstepError):
            # In good order; another rank may have ended the incarnation already.
            client._detach()
        client._capturing.forget()
        client._arranger.begin_anew()
        client._session.renew(as_new_process=True, timeout_s=client.limits.agent_start_s)
        self._rejected.clear()

    def _ask(self, request: wire.RestoreRequest) -> wire.RestoreReply:
        reply = self.client._restoring._ask(request)
        self.client._session.used = True
        if not reply.found:
            raise NothingRecoverable(self.address.job, ("no snapshot was ever committed",))
        return reply

    def _opened(self, reply: wire.RestoreReply) -> Opened:
        shards = {found.rank: restoring._shard(reply, found) for found in reply.shards}
        return Opened(
            reply, shards, restoring._saved(shards, self.address.rank, self.address.world)
        )

    def read(self, opened: Opened, wanted: Sequence[Wanted]) -> None:
        """Fill tensors, all or none.

        Raises:
            Damaged: If bytes are damaged, and no other copy of the snapshot is whole.
            StateMismatch: If a tensor has another shape than what it is to take.
        """
        with self._lock:
            for _ in range(_TRIES):
                try:
                    self._fill(opened, wanted)
                    return
                except _Rejected as found:
                    self._rejected.append(found.copy)
                    opened = self._other_copy(opened, found)
            raise NothingRecoverable(self.address.job, ("too many copies of it are damaged",))

    def _other_copy(self, opened: Opened, found: "_Rejected") -> Opened:
        """Another copy of the same snapshot. With several ranks the agent has checked them all."""
        if self.address.world > 1:
            raise found.error
        request = wire.RestoreRequest(rejected=self._rejected)
        if self._asked is not None and self._asked[1] is not None:
            request.to_step = self._asked[1]
        try:
            other = self._opened(self._ask(request))
        except EverstepError:
            raise found.error from None
        if other.identity != opened.identity:
            # What was planned is the other snapshot; the next load takes this one.
            raise found.error
        return other

    def _fill(self, opened: Opened, wanted: Sequence[Wanted]) -> None:
        needs = [Need(w.name, w.box, _device(w.tensor), w.rank) for w in wanted]
        shards = opened.shards
        with (
            torch.no_grad(),
            ThreadPoolExecutor(restoring._threads(), "everstep-load") as executor,
            Restoration(
                shards,
                self.address.rank,
                executor,
                pinned=self.client._arranger.pinned,
                holdings=opened.saved.holdings,
            ) as restoration,
        ):
            try:
                self.client._restoring._gather(opened.reply, restoration, needs)
                restoration.verify(needs)
            except (Damaged, OSError) as error:
                raise _Rejected(restoring._rejection(opened.reply, shards, error), error) from error
            restoration.plan(wanted)
            restoration.run()

    def close(self) -> None:
        """End it; the last snapshot is brought to the strongest level first."""
        with self._lock:
            self.client.close()


class _Rejected(Exception):
    """A copy that cannot be used, before anything was touched."""

    def __init__(self, copy: wire.RejectedCopy, error: Exception) -> None:
        super().__init__(copy.reason)
        self.copy = copy
        self.error = error


def _device(tensor: torch.Tensor) -> torch.device | None:
    return None if tensor.device.type == "cpu" else tensor.device


def _connected(address: Address, options: Mapping[str, Any]) -> Client:
    chosen: dict[str, Any] = {"on_busy": "wait", "limits": _LIMITS, **options}
    return connect(
        address.job,
        1,
        agent=address.agent,
        rank=address.rank,
        world=address.world,
        **chosen,
    )


_open: dict[tuple[int, str], Connection] = {}
"""By process and job: a child that was forked has none of its parent's."""
_opening = threading.Lock()


def connection(address: Address, options: Mapping[str, Any]) -> Connection:
    """This process's connection; made at first use.

    Raises:
        Refused: If there is one that was asked for differently.
    """
    with _opening:
        key = (os.getpid(), address.job)
        known = _open.get(key)
        if known is None:
            known = _open[key] = Connection(address, options)
        elif known.address != address or (options and known.options != dict(options)):
            raise Refused(
                f"this process has job {address.job!r} open as {known.address} with "
                f"{known.options}, and not as {address} with {dict(options)}. Nothing was saved or "
                "loaded. Give writer and reader the same arguments, or call everstep.dcp.close()."
            )
        return known


def close(job: str | None = None) -> None:
    """End this process's sessions; the last snapshots are brought to the strongest level first.

    Done at the end of the process, too. Writers and readers connect anew if they are used again.

    Args:
        job: Only this one's.
    """
    with _opening:
        keys = [key for key in _open if key[0] == os.getpid() and job in (None, key[1])]
        ending = [_open.pop(key) for key in keys]
    closing: list[Callable[[], None]] = [one.close for one in ending]
    for end in closing:
        end()


atexit.register(close)
