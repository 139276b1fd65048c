"""Copying a shard's leaves into its slot while training goes on.

Owns the progress of one copy, and the tripwire. Promises that a capture which ends without `torn`
holds, in every byte, the state at the moment of `begin`: lazily copied leaves are changed only
after the fence (`finish`) by those who keep the contract, and a sample of them is compared to catch
those who do not. Promises too that sources stay referenced until they are copied. Does not talk to
the agent, start threads, or decide what is guarded or copied how (see `snapshot/capture_plan.py`).

The lazy copy with a fence before the update follows DataStates-LLM (Maurya et al., HPDC 2024);
unlike it, bytes are digested in the same pass that copies them, and a torn copy is noticed.
"""

import ctypes
import threading
import time
from random import Random

import numpy
import torch

from everstep.kernels.capture import capture_units
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.capture_plan import CapturePlan, Placed, value_bytes
from everstep.snapshot.device import REPLICA_SAMPLES, SAMPLES
from everstep.snapshot.device_capture import DeviceCapture
from everstep.snapshot.device_part import CaptureStats
from everstep.snapshot.digest import DIGEST_BYTES, unit_count, unit_digest
from everstep.snapshot.slot_digests import Claim
from everstep.snapshot.units import digest_in_place

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.003, 0.012
"""Between two looks at what the device has done, longer by a quarter each as long as nothing has
come of it and nobody waits: copies take a hundred times as long, and who looks takes the
interpreter's lock from the training thread."""


