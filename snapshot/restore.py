"""Filling live tensors from the shards of one snapshot.

Owns the way from located copies to the tensors that want their bytes: which rank's shard gives
which range (the arithmetic is in `snapshot/reshard.py`), what travels through
`snapshot/device_fill.py`, and the tensors that no flat copy can fill. Promises that `verify` has
seen every byte that `run` will use, that a byte reaches a tensor only after the digest of its unit
matched, and that every wanted byte is written or an error is raised. Does not choose the copy (the
agent does), and does not know modules or optimizers (the client does).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType

import numpy
import torch

from everstep.proto.errors import StateMismatch
from everstep.proto.failpoint import failpoint
from everstep.snapshot.accelerator import Accelerator
from everstep.snapshot.capture_plan import dtype_name
from everstep.snapshot.device_fill import DeviceFill, Pinned
from everstep.snapshot.reading import Range, Shard, ShardReader, units_of
from everstep.snapshot.reshard import Box, Holdings, Rows, Tensor
from everstep.snapshot.restore_cuda import accelerator
from everstep.snapshot.ring_pump import Row

__all__ = ["Need", "Restoration", "Shard", "Wanted"]


_Part = tuple[str, Box, int]
"""A tensor's name, which part of it, and whose."""


@dataclass(frozen=True, slots=True)
class Need:
    """What will be wanted of a tensor, before there is a tensor that takes it.

    Attributes:
        name: The tensor's, or another name of it.
        box: Which part; None: all of it.
        device: Where it will be wanted, if that is known, and not the CPU.
        rank: Whose, where ranks differ; None: this rank's.
    """

    name: str
    box: Box | None = None
    device: torch.device | None = None
    rank: int | None = None


@dataclass(slots=True)
class Wanted:
    """A part of a tensor that somebody wants, and the memory that takes it.

    Attributes:
        name: The saved tensor's, or another name of it.
        tensor: As large as the part.
        box: Which part; None: all of it.
        rank: Whose, where ranks differ; None: this rank's.
        cast: Whether `tensor` may have another dtype: values are converted as they are copied.
    """

    name: str
    tensor: torch.Tensor
    box: Box | None = None
    rank: int | None = None
    cast: bool = False


