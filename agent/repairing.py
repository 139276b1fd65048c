"""Puts right bytes in the place of wrong ones: units of a shard that was found damaged.

Owns the repair of one copy. Promises that only units which match the record are written, over units
which do not, so that a repair that is cut short, or a torn write, leaves nothing worse than it
was; and that the copy is read again afterwards. Takes the units from wherever the plan without the
damaged copy has them: another level, another node, parity.
"""

import asyncio
import errno
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

from everstep.agent.inventory import NodeInventory
from everstep.agent.mending import Fetches
from everstep.agent.planning import Erasure, plan_snapshots
from everstep.agent.sources import SnapshotPlan
from everstep.proto.errors import NothingRecoverable, ShardCorrupt, WriteFailed
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.proto.state_pb2 import Record
from everstep.snapshot.digest import DIGEST_BYTES, unit_matches

_PIECE_UNITS = 32
"""Units that are in memory on their way at one time."""


@dataclass(frozen=True, slots=True)
class Image:
    """Where bytes with known digests lie: a slot of an arena, or a file."""

    path: Path
    offset: int
    image_bytes: int
    unit_digests: bytes = field(repr=False)

    @property
    def units(self) -> int:
        """How many units."""
        return -(-self.image_bytes // UNIT_BYTES)

    def length(self, unit: int) -> int:
        """How long a unit is."""
        return min(UNIT_BYTES, self.image_bytes - unit * UNIT_BYTES)

    def matches(self, unit: int, data: memoryview) -> bool:
        """Whether these are the bytes of a unit."""
        digest = self.unit_digests[unit * DIGEST_BYTES : (unit + 1) * DIGEST_BYTES]
        return len(data) == self.length(unit) and unit_matches(data, digest)


@dataclass(frozen=True, slots=True)
class DamagedCopy:
    """A copy of a shard on this node, with units that are wrong."""

    job: str
    snapshot: SnapshotId
    rank: int
    level: str
    image: Image
    record: Record = field(repr=False)
    bad_units: tuple[int, ...]


class Repairing:
    """Repairs copies of this node."""

    def __init__(
        self,
        node_id: str,
        inventories: Callable[[str], Awaitable[Sequence[NodeInventory]]],
        fetching: Fetches,
        timeout_s: float,
    ) -> None:
        """Prepare.

        Args:
            node_id: This node.
            inventories: What all live nodes hold of a job.
            fetching: Brings the right units.
            timeout_s: For one repair.
        """
        self._node_id = node_id
        self._inventories = inventories
        self._fetching = fetching
        self._timeout_s = timeout_s
        self._worker = ThreadPoolExecutor(1, "everstep-repair")

    def close(self) -> None:
        """Begin nothing more."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def repair(self, copy: DamagedCopy) -> None:
        """Write the right units over the wrong ones. Nobody may be writing to the copy.

        Raises:
            NothingRecoverable: If the units are nowhere else, and no parity has them.
            WriteFailed: If they cannot be written.
            EverstepError: What `Fetching` raises.
        """
        erasure = Erasure(self._node_id, copy.snapshot, copy.rank, copy.level)
        found = await self._inventories(copy.job)
        planned = plan_snapshots(found, erasures=[erasure], to_step=copy.snapshot.step)
        plan = next((one for one in planned if one.snapshot == copy.snapshot), None)
        if plan is None or all(source.rank != copy.rank for source in plan.sources):
            missing = plan.missing if plan is not None else ()
            raise NothingRecoverable(copy.job, missing or (f"{copy.snapshot} is nowhere else",))
        work = partial(self._repair, plan, copy)
        await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _repair(self, plan: SnapshotPlan, copy: DamagedCopy) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        with _opened(copy.image.path) as descriptor:
            for first in range(0, len(copy.bad_units), _PIECE_UNITS):
                units = copy.bad_units[first : first + _PIECE_UNITS]
                buffers = {unit: memoryview(bytearray(copy.image.length(unit))) for unit in units}
                self._fetching.fetch(
                    plan,
                    copy.rank,
                    runs(units),
                    buffers.__getitem__,
                    copy.record,
                    deadline_s=deadline_s,
                    progress=lambda count_bytes: None,
                )
                _write(descriptor, copy.image, buffers)
        still_bad = [unit for unit in copy.bad_units if not _is_right(copy.image, unit)]
        if still_bad:
            raise ShardCorrupt(f"{copy.image.path}, after it was repaired", tuple(still_bad))


class _opened:
    """A file to be written in place."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        try:
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._path, flags)
        except OSError as error:
            raise WriteFailed(str(self._path), error) from error
        return self._descriptor

    def __exit__(self, *about: object) -> None:
        os.close(self._descriptor)


def _write(descriptor: int, image: Image, buffers: dict[int, memoryview]) -> None:
    try:
        for unit, data in buffers.items():
            written = os.pwrite(descriptor, data, image.offset + unit * UNIT_BYTES)
            if written != len(data):
                raise OSError(errno.EIO, "a short write")
        os.fdatasync(descriptor)
    except OSError as error:
        raise WriteFailed(str(image.path), error) from error


def _is_right(image: Image, unit: int) -> bool:
    with _opened(image.path) as descriptor:
        return not bad_units(descriptor, image, range(unit, unit + 1))


def bad_units(
    descriptor: int,
    image: Image,
    units: Sequence[int],
    before: Callable[[int], bool] = lambda count_bytes: True,
    most: int = 1 << 62,
) -> list[int]:
    """The units that do not match their digests, or cannot be read.

    Args:
        descriptor: The open file.
        image: What it should hold.
        units: Which to look at.
        before: Called with the bytes of each unit before it is read; False ends it.
        most: Ends it, too.
    """
    bad: list[int] = []
    buffer = memoryview(bytearray(UNIT_BYTES))
    for unit in units:
        length, begin = image.length(unit), image.offset + unit * UNIT_BYTES
        if len(bad) >= most or not before(length):
            break
        with suppress(OSError):
            # What is in the page cache says nothing about the disk.
            os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)
        try:
            read = os.preadv(descriptor, [buffer[:length]], begin)
        except OSError:
            read = 0
        if not image.matches(unit, buffer[:read]):
            bad.append(unit)
    return bad


def runs(units: Sequence[int]) -> list[range]:
    """Ascending units as ranges."""
    if not units:
        return []
    breaks = [index + 1 for index, (a, b) in enumerate(pairwise(units)) if b != a + 1]
    bounds = [0, *breaks, len(units)]
    return [range(units[first], units[stop - 1] + 1) for first, stop in pairwise(bounds)]
