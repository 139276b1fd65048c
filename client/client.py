"""The public face inside the trainer: attach, snapshot, restore, rewind, close.

Owns the order of things around one training step, and how many captures may be under way.
Promises that training never waits for the agent beyond short, configured limits (P3): an agent
that is dead, slow or full means a skipped snapshot, a counter and one warning. Errors that the
user must act on (a state that cannot be stored, a model that does not match) are raised.
"""

import logging
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from everstep.client import environment
from everstep.client.arrangement import Arranger
from everstep.client.attachment import (
    Attachment,
    attachment,
)
from everstep.client.capturing import Capturing
from everstep.client.channel import Channel
from everstep.client.handle import Snapshot
from everstep.client.limits import Limits, Stats
from everstep.client.restoring import Restored, Restoring
from everstep.client.session import Session
from everstep.client.snapshotting import Snapshotting
from everstep.client.terms import Rename, Terms
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import (
    EverstepError,
    Refused,
)
from everstep.snapshot.device import DeviceOptions
from everstep.snapshot.placement import Placement

log = logging.getLogger("everstep")


class Client:
    """One rank's connection to Everstep; made by `connect`, usable as a context manager.

    Attributes:
        stats: Counters and stall times.
        rejected: After `restore`: copies that were not used, as text, with the reasons.
        restored_from: After `restore`: the levels of the copies that were, each once.
        restored_notes: After `restore`: what another number of ranks has changed, in words.
        restored_bytes: After `restore`: how many bytes were copied into tensors.
    """

    def __init__(
        self,
        address: str,
        job: str,
        launch: environment.Launch,
        interval: int,
        nvme_interval: int | None,
        on_busy: str,
        limits: Limits,
        *,
        live_join: bool = False,
        options: DeviceOptions | None = None,
        captures_in_flight: int | None = None,
    ) -> None:
        self.job = job
        self.launch = launch
        self.interval = interval
        self.limits = limits
        self.stats = Stats()
        self._note(Restored(None))
        self._channel = Channel(address)
        self._attachments: dict[str, Attachment] = {}
        self._ddp: set[str] = set()
        self._hooks: list[Any] = []
        self._pid = os.getpid()
        self._closed = False
        self._restored = False
        self._arranger = Arranger(self._channel, limits.setup_s, limits.offer_s, options=options)
        self._session = Session(
            self._channel,
            job,
            launch,
            nvme_interval,
            on_notice=lambda notice: self._capturing.on_notice(notice),
            in_flight=lambda: self._capturing.in_flight(),
            live=live_join,
        )
        self._restoring = Restoring(
            self._channel, self._session, launch.rank, limits, pinned=self._arranger.pinned
        )
        self._capturing = Capturing(
            self._channel, self._session, self._arranger, limits, self.stats
        )
        self._snapshotting = Snapshotting(
            self._channel,
            self._session,
            self._arranger,
            self._capturing,
            limits,
            patient=on_busy == "wait",
            captures_in_flight=captures_in_flight,
            incremental=options is not None and options.incremental,
        )
        try:
            self._session.start(limits.agent_start_s)
        except BaseException:
            self._session.close()
            self._channel.close()
            raise

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(timeout=None if kind is None else 0.0)

    @property
    def incarnation(self) -> int:
        """How often this job has been started, as the agent counts."""
        return self._session.incarnation

    @property
    def joined(self) -> bool:
        """Whether this process took its rank over while the others go on: see `connect`."""
        return self._session.joined

    def attach(
        self,
        *,
        per_rank: Mapping[str, Any] | None = None,
        guarded: Mapping[str, Any] | None = None,
        replicated: Mapping[str, Any] | None = None,
        placement: Mapping[str, Placement] | None = None,
        **objects: Any,
    ) -> None:
        """Name what belongs to the training state.

        Tensors that are spread over ranks (DTensor: FSDP2, tensor parallel, HSDP, any mesh) are
        stored as the parts that they are; what DistributedDataParallel keeps equal is stored once.

        Args:
            per_rank: Objects by name whose state differs between ranks, and is kept for each.
            guarded: Objects by name that change only inside ``with client.updating():``.
            replicated: Objects by name whose tensors are equal on all ranks, without
                DistributedDataParallel: stored once, as far as they are.
            placement: By the name of a module or tree, a function that says of its plain tensors
                where they lie in global ones (`everstep.Extent`): experts under a map that may
                change from step to step, flat partitions, tensor parallelism made by hand. State of
                optimizers follows its parameters.
            **objects: Everything else by name: modules, optimizers, anything with ``state_dict``
                and ``load_state_dict``, nested dicts and lists of tensors and plain values.

        Raises:
            NotCapturable: If an object has no state that could be stored.
            Refused: If a name is taken.
        """
        groups: tuple[tuple[Mapping[str, Any], dict[str, bool]], ...] = (
            (objects, {}),
            (per_rank or {}, {"per_rank": True}),
            (guarded or {}, {"guarded": True}),
            (replicated or {}, {"replicated": True}),
        )
        unknown = [n for n in placement or {} if not any(n in group for group, _ in groups)]
        if unknown:
            raise Refused(f"placement of {', '.join(unknown)}, which is not attached with it.")
        for group, how in groups:
            for name, target in group.items():
                if name in self._attachments:
                    raise Refused(f"{name!r} is attached already.")
                where = (placement or {}).get(name)
                self._attachments[name] = attachment(name, target, placement=where, **how)
                self._watch(name, target, "per_rank" in how)

    def _watch(self, name: str, target: Any, per_rank: bool) -> None:
        inner = getattr(target, "_orig_mod", target)
        parallel = torch.nn.parallel.DistributedDataParallel
        if isinstance(inner, parallel) and self.launch.world > 1 and not per_rank:
            self._ddp.add(name)
        target = self._attachments[name].target
        if isinstance(target, torch.optim.Optimizer):
            # Weak, so that an optimizer does not keep a client alive that was let go of.
            fence = weakref.WeakMethod(self._fence)

            def before_update(*_: object) -> None:
                method = fence()
                if method is not None:
                    method()

            self._hooks.append(target.register_step_pre_hook(before_update))

    def snapshot(self, step: int, force: bool = False) -> Snapshot:
        """Capture the state after `step` optimizer steps; returns at once.

        Call it after ``optimizer.step()``. Lazily copied leaves are complete at the latest when
        the optimizer's next step begins.

        Args:
            step: How many steps are done; what `restore` will return.
            force: Act even if `interval` does not divide the step.

        Returns:
            A handle; its ``skipped`` says why if nothing was captured.

        Raises:
            NotCapturable: If something attached cannot be stored without pickle.
        """
        if self._closed or os.getpid() != self._pid:
            return Snapshot(step, "the client is closed")
        if not force and step % self.interval:
            return Snapshot(step, "not due")
        begun = time.perf_counter()
        try:
            if self.joined and not self._restored and not self.stats.taken:
                self._arranger.join(None)
            handle = self._snapshotting.take(step, self._attachments, frozenset(self._ddp))
        finally:
            self._stalled(time.perf_counter() - begun, new=True)
        if handle.skipped:
            self._capturing.count_skip(handle)
        return handle

    def _fence(self) -> None:
        begun = time.perf_counter()
        if os.getpid() == self._pid and self._capturing.fence():
            self._stalled(time.perf_counter() - begun, new=False)

    def _stalled(self, seconds: float, *, new: bool) -> None:
        self.stats.stall_s += seconds
        self.stats.setup_s += self._snapshotting.setup_s if new else 0.0
        self.stats.last_stall_s = seconds if new else self.stats.last_stall_s + seconds

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around code that changes guarded state without a torch optimizer."""
        self._fence()
        yield

    def restore(
        self,
        to: int | None = None,
        *,
        weights_only: bool = False,
        force: bool = False,
        levels: tuple[str, ...] = (),
        only: Sequence[str] = (),
        exclude: Sequence[str] = (),
        rename: Rename | None = None,
        cast: bool = False,
        partial: bool = False,
        on_resize: Mapping[str, str] | None = None,
    ) -> int | None:
        """Load the newest committed snapshot into everything attached, in place.

        Every rank of this launch gets the same step. Digests are checked before a byte is used; a
        damaged copy is reported in `rejected` and the next one is taken.

        A rank that `joined` live takes the newest step that the running incarnation has committed,
        once, and nobody else restores. If nothing is committed yet it begins as all its ranks did.

        The launch may have other ranks than the one that saved, and another mesh: each takes the
        bytes that its shards want from whoever has them. See docs/resharding.md.

        Args:
            to: This step instead of the newest.
            weights_only: Load modules only; leave optimizers, random generators and the rest.
            force: Accept an optimizer of another class.
            levels: Take copies from these levels only ("memory", "nvme").
            only: Parts ("model"), or patterns of modules' leaves ("model/encoder.*"): nothing else
                is loaded.
            exclude: The same: these stay as they are.
            rename: From each old prefix of names to the new one ("model/encoder." to
                "model/trunk."), or a function of the name. Optimizer state follows its parameters.
            cast: Accept modules' tensors and trees of another dtype, and convert the values.
            partial: Accept that nothing attached here takes some of the leaves: others do.
            on_resize: What becomes of state that every rank has for itself, where there are other
                ranks now: from a part or pattern to "keep", "rank0", "sum", "drop" or "refuse".

        Returns:
            The step, or None if this job has no snapshot at all.

        Raises:
            StateMismatch: If what is attached does not fit; lists missing, unexpected,
                reshaped and divergent leaves, and what contradicts itself. Nothing was loaded.
            NothingRecoverable: If there are snapshots but none is whole. Nothing was loaded.
            Refused: If this process has captured snapshots already: that is what `rewind` is for;
                or if it joined live and has restored already.
        """
        self._check_may_restore()
        parts = tuple(only), tuple(exclude)
        rules = rename or {}, dict(on_resize or {})
        terms = Terms(weights_only, force, partial, cast, *parts, *rules)
        restored = self._restoring.restore(self._attachments, terms, to=to, levels=levels)
        if self.joined:
            self._restored = restored.step is not None
            self._arranger.join(restored.replicated if self._restored else None)
        self._note(restored)
        return restored.step

    def _check_may_restore(self) -> None:
        if self._capturing.begun:
            # What was decided at the start may have been overwritten since.
            raise Refused(
                "restore() belongs before the first snapshot(): this process has captured "
                "snapshots already. Go back to one of them with rewind(). Nothing was loaded."
            )
        if self.joined and self._restored:
            raise Refused(
                "this rank joined a running job and has restored already; by now the others may "
                "have committed another step. Nothing was loaded. Connect anew to join again."
            )

    def _note(self, restored: Restored) -> None:
        """What the last restore has used and done."""
        self.rejected = restored.rejected
        self.restored_from = restored.levels
        self.restored_notes = restored.notes
        self.restored_bytes = restored.moved_bytes

    def peek(self, name: str, to: int | None = None) -> tuple[int, object] | None:
        """Look at what `restore` would bring back, without touching anything.

        For programs that must know where they are before there is a model to restore into.

        Args:
            name: An attached object that holds plain values, and no tensors larger than 64 KiB.
            to: This step instead of the newest.

        Returns:
            The step, and the object's state, or None in its place if the snapshot has no such
            object; None if this job has no snapshot at all.
        """
        return self._restoring.peek(name, to=to)

    def rewind(self, to: int | None = None) -> int | None:
        """Go back to a snapshot that is still in memory, without a restart.

        For loss spikes and NaNs. Every rank calls it. What was captured after that step belongs
        to an ended incarnation from then on and is not restored again.

        Args:
            to: The step; by default the newest.

        Returns:
            The step, or None if there is none.
        """
        self._capturing.settle()
        try:
            # In good order, or the agent would flush what is about to be abandoned.
            self._detach()
        except EverstepError as error:
            # Another rank's rewind may have ended this incarnation already.
            log.debug("detaching before the rewind: %s", error)
        self._capturing.forget()
        self._arranger.begin_anew()
        self._session.renew(as_new_process=True, timeout_s=self.limits.agent_start_s)
        return self.restore(to, levels=("memory",))

    def close(self, timeout: float | None = None) -> None:
        """Commit the last snapshot at the strongest level configured, and end the session.

        Args:
            timeout: In seconds; by default ``limits.close_s``. 0 does not wait for NVMe.
        """
        if self._closed or os.getpid() != self._pid:
            return
        wait_s = self.limits.close_s if timeout is None else timeout
        self._closed = True
        self._capturing.close()
        self._snapshotting.close()
        for hook in self._hooks:
            hook.remove()
        try:
            if self._session.attached:
                self._part(wait_s)
        except EverstepError as error:
            log.warning("the agent did not confirm the last snapshot: %s", error)
        self._session.close()
        self._arranger.forget()
        self._channel.close()

    def _part(self, wait_s: float) -> None:
        if wait_s > 0 and "nvme" in self._session.levels and self.stats.taken:
            reply = self._capturing.persist(wait_s)
            if not reply.durable:
                log.warning("the last snapshot is not on NVMe: %s", reply.reason)
        self._detach()

    def _detach(self) -> None:
        detach = wire.DetachRequest(session=self._session.identity)
        self._channel.call("Detach", detach, self.limits.agent_start_s)
