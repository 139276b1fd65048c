"""The ring of pinned buffers is made when it is needed; what is sent arrives, or is refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

from everstep.proto.errors import ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.reading import ShardReader
from everstep.snapshot.ring_pump import BUFFER_BYTES, LANES, RingPump, Row
from everstep.snapshot.stretches import Stretch, cut

from .fake_accelerator import FakeAccelerator
from .shards import Folder, flip, some


def test_no_ring_before_somebody_needs_one() -> None:
    device = FakeAccelerator()
    pump = RingPump(device, lambda _: pytest.fail("read"))
    pump.send([], lambda run, source: [], check=True)
    assert not device.rings
    pump.prepare(1)
    pump.prepare(1 << 40)
    assert len(device.rings) == 1
    pump.close()


@pytest.mark.parametrize(
    ("size", "lanes"), [(1, 1), (2 * BUFFER_BYTES + 1, 2), (1 << 40, LANES), (0, 1)]
)
def test_no_more_buffers_than_are_filled(size: int, lanes: int) -> None:
    """Two for each thread, always: with fewer they would wait for each other's second one."""
    device = FakeAccelerator()
    pump = RingPump(device, lambda _: pytest.fail("read"))
    pump.prepare(size)
    assert device.rings[0]._buffers == 2 * lanes
    pump.close()


@pytest.mark.parametrize("damaged", [(), (2, 33)])
@pytest.mark.parametrize("threads", [0, 2 * LANES])
def test_runs_arrive_or_are_refused(tmp_path: Path, threads: int, damaged: tuple[int, ...]) -> None:
    device = FakeAccelerator()
    shard = Folder(tmp_path, "memory").shard(some())
    size = shard.record.image_bytes
    image = Path(shard.path).read_bytes()[shard.offset :]
    for unit in damaged:
        flip(shard, unit * UNIT_BYTES + 7)
    target = numpy.zeros(size, dtype=numpy.uint8)
    begin = int(target.ctypes.data)
    runs = list(cut(Stretch(0, 0, -(-size // UNIT_BYTES), begin), BUFFER_BYTES // UNIT_BYTES))
    with ShardReader(shard) as reader, ThreadPoolExecutor(threads or 1) as executor:
        pump = RingPump(device, lambda _: reader, executor if threads else None)

        def rows(run: Stretch, source: int) -> list[Row]:
            return [(run.address, source, reader.size(run.first, run.count))]

        if damaged:
            with pytest.raises(ShardCorrupt) as raised:
                pump.send(runs, rows, check=True)
            assert raised.value.units == damaged
            assert not any(target[unit * UNIT_BYTES :][:UNIT_BYTES].any() for unit in damaged)
        else:
            pump.send(runs, rows, check=True)
            assert target.tobytes() == image
        pump.close()
