"""Copy-on-update: one capture of the leaves on one device.

Owns the order of work on the device's lanes, from `begin` to the last byte in the slot. Promises
that the slot gets the state at the moment of `begin`, whatever the lanes' speed: what is not
expected to be copied when the update comes is cloned on the device meanwhile, and what cannot be
cloned makes the update wait, on the device. Promises that `begin` and `fence` never wait for the
device, except `fence` where the slot is not pinned and there is no memory for clones. Does not
seal, digest on the host, start threads, or know of leaves elsewhere (see `snapshot/capture.py`).

    update  | small clones, samples, B ............ samples, F, clones of a rest | waits for W, D, C
    copies  |                        B window ....... W, C clones .................... done
    digests |                        B digests .. D, clones of what is beyond the window .. C

Digests lie in the update's lane instead where the device says that they cost less there.

Every tensor, clone and table that a lane reads is referenced from here until the host has seen a
mark behind the last read: so `record_stream` is not needed, and memory comes back at once.
"""

import logging
import threading
import time

import numpy
from numpy.typing import NDArray

from everstep.snapshot import device_scratch
from everstep.snapshot.device import Lane, Mark, Memory, Result
from everstep.snapshot.device_moving import BATCH_ROWS, PinnedMover, Split, StagedMover
from everstep.snapshot.device_part import CaptureStats, DevicePart
from everstep.snapshot.device_plan import Table, cut_rows, without_units
from everstep.snapshot.device_scratch import Scratch
from everstep.snapshot.device_timing import Timing
from everstep.snapshot.device_tripwire import Tripwire
from everstep.snapshot.slot_digests import Claim

log = logging.getLogger("everstep")

EARLY_CLONES_BYTES = 32 << 20
"""Clones of up to this many bytes leave the device at once, others after the update."""
TRICKLE_BYTES = 128 << 20
"""Under way at most when the update is overdue: what it has to wait for if it does come."""
OVERDUE_S = 1.0
"""After the snapshot, and after twice the time that updates took: copy beyond the window."""
_POLL_S = 0.0005


