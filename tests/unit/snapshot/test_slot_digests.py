"""What the slots of an arena are known to hold."""

import ctypes

import pytest

from everstep.kernels.digest import digest_units
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.slot_digests import SlotDigests

IMAGE_BYTES = 3 * UNIT_BYTES + 100


class Slot:
    def __init__(self) -> None:
        self.memory = bytearray(IMAGE_BYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def noted_in(self, contents: SlotDigests, number: int = 0, seed: int = 1) -> bytes:
        digests = digest_units(self.memory, UNIT_BYTES)
        contents.note(number, self.address, IMAGE_BYTES, digests, seed)
        return digests


@pytest.fixture
def contents() -> SlotDigests:
    return SlotDigests()


def test_a_slot_is_known_once(contents: SlotDigests) -> None:
    slot = Slot()
    digests = slot.noted_in(contents)
    claim = contents.take(0)
    assert claim
    assert claim.held(slot.address, IMAGE_BYTES)[0] == digests
    assert not contents.take(0), "who took it writes to it"
    assert not contents.take(1)


def test_units_that_somebody_wrote_to_are_not_held(contents: SlotDigests) -> None:
    slot = Slot()
    slot.noted_in(contents)
    slot.memory[UNIT_BYTES : 2 * UNIT_BYTES] = b"x" * UNIT_BYTES
    _, same = contents.take(0).held(slot.address, IMAGE_BYTES)
    assert same.tolist() == [True, False, True, True]


def test_nothing_is_known_of_an_image_of_another_length(contents: SlotDigests) -> None:
    slot = Slot()
    slot.noted_in(contents)
    _, same = contents.take(0).held(slot.address, IMAGE_BYTES - UNIT_BYTES)
    assert same.tolist() == [False, False, False]


def test_settled_are_units_that_were_equal_twice(contents: SlotDigests) -> None:
    first, second = Slot(), Slot()
    first.noted_in(contents, 0)
    second.noted_in(contents, 1)
    assert contents.take(0).settled.all()
    second.memory[0] ^= 1
    first.memory[0] ^= 1
    first.memory[-1] ^= 1
    first.noted_in(contents, 0)
    assert contents.take(1).settled.tolist() == [False, True, True, False]
    second.memory[-1] ^= 1
    second.noted_in(contents, 1)
    assert contents.take(1).settled.all()


def test_after_a_disappointment_nothing_is_expected(contents: SlotDigests) -> None:
    first, second = Slot(), Slot()
    first.noted_in(contents, 0)
    second.noted_in(contents, 1)
    contents.take(0).disappointed()
    assert not contents.take(1)
    first.noted_in(contents, 0)
    assert not contents.take(0).settled.any()
