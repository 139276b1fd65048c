import random

import pytest
import reedsolo
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.proto import envelope
from everstep.proto.envelope import open_envelope, open_repairing, seal
from everstep.proto.errors import FormatInvalid

HEADER_BYTES = 30
thorough = settings(max_examples=60)


def blocks_of(sealed: bytes) -> int:
    return -(-len(sealed) // 255)


@pytest.mark.parametrize("kind", sorted(envelope.KINDS))
@pytest.mark.parametrize("repairable", [False, True])
@pytest.mark.parametrize("length", [0, 1, 208, 209, 210, 239, 5000])
def test_what_was_sealed_comes_back(kind: str, repairable: bool, length: int) -> None:
    body = random.Random(length).randbytes(length)
    sealed = seal(kind, body, repairable=repairable)
    assert open_repairing(kind, sealed, "here") == (body, 0)
    assert open_envelope(kind, memoryview(sealed), "here") == body


def test_the_bytes_are_those_that_the_docstring_describes() -> None:
    sealed = seal("commit", b"body")
    assert sealed[:14].hex() == "4556535401000300000004000000"
    assert sealed[HEADER_BYTES:] == b"body"


@pytest.mark.parametrize("length", [0, 209, 210, 5000])
def test_parity_is_that_of_reedsolo(length: int) -> None:
    sealed = seal("record", random.Random(1).randbytes(length), repairable=True)
    blocks = blocks_of(sealed)
    data, parity = sealed[: -16 * blocks], sealed[-16 * blocks :]
    padded = bytes(-len(data) % blocks) + data
    for block in range(blocks):
        expected = reedsolo.RSCodec(16).encode(padded[block::blocks])[-16:]
        assert parity[block::blocks] == bytes(expected)


def test_every_single_rotten_byte_is_repaired() -> None:
    body = random.Random(2).randbytes(600)
    sealed = seal("record", body, repairable=True)
    before_parity = HEADER_BYTES + len(body)
    for position in range(len(sealed)):
        rotten = bytearray(sealed)
        rotten[position] ^= 0x40
        expected = 1 if position < before_parity else 0  # a good digest needs no look at parity
        assert open_repairing("record", bytes(rotten), "here") == (body, expected), position


@thorough
@given(st.binary(max_size=3000), st.integers(0, 2**32))
def test_eight_rotten_bytes_anywhere_are_repaired(body: bytes, seed: int) -> None:
    sealed = seal("layout", body, repairable=True)
    rotten = bytearray(sealed)
    for position in random.Random(seed).sample(range(HEADER_BYTES + len(body)), 8):
        rotten[position] ^= 0xFF
    assert open_repairing("layout", bytes(rotten), "here") == (body, 8)


def test_a_burst_of_eight_rows_is_repaired_and_one_more_byte_is_not() -> None:
    body = random.Random(3).randbytes(5000)
    sealed = seal("record", body, repairable=True)
    burst = 8 * blocks_of(sealed)
    rotten = bytearray(sealed)
    rotten[:burst] = bytes(byte ^ 1 for byte in rotten[:burst])
    assert open_repairing("record", bytes(rotten), "here") == (body, burst)
    rotten[burst] ^= 1
    with pytest.raises(FormatInvalid, match="damaged"):
        open_envelope("record", bytes(rotten), "here")


def test_without_parity_every_flipped_bit_is_found() -> None:
    sealed = seal("record", b"some body")
    for bit in range(8 * len(sealed)):
        rotten = bytearray(sealed)
        rotten[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatInvalid):
            open_envelope("record", bytes(rotten), "here")


@pytest.mark.parametrize("repairable", [False, True])
def test_a_truncated_or_lengthened_envelope_is_refused(repairable: bool) -> None:
    sealed = seal("record", b"some body" * 50, repairable=repairable)
    for length in range(len(sealed)):
        with pytest.raises(FormatInvalid):
            open_envelope("record", sealed[:length], "here")
    with pytest.raises(FormatInvalid, match="long instead of"):
        open_envelope("record", sealed + b"\0", "here")


@pytest.mark.parametrize("repairable", [False, True])
def test_another_kind_is_refused_by_name(repairable: bool) -> None:
    with pytest.raises(FormatInvalid, match="holds a layout where a record was expected") as caught:
        open_envelope("record", seal("layout", b"", repairable=repairable), "this file")
    assert caught.value.where == "this file"


def test_a_newer_version_is_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "VERSION", 2)
    sealed = seal("record", b"body", repairable=True)
    monkeypatch.undo()
    with pytest.raises(FormatInvalid, match="format 2"):
        open_envelope("record", sealed, "here")


def test_the_claimed_length_is_checked_before_it_is_believed() -> None:
    sealed = bytearray(seal("record", b"body"))
    sealed[10:14] = b"\xff\xff\xff\xff"
    with pytest.raises(FormatInvalid, match="over the limit"):
        open_envelope("record", bytes(sealed), "here")


def test_a_body_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "MAX_BODY_BYTES", 10)
    monkeypatch.setattr(envelope, "MAX_REPAIRABLE_BYTES", 5)
    seal("record", bytes(10))
    seal("record", bytes(5), repairable=True)
    with pytest.raises(FormatInvalid, match="limit of 10"):
        seal("record", bytes(11))
    with pytest.raises(FormatInvalid, match="limit of 5"):
        seal("record", bytes(6), repairable=True)


@thorough
@given(st.binary(max_size=600) | st.binary(max_size=600).map(lambda tail: b"EVST\1\0\2\0" + tail))
def test_noise_raises_nothing_but_format_invalid(noise: bytes) -> None:
    with pytest.raises(FormatInvalid):
        open_envelope("record", noise, "here")


@thorough
@given(st.data())
def test_an_edited_envelope_gives_the_body_or_format_invalid(data: st.DataObject) -> None:
    body = data.draw(st.binary(max_size=400))
    edited = bytearray(seal("record", body, repairable=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 12))):
        edited[data.draw(st.integers(0, len(edited) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = open_envelope("record", bytes(edited), "here")
    except FormatInvalid:
        return
    assert found == body
