"""Capture and restore against their reference: exact bytes, exact digests, nothing else touched."""

import ctypes
import mmap
import random
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.kernels import capture, digest, native

ISAS = [*range(1, native.best_isa() + 1), 0, "reference"]
EDGES = [0, 1, 3, 4, 8, 9, 16, 17, 63, 64, 65, 128, 129, 240, 241, 1023, 1024, 1025, 4095, 4096]
EDGES += [4097, 8191, 8192, 20_000]
GUARD_BYTES = 256
UNIT_BYTES = 4096


class Guarded:
    """Memory at a chosen alignment, with guard bytes on both sides."""

    def __init__(self, content: bytes, shift: int = 0) -> None:
        self.size = len(content)
        self.memory = bytearray(b"\xa5" * (self.size + 2 * GUARD_BYTES + 64 + shift))
        held = native.Bytes(self.memory)
        self.start = -(held.address + GUARD_BYTES) % 64 + GUARD_BYTES + shift
        self.address = held.address + self.start
        self.write(0, content)

    def write(self, offset: int, content: bytes | bytearray) -> None:
        start = self.start + offset
        self.memory[start : start + len(content)] = content

    def read(self) -> bytes:
        return bytes(self.memory[self.start : self.start + self.size])

    def guards_are_untouched(self) -> bool:
        outside = self.memory[: self.start] + self.memory[self.start + self.size :]
        return outside == b"\xa5" * len(outside)