class DeviceCapture:
    """One capture of a `DevicePart`.

    `begin` and `fence` are called on the training thread, `poll` by whoever carries the capture;
    `give_up` and `lift` by any thread.

    Args:
        part: What to copy.
        address: Of the slot.
        split: Cuts copies at the borders of pinned memory; None if the slot is not pinned.
        claim: What the slot held, for incremental captures.
        seed: Of the sample positions.

    Attributes:
        finished: Whether it has ended, well or not, and nothing of it is under way.
        moved: Whether the last `poll` got anything done.
        problem: Why it is worthless; empty if it is not.
        torn: Names of leaves that changed before the update.
        digests: Of `part.units`, in order.
        replica_samples: 8 bytes for each of `part.replica_numbers`.
        stats: Where the bytes went.
    """

    def __init__(
        self, part: DevicePart, address: int, split: Split | None, claim: Claim, seed: int
    ) -> None:
        self.part = part
        self.finished = False
        self.moved = False
        self.problem = ""
        self.torn: tuple[str, ...] = ()
        self.digests = b""
        self.replica_samples = b""
        self.stats = CaptureStats()
        self.is_abandoned = False
        self._device = part.device
        self._claim = claim
        self._seed = seed
        self._lock = threading.Lock()
        self._mover: PinnedMover | StagedMover = StagedMover(part.device, address)
        if split is not None:
            self._mover = PinnedMover(part.device, address, split)
        self._address = address
        # The window stops between rows, and each fits into a chunk of scratch.
        most = min(self._mover.most_bytes, device_scratch.CHUNK_BYTES // 8)
        self._live = cut_rows(part.plan.live, most)
        self._drains = cut_rows(part.plan.drains, self._mover.most_bytes)
        # Live rows that an incremental capture expects to leave out.
        self._expected = self._live[:0]
        self._known: tuple[bytes, NDArray[numpy.bool_]] | None = None
        self._left_bytes = int(self._live[:, 2].sum() + self._drains[:, 2].sum())
        self._next = 0
        self._begun_s = 0.0
        self._lifted = False
        self._given_up = False
        self._trickled = False
        self._limit = 0
        self._is_open = False
        self._skipped: NDArray[numpy.bool_] | None = None
        self._tripwire = Tripwire(part, seed)
        self._block: Memory | None = None
        self._scratch = Scratch(part.device)
        self._accumulators: Result = None
        self._digest_lane: Lane = "digests"
        self._timing = Timing()
        self._digested: Mark | None = None
        self._closing: Mark | None = None
        self._closed = False

    @property
    def fenced(self) -> bool:
        """Whether the sources may change as far as the host is concerned."""
        return self._timing.fenced is not None or self._closed or self._is_worthless

    def begin(self) -> None:
        """Clone and sample what must be now."""
        for tenant in list(self._device.tenants):
            if tenant.is_abandoned:
                tenant.poll()
        self._begun_s = time.monotonic()
        self._device.window.began(self._begun_s)
        try:
            self._begin()
        except Exception as error:
            # Whatever it is, training goes on, and the copy is dropped with this for a reason.
            self._fail_by(error)

    def fence(self, timeout_s: float) -> bool:
        """Before an update, on its thread: make the update lane wait for what it must wait for.

        Returns:
            Whether the sources may change from now on. False only after the timeout, and only
            where the slot is not pinned.
        """
        if self.fenced or self.finished or self._device.is_recording():
            return True
        with self._lock:
            if self.fenced or self.finished:
                return True
            try:
                return self._fence(time.monotonic() + timeout_s)
            except Exception as error:
                self._fail_by(error)
                return True

    def poll(self) -> bool:
        """Go on as far as possible without waiting; return whether it has ended."""
        if self.finished:
            return True
        self._mover.prepare()
        self._look()
        with self._lock:
            self.moved = False
            if not self._is_worthless:
                try:
                    self._advance()
                except Exception as error:
                    self._fail_by(error)
            if self._is_worthless and not self.finished and self._is_quiet():
                self._finish()
            return self.finished

    def lift(self) -> None:
        """No update is to be expected: copy everything from where it is."""
        self._lifted = True

    def give_up(self) -> None:
        """Copy no further. It has ended once `poll` says so."""
        with self._lock:
            self._given_up = True

    def release(self) -> None:
        """Let go of all memory; if the device is not done with it, as soon as it is."""
        self.is_abandoned = True
        self.give_up()
        self.poll()

    def _look(self) -> None:
        """Read digests, of the slot and of the device; takes too long for the fence to wait."""
        if self._is_worthless:
            return
        try:
            if self._claim and self._known is None:
                self._known = self._claim.held(self._address, self.part.image_bytes)
            if not self.digests and len(self.part.units) and self._is_digested():
                self.digests = self._device.unit_digests(self._accumulators)
        except Exception as error:
            self._fail_by(error)

    # What follows is called under the lock, `_begin` aside.

    def _begin(self) -> None:
        device, part = self._device, self.part
        plan = part.plan
        self._tripwire.hold()
        if plan.block_bytes:
            small = plan.block_bytes <= EARLY_CLONES_BYTES
            if small or plan.block_bytes <= device.room_bytes():
                self._block = next(iter(device.allocate([plan.block_bytes])), None)
            if self._block is None:
                self._fail(
                    f"{device.name}: no {plan.block_bytes} bytes for clones of what may change"
                )
                return
        base = self._base
        for tensor, place in part.stored:
            assert self._block is not None
            device.store(tensor, base + place, self._block)
        if len(plan.copies):
            device.copy("update", plan.copies.at(base))
        device.gather(part.gathers, base)
        device.gather(part.seams, base)
        self._tripwire.begin(base)
        pauses = not self._clones_ahead
        self._limit = device.window.bytes(self._left_bytes, pauses=pauses)
        self._allocate_ahead()
        self._timing.begun = device.mark("update", timed=True)
        device.follow("copies", self._timing.begun)
        self._timing.opened = device.mark("copies", timed=True)
        # Copies wait for digests if those say what to copy: then not behind the training's kernels.
        self._digest_lane = "digests" if self._claim else device.digest_lane()
        self.stats.clone_bytes = int(self._drains[:, 2].sum())
        device.tenants.append(self)

    def _digest(self) -> None:
        """Enqueue digests and the clones that go with them; not by `begin`, whose thread has the
        training to do, unless the update comes first."""
        device, part, lane = self._device, self.part, self._digest_lane
        assert self._timing.begun is not None
        device.follow(lane, self._timing.begun)
        if part.unit_tables:
            tables = [one for one, _ in part.unit_tables]
            clones = self._scratch.fuse(tables, len(part.plan.touched))
            self._accumulators = device.digest(lane, part.unit_tables, self._base, clones)
        self._digested = device.mark(lane)
        self._scratch.clone(lane)

    def _allocate_ahead(self) -> None:
        """Memory for clones of what will not have left the device when the update comes.

        They are made beside forward and backward, and not in the update's way, and leave behind
        the window without a pause. As long as nothing is known of the window that is all there
        is: else the first captures of a training would keep the bus from those after them. What
        an incremental capture has to copy is not known before its digests.
        """
        if not self._clones_ahead:
            return
        ends = numpy.cumsum(self._live[:, 2])
        first = int(numpy.searchsorted(ends, self._limit, "right"))
        rest = self._live[first:]
        cloned = self._allocate(rest)
        self._live = numpy.concatenate([self._live[:first], rest[cloned:]])

    @property
    def _clones_ahead(self) -> bool:
        return not self._claim and self._mover.is_pinned

    def _allocate(self, rest: Table) -> int:
        """Scratch for as many of the rows as there is memory for; return how many."""
        if not len(rest):
            return 0
        most = self.part.options.scratch_bytes
        cloned = self._scratch.allocate(rest, self._device.scratch_bytes(most))
        self.stats.scratch_bytes += int(rest[:cloned, 2].sum())
        return cloned

    @property
    def _is_worthless(self) -> bool:
        return self._given_up or bool(self.problem)

    @property
    def _base(self) -> int:
        return self._block.address if self._block is not None else 0

    def _advance(self) -> None:
        self.moved = self._mover.pump()
        self._scratch.free()
        if self._digested is None:
            self._digest()
        if not self._is_open:
            self._open()
        if self._skipped is None and self._known is not None and self.digests:
            self._skip(*self._known)
        knows_skips = not self._claim or not len(self.part.units) or self._skipped is not None
        if self._timing.fenced is None and not self._closed:
            copied = self._copy_live(self._allowance())
            # Clones need not wait for the update.
            done = not copied and self._next == len(self._live) and knows_skips
            if done and self._drain_clones():
                self._close()
        elif knows_skips and self._drain_clones() and self._mover.is_idle and self._has_digests():
            drained = [] if self._scratch.run is None else [self._scratch.run[1]]
            if all(mark.query() for mark in (*self._timing.marks(), *drained)):
                self._collect()

    def _open(self) -> None:
        """Decide what is rather not copied before the update."""
        self._is_open = True
        fits = len(self._claim.settled) == len(self.part.plan.touched)
        if self._claim and fits and len(self.part.units):
            expected = numpy.zeros_like(self.part.plan.touched)
            expected[self.part.units] = self._claim.settled[self.part.units]
            self._expected = without_units(self._live, ~expected)
            self._live = without_units(self._live, expected)
        if not self._claim and int(self._drains[:, 2].sum()) <= EARLY_CLONES_BYTES:
            self._drain_block()
        self.moved = True

    def _skip(self, held: bytes, same: NDArray[numpy.bool_]) -> None:
        """The digests are known: leave out what the slot holds, and only that."""
        units = self.part.units
        wanted = numpy.frombuffer(self.digests, dtype="V16")
        skipped = numpy.zeros(len(same), dtype=bool)
        skipped[units] = (numpy.frombuffer(held, dtype="V16")[units] == wanted) & same[units]
        self._skipped = skipped
        self.stats.skipped_units = int(skipped.sum())
        # The update may have come before the digests, and have found these left out already.
        changed = without_units(self._expected, skipped)
        if len(changed) and self._timing.fenced is not None:
            self._claim.disappointed()
            self._fail("units changed that had not for two snapshots, too late to copy them")
            return
        left = without_units(self._live[self._next :], skipped)
        self._live, self._next = numpy.concatenate([left, changed]), 0
        self._drains = without_units(self._drains, skipped)
        plan = self.part.plan
        self._left_bytes = sum(
            int(without_units(rows, skipped)[:, 2].sum()) for rows in (plan.live, plan.drains)
        )
        self.moved = True

    def _allowance(self) -> int:
        """How many bytes of the live leaves may have been enqueued by now."""
        # Without pinning, few bytes are under way at any time: the next update stops them soon.
        if self._lifted or not self._mover.is_pinned:
            return 1 << 62
        usual_s = self._device.window.compute_s or 0.0
        if time.monotonic() - self._begun_s < max(OVERDUE_S, 2 * usual_s):
            return self._limit
        self._trickled = True
        room = 0 if not self._mover.is_idle else TRICKLE_BYTES
        return max(self._limit, self.stats.window_bytes + room)

    def _copy_live(self, limit: int) -> int:
        """Enqueue the next live rows up to a total of bytes; return how many rows."""
        rows = self._live[self._next : self._next + BATCH_ROWS]
        totals = self.stats.window_bytes + numpy.cumsum(rows[:, 2])
        rows = rows[: int(numpy.searchsorted(totals, limit, "right"))]
        if not len(rows):
            return 0
        window = self._timing.window
        start = window[0] if window else self._device.mark("copies", timed=True)
        count = self._mover.accept(rows)
        if not count:
            return 0
        self._next += count
        self.stats.window_bytes += int(rows[:count, 2].sum())
        end = self._device.mark("copies", timed=True)
        self._timing.window = (start, end, self.stats.window_bytes)
        self.moved = True
        return count

    def _fence(self, deadline_s: float) -> bool:
        device = self._device
        self._tripwire.compare_versions()
        self._tripwire.look_again("update")
        if self._digested is None:
            self._digest()
        # Behind the samples, so that they are there once it is done.
        fenced = device.mark("update", timed=True)
        # The host may be far ahead of the device, and the thread that carries the capture late:
        # the window counts from the snapshot, whoever fills it.
        if not self._is_open:
            self._open()
        while self._mover.is_pinned and self._copy_live(self._limit):
            pass
        rest = self._live[self._next :]
        rest = rest[self._allocate(rest) :]
        self._scratch.clone("update")
        self.stats.direct_bytes += int(rest[:, 2].sum())
        while len(rest):
            count = self._mover.accept(rest[:BATCH_ROWS])
            rest = rest[count:]
            self._mover.pump()
            if not count:
                if time.monotonic() >= deadline_s:
                    self._fail("the update could not wait any longer for the copy")
                    return False
                time.sleep(_POLL_S)
        # The last copy that reads a live leaf; what was enqueued behind it is not waited for.
        if self.stats.direct_bytes:
            self._timing.awaited = device.mark("copies", timed=True)
        elif self._timing.window is not None:
            self._timing.awaited = self._timing.window[1]
        for read in (self._timing.awaited, self._digested, self._scratch.cloned):
            if read is not None:
                device.follow("update", read)
        self._timing.fenced = fenced
        return True

    def _drain_clones(self) -> bool:
        """Enqueue the copies of clones; return whether all are."""
        before = self._scratch.accepted_bytes
        drained = self._scratch.drain(self._mover, self._skipped)
        self.moved |= self._scratch.accepted_bytes != before
        return drained and self._drain_block()

    def _drain_block(self) -> bool:
        """Enqueue the copies of what was cloned at the snapshot; return whether all are."""
        while len(self._drains):
            rows = self._drains[:BATCH_ROWS].copy()
            rows[:, 1] += self._base
            count = self._mover.accept(rows)
            if not count:
                return False
            self._drains = self._drains[count:]
            self.moved = True
        return True

    def _close(self) -> None:
        """Everything was copied without an update: see that it was not changed meanwhile."""
        if not self._mover.is_idle or not self._is_digested():
            return
        if self._closing is None:
            self._tripwire.look_again("copies")
            self._closing = self._device.mark("copies")
            self.moved = True
        elif self._closing.query():
            self._tripwire.compare_versions()
            self._closed = True
            self.moved = True

    def _is_digested(self) -> bool:
        return self._digested is not None and self._digested.query()

    def _has_digests(self) -> bool:
        # Ready on the device is not enough: they may have become so after `_look` in this poll.
        return self._is_digested() and bool(self.digests or not len(self.part.units))

    def _collect(self) -> None:
        """Everything is in the slot: read what the kernels found."""
        # More than that, if bytes had left before it was known that the slot holds them.
        done_bytes = self._mover.done_bytes
        assert done_bytes >= self._left_bytes, (done_bytes, self._left_bytes)
        self.torn = self._tripwire.torn()
        self.replica_samples = self._tripwire.replica_samples()
        # Without pinning, and behind the window, what was copied says nothing of how much fits.
        was_limited = self._mover.is_pinned and not self._trickled
        self.stats.update_wait_s = self._timing.tell(
            self._device,
            self._scratch.run,
            was_limited=was_limited,
            cloned=bool(self.stats.scratch_bytes),
        )
        self._finish()

    def _is_quiet(self) -> bool:
        """Whether neither host nor device does anything for this capture any more."""
        self._mover.discard()
        self._mover.pump()
        digested = self._digested is None or self._digested.query()
        return self._mover.is_idle and digested

    def _fail(self, problem: str) -> None:
        self.problem = self.problem or problem

    def _fail_by(self, error: Exception) -> None:
        log.debug("a capture on %s failed", self._device.name, exc_info=True)
        self._fail(f"{self._device.name}: {type(error).__name__}: {error}")

    def _finish(self) -> None:
        # Scratch and the block were allocated on the update lane, which may not have come past
        # the clones of a capture that failed: memory goes back to that lane's later work only.
        if self._block is not None:
            self._block.release()
        self._scratch.release()
        self._tripwire.release()
        self._block = self._accumulators = None
        if self in self._device.tenants:
            self._device.tenants.remove(self)
        self.finished = True