class Capture:
    """One copy of a shard into a slot.

    Args:
        plan: What to copy.
        slot: The slot's memory, writable, at least the image's length.
        seed: Of the tripwire's sample positions; another one each time.
        slot_index: The slot's number in the arena.

    Attributes:
        digests: xxh3_128 of each unit, complete once `done` is set.
        torn: Names of leaves that were changed while they were copied; with any, the copy is
            worthless.
        complete: Whether every byte is copied; only then is the copy worth anything.
        done: Set when everything is copied, or given up.
        problem: Why it is not complete, if that is known.
        stats: Where the bytes of leaves on devices went; once `done` is set.
    """

    def __init__(
        self, plan: CapturePlan, slot: memoryview, seed: int, *, slot_index: int = 0
    ) -> None:
        self.plan = plan
        self.image_bytes = plan.layout.image_bytes
        self.units = unit_count(self.image_bytes)
        self.digests = bytearray(self.units * DIGEST_BYTES)
        self.torn: tuple[str, ...] = ()
        self.complete = False
        self.done = threading.Event()
        self.problem = ""
        self.stats = CaptureStats()
        self.slot_index = slot_index
        self._slot = slot
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(slot))
        self._seed = seed
        self._lock = threading.Lock()
        self._next_block = 0
        self._copied_blocks = 0
        self._given_up = False
        self._fingerprints = b""
        self._versions: list[int] = []
        self._host_samples = b""
        self._parts: list[DeviceCapture] = []
        self._carrying = threading.Lock()
        self._host_copied = threading.Event()
        self._pause_s = _SHORTEST_PAUSE_S
        self._is_awaited = False

    def begin(self) -> None:
        """Copy at once what may change at any time, and note what the rest looks like now."""
        plan = self.plan
        claim = Claim()
        if plan.contents is not None:
            claim = plan.contents.take(self.slot_index)
        pinned = plan.arena is not None and plan.arena.is_pinned(self.slot_index)
        split = plan.arena.split_copies if plan.arena is not None and pinned else None
        self._parts = [
            DeviceCapture(part, self._address, split, claim, self._seed) for part in plan.parts
        ]
        # Devices first: they work while the host does.
        for part in self._parts:
            part.begin()
        self._versions = [source.tensor._version for source in plan.lazy]
        self._fingerprints = plan.sampler.fingerprints(SAMPLES, self._seed)
        self._host_samples = plan.replicas.fingerprints(REPLICA_SAMPLES, self._seed)
        capture_units(
            plan.pieces_at_once, self._address, self.image_bytes, UNIT_BYTES, 0, self.units, None
        )
        for source in plan.by_torch:
            self._copy_by_torch(source)
        if not plan.units.blocks:
            self._host_copied.set()
        failpoint("client.capture.begun")

    def advance(self) -> bool:
        """Copy the next block of units from the host; return whether there was one.

        Any thread may help.
        """
        with self._lock:
            number = self._next_block
            if number == len(self.plan.units.blocks) or self._given_up:
                return False
            self._next_block += 1
        self._copy_block(*self.plan.units.blocks[number])
        with self._lock:
            self._copied_blocks += 1
            complete = self._copied_blocks == len(self.plan.units.blocks) and not self._given_up
            last_after_giving_up = self._given_up and self._copied_blocks == self._next_block
        if complete:
            self._complete_host()
        elif last_after_giving_up and not self._parts:
            self.done.set()
        return True

    def finish(self, timeout_s: float) -> bool:
        """Copy everything, without waiting for an update; return whether it is in time."""
        self._is_awaited = True
        for part in self._parts:
            part.lift()
        self.carry(timeout_s)
        return self.done.is_set()

    @property
    def fenced(self) -> bool:
        """Whether the sources may change already: nothing is left for a fence to do."""
        if not self._parts:
            return self.done.is_set()
        on_host = self._host_copied.is_set() or self._given_up
        return self.done.is_set() or (on_host and all(part.fenced for part in self._parts))

    def fence(self, timeout_s: float) -> bool:
        """Before an update, on its thread: return whether the sources may change from now on."""
        if not self._parts:
            return self.finish(timeout_s)
        deadline_s = time.monotonic() + timeout_s
        fenced = [part.fence(deadline_s - time.monotonic()) for part in self._parts]
        while self.advance():
            pass
        if self._given_up:
            return all(fenced)
        return self._host_copied.wait(max(0.0, deadline_s - time.monotonic())) and all(fenced)

    def enter_thread(self) -> None:
        """Say that this thread is the capture's own, before `carry`."""
        for part in self._parts:
            part.part.device.enter_thread()

    def carry(self, timeout_s: float) -> None:
        """Copy, and wait until it is done, bounded; on the capture's own thread or another."""
        if not self._parts:
            while self.advance():
                pass
            self.done.wait(timeout_s)
            return
        deadline_s = time.monotonic() + timeout_s
        # Whoever comes second waits; if the first one has to stop early, goes on in its place.
        if not self._carrying.acquire(timeout=max(0.0, timeout_s)):
            return
        try:
            while not self.done.is_set() and not self.poll() and time.monotonic() < deadline_s:
                # Not the event of the fence: the device's marks can only be asked for.
                self.done.wait(self._pause_s)
        finally:
            self._carrying.release()

    def poll(self) -> bool:
        """Go on without waiting, on one thread at a time; return whether it is done."""
        longest_s = _SHORTEST_PAUSE_S if self._is_awaited else _LONGEST_PAUSE_S
        self._pause_s = min(longest_s, 1.25 * self._pause_s)
        moved = True
        while moved and not self.done.is_set():
            ended = [part.poll() for part in self._parts]
            moved = self.advance() or any(part.moved for part in self._parts)
            if moved:
                self._pause_s = _SHORTEST_PAUSE_S
            problem = next((part.problem for part in self._parts if part.problem), "")
            if problem and not self._given_up:
                self.problem = problem
                self._stop()
            if all(ended) and (self._host_copied.is_set() or self._given_up):
                self._end()
        return self.done.is_set()

    def replica_samples(self) -> bytes:
        """What must be equal on all ranks, else their replicas have drifted apart.

        Only once it is complete. 8 bytes for each replicated leaf; zeros where none can be had.
        """
        samples = bytearray(8 * len(self.plan.replicated))
        found = [(self.plan.host_replicas, self._host_samples)]
        found += [(part.part.replica_numbers, part.replica_samples) for part in self._parts]
        for numbers, fingerprints in found:
            for index, number in enumerate(numbers[: len(fingerprints) // 8]):
                samples[8 * number : 8 * number + 8] = fingerprints[8 * index : 8 * index + 8]
        return bytes(samples)

    def give_up(self) -> None:
        """Copy no further; what is under way still ends before `done` is set."""
        under_way = self._stop()
        if not self._parts and not under_way:
            self.done.set()
        if self._parts and self._carrying.acquire(blocking=False):
            try:
                self.poll()
            finally:
                self._carrying.release()

    def release(self) -> None:
        """Let go of the slot's memory; only after `done`."""
        for part in self._parts:
            part.release()
        self._slot.release()

    def _stop(self) -> bool:
        """Begin nothing new; return whether a block is being copied."""
        with self._lock:
            self._given_up = True
            under_way = self._next_block > self._copied_blocks
        for part in self._parts:
            part.give_up()
        return under_way

    def _copy_block(self, first: int, count: int, fused: bool) -> None:
        failpoint("client.capture.block")
        capture_units(
            self.plan.lazy_pieces,
            self._address,
            self.image_bytes,
            UNIT_BYTES,
            first,
            count,
            self.digests if fused else None,
        )

    def _copy_by_torch(self, source: Placed) -> None:
        leaf, tensor = source.leaf, source.tensor.detach()
        region = self._slot[leaf.offset : leaf.offset + source.bytes]
        if source.bytes == tensor.numel() * tensor.element_size():
            target = torch.frombuffer(region, dtype=tensor.dtype).view(tensor.shape)
            target.copy_(tensor)
        else:
            part = value_bytes(tensor)[leaf.start : leaf.stop]
            torch.frombuffer(region, dtype=torch.uint8).copy_(part)

    def _complete_host(self) -> None:
        """The last block is copied: its sources may change, so compare them now."""
        plan = self.plan
        torn = [
            source.leaf.name
            for source, version in zip(plan.lazy, self._versions, strict=True)
            if source.tensor._version != version
        ]
        after = plan.sampler.fingerprints(SAMPLES, self._seed)
        if after != self._fingerprints:
            torn += (
                source.leaf.name
                for index, source in enumerate(plan.lazy)
                if after[8 * index : 8 * index + 8] != self._fingerprints[8 * index : 8 * index + 8]
            )
        self.torn = tuple(dict.fromkeys(torn))
        if not self._parts:
            self.complete = True
            self.done.set()
        self._host_copied.set()

    def _end(self) -> None:
        """Nothing is under way any more on any device."""
        with self._lock:
            if self._next_block > self._copied_blocks:
                return
        for part in self._parts:
            self.stats.add(part.stats)
            self.torn = tuple(dict.fromkeys([*self.torn, *part.torn]))
        if not self.problem and not self._given_up and not self.torn:
            self._digest()
        self.complete = not self.problem and not self._given_up
        self.done.set()

    def _digest(self) -> None:
        """Take over the devices' digests, check a few, and take the others."""
        digests = numpy.frombuffer(self.digests, dtype="V16")
        for part in self._parts:
            if len(part.part.units):
                digests[part.part.units] = numpy.frombuffer(part.digests, dtype="V16")
        self._check_units()
        digest_in_place(self._address, self.image_bytes, self.plan.units.on_host, self.digests)
        contents = self.plan.contents
        if contents is not None and not self.problem and not self.torn:
            digests_now = bytes(self.digests)
            contents.note(self.slot_index, self._address, self.image_bytes, digests_now, self._seed)

    def _check_units(self) -> None:
        """Compare a few of the devices' digests with what arrived in the slot."""
        random = Random(self._seed)
        for part in self._parts:
            units = part.part.units.tolist()
            for unit in random.sample(units, min(self.plan.options.check_units, len(units))):
                begin, row = unit * UNIT_BYTES, unit * DIGEST_BYTES
                found = unit_digest(self._slot[begin : begin + UNIT_BYTES])
                if found != self.digests[row : row + DIGEST_BYTES]:
                    device = part.part.device.name
                    self.problem = f"unit {unit} is not what {device} held at the snapshot"