class Restoration:
    """Copies what is wanted out of the shards of one snapshot. Use as a context manager.

    Args:
        shards: All ranks' shards of the snapshot, by rank. Where the path is empty, the bytes are
            not on this host: see `absent` and `locate`.
        rank: Who restores. It may be of another world than the shards: then it has none.
        executor: Spreads the work, which runs without the GIL, over its threads.
        pinned: Tells what lies in pinned memory of this process already.
        accelerators: Gives the way to a device, or None if bytes go there through torch.
        holdings: What the shards hold, if that is known already.

    Attributes:
        problem: Why bytes could not travel to a device at once, if the device was the reason.
        moved_bytes: How many bytes `run` has copied.
    """

    def __init__(
        self,
        shards: Mapping[int, Shard],
        rank: int,
        executor: Executor | None = None,
        *,
        pinned: Pinned | None = None,
        accelerators: Callable[[torch.device], Accelerator | None] = accelerator,
        holdings: Holdings | None = None,
    ) -> None:
        self.problem = ""
        self.moved_bytes = 0
        self._pinned = pinned
        self._accelerators = accelerators
        self._shards = dict(shards)
        self._rank = rank
        self._executor = executor
        self._holdings = holdings or Holdings({r: shard.layout for r, shard in shards.items()})
        self._pieces: dict[int, list[Rows]] = {}
        self._sent: dict[torch.device, dict[int, list[Row]]] = {}
        self._fills: dict[torch.device, DeviceFill | None] = {}
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._planned: dict[_Part, torch.Tensor] = {}
        self._rows: dict[_Part, dict[int, Rows]] = {}
        self._readers: dict[int, ShardReader] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Restoration":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def absent(self, needs: Iterable[Need]) -> dict[int, list[range]]:
        """The units that must be brought to this host first, of shards that have no path here.

        Raises:
            FormatInvalid: If the shards do not hold every byte.
        """
        if all(shard.path for shard in self._shards.values()):
            return {}  # `verify` sees whether they hold every byte
        wanted: dict[int, list[Rows]] = {}
        for tensor, need, box in self._asked(needs):
            for holder, rows in self._rows_of(tensor, box, need.rank).items():
                if not self._shards[holder].path:
                    wanted.setdefault(holder, []).append(rows)
        return {
            holder: units_of(_ranges(parts), self._shards[holder].record.image_bytes)
            for holder, parts in wanted.items()
        }

    def locate(self, rank: int, path: str, offset: int, level: str) -> None:
        """Say where a shard is whose units were brought here."""
        self._shards[rank] = replace(self._shards[rank], path=path, offset=offset, level=level)

    def begin(self, needs: Iterable[Need]) -> None:
        """Send to devices what will probably be needed there, while others find out.

        Raises:
            FormatInvalid: If a file is too short, or the shards do not hold every byte.
        """
        if all(shard.path for shard in self._shards.values()):
            for fill, ranges in self._wanted_by(needs)[1].items():
                fill.begin(_listed(ranges))

    def verify(self, needs: Iterable[Need]) -> None:
        """Check every unit that holds a needed byte; touch no tensor.

        What is wanted on a device travels there now, once, if there is room.

        Raises:
            ShardCorrupt: If a unit does not match its digest.
            FormatInvalid: If a file is too short, or the shards do not hold every byte.
        """
        on_host, on_device = self._wanted_by(needs)
        for fill, ranges in on_device.items():
            if not fill.stage(_listed(ranges)):
                self.problem = self.problem or fill.problem
                for holder, found in ranges.items():
                    on_host.setdefault(holder, []).extend(found)
        for holder, found in on_host.items():
            ranges_ = _ranges(found)
            if self._fills:
                ranges_ = numpy.array(
                    [part for part in ranges_.tolist() if not self._is_staged(holder, part)],
                    dtype=numpy.int64,
                ).reshape(-1, 2)
            self._reader(holder).verify(ranges_)

    def plan(self, wanted: Sequence[Wanted]) -> None:
        """Say which tensor takes what.

        Raises:
            StateMismatch: If dtype or shape of a tensor are not those of the part.
            FormatInvalid: If the shards do not hold every byte.
        """
        for item in wanted:
            self._plan_one(item)

    def run(self) -> None:
        """Fill the tensors.

        Raises:
            ShardCorrupt: If a unit does not match its digest (any more, after `verify`). Tensors
                may be partly filled then: the caller must not go on with them.
            DeviceFailure: If a device fails. The same goes for it.
        """
        for holder, pieces in self._pieces.items():
            rows = numpy.concatenate(pieces)
            self.moved_bytes += int(rows[:, 2].sum())
            self._reader(holder).copy(rows)
        for device, wanted in self._sent.items():
            fill = self._fills[device]
            assert fill is not None
            self.moved_bytes += sum(size for rows in wanted.values() for _, _, size in rows)
            _send(fill, wanted)
        failpoint("client.restore.copied")
        with torch.no_grad():
            for tensor, staged in [*self._staged, *self._copies]:
                _fill(tensor, staged)

    @property
    def read_from(self) -> set[int]:
        """The ranks whose shards were read."""
        sent = (holder for wanted in self._sent.values() for holder in wanted)
        return {*self._pieces, *self._readers, *sent}

    def _wanted_by(
        self, needs: Iterable[Need]
    ) -> tuple[dict[int, list[Rows]], dict[DeviceFill, dict[int, list[Rows]]]]:
        """What each shard must give the host, and devices."""
        on_host: dict[int, list[Rows]] = {}
        on_device: dict[DeviceFill, dict[int, list[Rows]]] = {}
        for tensor, need, box in self._asked(needs):
            fill = None if need.device is None else self._fill_for(need.device)
            ranges = on_host if fill is None else on_device.setdefault(fill, {})
            for holder, rows in self._rows_of(tensor, box, need.rank).items():
                ranges.setdefault(holder, []).append(rows)
        return on_host, on_device

    def _own(self, rank: int | None) -> int:
        return self._rank if rank is None else rank

    def _rows_of(self, tensor: Tensor, box: Box, rank: int | None) -> dict[int, Rows]:
        """What to read for a part; it is asked for several times on the way, and costs."""
        key = (tensor.name, box, self._own(rank))
        rows = self._rows.get(key)
        if rows is None:
            rows = self._rows[key] = tensor.rows(box, self._own(rank))
        return rows

    def _reader(self, holder: int) -> ShardReader:
        if holder not in self._readers:
            reader = ShardReader(self._shards[holder], self._executor)
            self._readers[holder] = self._stack.enter_context(reader)
        return self._readers[holder]

    def _fill_for(self, device: torch.device) -> DeviceFill | None:
        if device not in self._fills:
            found = self._accelerators(device)
            fill = None
            if found is not None:
                fill = DeviceFill(found, self._reader, self._executor, self._pinned)
                self._stack.callback(fill.close)
            self._fills[device] = fill
        return self._fills[device]

    def _is_staged(self, holder: int, part: Sequence[int]) -> bool:
        """Whether the units of a range were checked on a device, for what lies beside it."""
        fills = filter(None, self._fills.values())
        return any(fill.staged_rows(0, holder, part[0], part[1] - part[0]) for fill in fills)

    def _seen(self, name: str, rank: int | None) -> Tensor | None:
        """The saved tensor, as whoever it is taken from has it."""
        tensor = self._holdings.find(name)
        return None if tensor is None else tensor.of(self._own(rank))

    def _asked(self, needs: Iterable[Need]) -> list[tuple[Tensor, Need, Box]]:
        """Each part of a tensor once, with the first device where it is wanted."""
        asked: dict[_Part, tuple[Tensor, Need, Box]] = {}
        for need in needs:
            tensor = self._seen(need.name, need.rank)
            if tensor is None or not tensor.elements:
                continue
            box = need.box or Box.whole(tensor.shape)
            key = (tensor.name, box, self._own(need.rank))
            if key not in asked or asked[key][1].device is None:
                asked[key] = tensor, need, box
        return list(asked.values())

    def _plan_one(self, item: Wanted) -> None:
        saved = self._seen(item.name, item.rank)
        if saved is None:
            raise StateMismatch("a leaf is not in the snapshot.", missing=(item.name,))
        box = item.box or Box.whole(saved.shape)
        tensor = item.tensor
        same_type = dtype_name(tensor.dtype) == saved.dtype
        if not (same_type or item.cast) or tuple(tensor.shape) != box.shape:
            attached = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
            change = f"{item.name}: {saved.dtype}{list(box.shape)} -> {attached}"
            raise StateMismatch("a leaf has another form.", reshaped=(change,))
        key = (saved.name, box, self._own(item.rank))
        first = self._planned.get(key)
        if first is not None:
            if first.data_ptr() != tensor.data_ptr() or first.stride() != tensor.stride():
                self._copies.append((tensor, first))
            return
        self._planned[key] = target = tensor
        fill = self._fill_for(tensor.device)
        reached = fill is not None or tensor.device.type == "cpu"
        if not reached or not same_type or not _is_flat(tensor):
            where = tensor.device if reached else None
            dtype = tensor.dtype if same_type else getattr(torch, saved.dtype)
            target = torch.empty(tensor.shape, dtype=dtype, device=where)
            self._staged.append((tensor, target))
        if not saved.elements:
            return
        begin = numpy.array([target.data_ptr(), 0, 0])
        found = self._rows_of(saved, box, item.rank)
        del self._rows[key]  # asked for no more: it may be as long as the tensor
        for holder, rows in found.items():
            if fill is None:
                self._pieces.setdefault(holder, []).append(rows + begin)
            else:
                sent = self._sent.setdefault(tensor.device, {}).setdefault(holder, [])
                sent += map(tuple, (rows + begin).tolist())


def _listed(ranges: Mapping[int, Sequence[Rows]]) -> dict[int, list[Range]]:
    return {holder: _ranges(rows).tolist() for holder, rows in ranges.items()}


def _ranges(parts: Sequence[Rows]) -> Rows:
    """(from, to) in the image, of runs."""
    rows = numpy.concatenate(parts)
    return numpy.stack([rows[:, 1], rows[:, 1] + rows[:, 2]], axis=1)


def _send(fill: DeviceFill, wanted: Mapping[int, Sequence[Row]]) -> None:
    """Fill tensors on a device: from what was staged there, else from the shards."""
    rows: list[Row] = []
    others: dict[int, list[Row]] = {}
    for holder, pieces in wanted.items():
        for piece in pieces:
            staged = fill.staged_rows(piece[0], holder, piece[1], piece[2])
            if staged is None:
                others.setdefault(holder, []).append(piece)
            else:
                rows += staged
    fill.direct(others)
    fill.scatter(rows)


def _is_flat(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory holds its value, in order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension] > 1:
            # An expanded tensor repeats itself there, and torch refuses to write to it.
            tensor, value = tensor.narrow(dimension, 0, 1), value.narrow(dimension, 0, 1)
    tensor.copy_(value)