class Scene:
    """An image and scattered pieces of it, with what a copy either way must leave."""

    def __init__(self, seed: int, spans: list[tuple[str, int, int]], image_shift: int = 0) -> None:
        """`spans` says what the image is made of: (kind, bytes, shift of the piece's memory)."""
        noise = random.Random(seed)
        image = noise.randbytes(sum(size for _, size, _ in spans))
        self.image = Guarded(image, image_shift)
        self.memories: list[tuple[int, Guarded]] = []
        rows = []
        offset = 0
        for kind, size, shift in spans:
            if kind == "piece":
                self.memories.append((offset, Guarded(noise.randbytes(size), shift)))
                rows.append((self.memories[-1][1].address, offset, size))
            elif kind == "held":
                rows.append((0, offset, size))
            offset += size
        self.pieces = capture.Pieces(rows)
        self.size = offset
        self.units = -(-offset // UNIT_BYTES)

    def gathered(self) -> bytes:
        """What the image holds after a capture."""
        image = bytearray(self.image.read())
        for offset, memory in self.memories:
            image[offset : offset + memory.size] = memory.read()
        return bytes(image)

    def capture(
        self,
        first: int,
        count: int,
        digests: bytearray | memoryview | None,
        isa: native.Isa,
        unit_bytes: int = UNIT_BYTES,
    ) -> None:
        capture.capture_units(
            self.pieces, self.image.address, self.size, unit_bytes, first, count, digests, isa
        )

    def restore(self, first: int, count: int, expected: bytes, isa: native.Isa) -> list[int]:
        return capture.restore_units(
            self.pieces, self.image.address, self.size, UNIT_BYTES, first, count, expected, isa
        )

    def guards_are_untouched(self) -> bool:
        memories = [memory for _, memory in self.memories]
        return all(memory.guards_are_untouched() for memory in [self.image, *memories])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shift", [0, 1, 8, 60])
@pytest.mark.parametrize("size", EDGES)
def test_one_piece_of_every_size(size: int, shift: int, isa: native.Isa) -> None:
    scene = Scene(size, [("piece", size, shift)])
    expected = scene.gathered()
    digests = bytearray(16 * scene.units)
    scene.capture(0, scene.units, digests, isa)
    assert scene.image.read() == expected
    assert digests == digest.digest_units(expected, UNIT_BYTES, "reference")

    source = scene.memories[0][1] if size else scene.image
    source.write(0, bytes(size))
    if size:
        assert scene.restore(0, scene.units, bytes(digests), isa) == []
        assert source.read() == expected
    assert scene.guards_are_untouched()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("image_shift", [1, 32])
def test_an_image_that_is_not_aligned(image_shift: int, isa: native.Isa) -> None:
    spans = [("piece", 5000, 3), ("held", 100, 0), ("piece", 9000, 8)]
    scene = Scene(7, spans, image_shift)
    expected = scene.gathered()
    digests = bytearray(16 * scene.units)
    scene.capture(0, scene.units, digests, isa)
    assert scene.image.read() == expected
    assert digests == digest.digest_units(expected, UNIT_BYTES)
    assert scene.guards_are_untouched()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("unit_bytes", [1, 16, 100, 240, 241, 1000, 1088])
def test_units_of_any_size(unit_bytes: int, isa: native.Isa) -> None:
    scene = Scene(3, [("piece", 700, 1), ("gap", 33, 0), ("piece", 1300, 0)])
    expected = scene.gathered()
    units = -(-scene.size // unit_bytes)
    digests = bytearray(16 * units)
    scene.capture(0, units, digests, isa, unit_bytes)
    assert scene.image.read() == expected
    assert digests == digest.digest_units(expected, unit_bytes)


SPANS = st.lists(
    st.tuples(
        st.sampled_from(["piece", "piece", "piece", "held", "gap"]),
        st.one_of(st.integers(0, 200), st.integers(0, 3 * UNIT_BYTES), st.sampled_from(EDGES)),
        st.integers(0, 63),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), spans=SPANS, data=st.data())
def test_random_layouts_by_ranges_of_units(
    seed: int, spans: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    for isa in ISAS:
        scene = Scene(seed, spans)
        before, expected = scene.image.read(), scene.gathered()
        all_digests = digest.digest_units(expected, UNIT_BYTES, "reference")
        first = data.draw(st.integers(0, scene.units))
        count = data.draw(st.integers(0, scene.units - first))
        begin, end = first * UNIT_BYTES, min(scene.size, (first + count) * UNIT_BYTES)

        digests = bytearray(16 * scene.units)
        scene.capture(first, count, digests, isa)
        assert scene.image.read() == before[:begin] + expected[begin:end] + before[end:]
        row = slice(16 * first, 16 * (first + count))
        assert digests[row] == all_digests[row]
        assert not any(digests[: row.start] + digests[row.stop :])

        scene.capture(0, scene.units, None, isa)
        assert scene.image.read() == expected

        for _, memory in scene.memories:
            memory.write(0, bytes(memory.size))
        assert scene.restore(first, count, all_digests, isa) == []
        wanted = bytes(begin) + expected[begin:end] + bytes(scene.size - end)
        for offset, memory in scene.memories:
            assert memory.read() == wanted[offset : offset + memory.size]
        assert scene.guards_are_untouched()


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_of_a_bad_unit_is_copied_out(isa: native.Isa) -> None:
    scene = Scene(5, [("piece", 3 * UNIT_BYTES - 100, 0), ("piece", 2 * UNIT_BYTES + 7, 4)])
    scene.capture(0, scene.units, None, isa)
    expected = digest.digest_units(scene.image.read(), UNIT_BYTES)
    damaged = bytearray(scene.image.read())
    damaged[2 * UNIT_BYTES + 5] ^= 1
    damaged[-1] ^= 0x40
    scene.image.write(0, damaged)
    for _, memory in scene.memories:
        memory.write(0, bytes(memory.size))

    assert scene.restore(0, scene.units, expected, isa) == [2, scene.units - 1]
    wanted = bytearray(damaged)
    wanted[2 * UNIT_BYTES : 3 * UNIT_BYTES] = bytes(UNIT_BYTES)
    tail = (scene.units - 1) * UNIT_BYTES
    wanted[tail:] = bytes(len(wanted) - tail)
    got = b"".join(memory.read() for _, memory in scene.memories)
    assert got == wanted
    assert scene.restore(2, 1, expected, isa) == [2]
    assert scene.restore(3, 1, expected, isa) == []
    assert scene.guards_are_untouched()


def test_threads_share_an_image_by_units() -> None:
    scene = Scene(9, [("piece", 40 * UNIT_BYTES + 77, 4), ("held", 99, 0), ("piece", 90_000, 0)])
    expected = scene.gathered()
    digests = bytearray(16 * scene.units)
    half = scene.units // 2
    run_together(
        lambda: scene.capture(0, half, digests, 0),
        lambda: scene.capture(half, scene.units - half, digests, 0),
    )
    assert scene.image.read() == expected
    assert digests == digest.digest_units(expected, UNIT_BYTES)


def run_together(*calls: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def brink() -> Iterator[int]:
    """An address after which memory cannot be read, with a readable page before it."""
    page = mmap.PAGESIZE
    mapped = mmap.mmap(-1, 2 * page)
    held = native.Bytes(mapped)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    end = ctypes.c_void_p(held.address + page)
    assert protect(end, ctypes.c_size_t(page), 0) == 0
    yield held.address + page
    assert protect(end, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 17, 240, 241, 300, 1025, 4000, 4096])
def test_not_one_byte_beyond_a_source_is_read(brink: int, size: int, isa: native.Isa) -> None:
    # A read too far kills this process with SIGSEGV.
    pieces = capture.Pieces([(brink - size, 0, size)])
    image = Guarded(b"x" * size)
    digests = bytearray(16)
    capture.capture_units(pieces, image.address, size, UNIT_BYTES, 0, 1, digests, isa)
    assert image.read() == bytes(size)
    back = capture.Pieces([(image.address, 0, size)])
    assert capture.restore_units(back, brink - size, size, UNIT_BYTES, 0, 1, digests, isa) == []
    prints = capture.Sampler([brink - size], [size]).fingerprints(4, 1)
    assert prints == capture.Sampler([image.address], [size]).fingerprints(4, 1)


@pytest.mark.parametrize(
    "rows",
    [
        [(64, 0, 10), (64, 9, 10)],
        [(64, 10, 10), (64, 0, 10)],
        [(64, 0, -1)],
        [(-64, 0, 1)],
        [(64, -1, 1)],
    ],
)
def test_pieces_that_would_corrupt_are_refused(rows: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="sorted by offset"):
        capture.Pieces(rows)


def test_pieces_without_bytes_are_left_out() -> None:
    assert len(capture.Pieces([(64, 0, 10), (64, 5, 0), (64, 10, 1)])) == 2


def test_ranges_outside_the_image_are_refused() -> None:
    scene = Scene(1, [("piece", 2 * UNIT_BYTES, 0)])
    for first, count in ((0, 3), (2, 1), (-1, 1), (0, -1)):
        with pytest.raises(ValueError, match="of an image of 2"):
            scene.capture(first, count, None, 0)
    with pytest.raises(ValueError, match="16 bytes of digests for 2 units"):
        scene.capture(0, 1, bytearray(16), 0)
    with pytest.raises(ValueError, match="read-only"):
        scene.capture(0, 1, memoryview(bytes(32)), 0)
    with pytest.raises(ValueError, match="16 bytes of digests for 2 units"):
        scene.restore(0, 1, bytes(16), 0)
    with pytest.raises(ValueError, match="pieces end at 8192, the image at 8000"):
        capture.capture_units(scene.pieces, scene.image.address, 8000, UNIT_BYTES, 0, 1, None)
