"""What the slots of an arena hold, by the digests of their units.

Owns the answer to "does this slot hold these bytes already?", for captures that leave out
unchanged units. Promises to name only digests of bytes that were in the slot when its last capture
ended, and that an entry is gone as soon as somebody may write to the slot. The arena's lock keeps
other trainers out, but not the agent that puts a restored shard into a free slot: sampled words of
every unit are compared before an entry is used.
"""

import threading
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from everstep.kernels.capture import Sampler
from everstep.proto.ids import UNIT_BYTES

_SAMPLES = 8
_NONE: "NDArray[numpy.bool_]" = numpy.zeros(0, dtype=bool)


Units = NDArray[numpy.bool_]
"""For each unit, whether something holds of it."""


@dataclass(frozen=True, slots=True)
class _Held:
    image_bytes: int
    digests: bytes
    fingerprints: bytes
    seed: int


class SlotDigests:
    """The digests of an arena's slots; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, _Held] = {}
        self._latest = b""
        self._stable: Units = numpy.zeros(0, dtype=bool)

    def note(self, slot: int, address: int, image_bytes: int, digests: bytes, seed: int) -> None:
        """The slot holds an image with these digests, which is the latest one."""
        found = _fingerprints(address, image_bytes, seed)
        with self._lock:
            self._held[slot] = _Held(image_bytes, digests, found, seed)
            self._stable = _equal(digests, self._latest)
            self._latest = digests

    def take(self, slot: int) -> "Claim":
        """Forget the slot, which is about to be written to, but for the one who asks."""
        with self._lock:
            held = self._held.pop(slot, None)
            if held is None:
                return Claim(self)
            same = _equal(held.digests, self._latest)
            fits = len(same) == len(self._stable)
            return Claim(self, held, same & self._stable if fits else numpy.zeros_like(same))

    def clear(self) -> None:
        """Forget everything: others may have written to slots, or what was expected is not so."""
        with self._lock:
            self._held.clear()
            self._latest = b""


class Claim:
    """What a slot held when it was taken.

    Attributes:
        settled: Units that the slot holds as the latest image has them, and the one before that
            had them too: they may be expected, not known, to be the same again.
    """

    def __init__(
        self, contents: SlotDigests | None = None, held: _Held | None = None, settled: Units = _NONE
    ) -> None:
        self.settled = settled
        self._contents = contents
        self._held = held

    def __bool__(self) -> bool:
        return self._held is not None

    def held(self, address: int, image_bytes: int) -> tuple[bytes, Units]:
        """The digests of the slot's units, and for each whether the unit is as it was left.

        Args:
            address: Of the slot.
            image_bytes: Of the image that is to be written; another length than before says that
                nothing is known.
        """
        held = self._held
        if held is None or held.image_bytes != image_bytes:
            units = -(-image_bytes // UNIT_BYTES)
            return bytes(16 * units), numpy.zeros(units, dtype=bool)
        before = numpy.frombuffer(held.fingerprints, dtype="<u8")
        now = numpy.frombuffer(_fingerprints(address, image_bytes, held.seed), dtype="<u8")
        return held.digests, now == before

    def disappointed(self) -> None:
        """A settled unit was not the same again: let nobody expect anything for a while."""
        if self._contents is not None:
            self._contents.clear()


def _equal(left: bytes, right: bytes) -> Units:
    """For each of the digests on the left, whether that on the right is equal."""
    if len(left) != len(right):
        return numpy.zeros(len(left) // 16, dtype=bool)
    return numpy.asarray(numpy.frombuffer(left, "V16") == numpy.frombuffer(right, "V16"))


def _fingerprints(address: int, image_bytes: int, seed: int) -> bytes:
    begins = range(0, image_bytes, UNIT_BYTES)
    sampler = Sampler(
        [address + begin for begin in begins],
        [min(UNIT_BYTES, image_bytes - begin) for begin in begins],
    )
    return sampler.fingerprints(_SAMPLES, seed)
