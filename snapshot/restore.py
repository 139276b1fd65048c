"""Filling live tensors from the shards of one snapshot.

Owns the way from located copies to the tensors that want their bytes: which rank's shard gives
which range, what travels through `snapshot/device_fill.py`, and the tensors that no flat copy can
fill. Promises that `verify` has seen every byte that `run` will use, that a byte reaches a tensor
only after the digest of its unit matched, and that every wanted byte is written or an error is
raised. Does not choose the copy (the agent does), and does not know modules or optimizers (the
client does).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch

from everstep.proto.errors import StateMismatch
from everstep.proto.failpoint import failpoint
from everstep.snapshot.accelerator import Accelerator
from everstep.snapshot.capture import dtype_name
from everstep.snapshot.device_fill import DeviceFill, Pinned
from everstep.snapshot.layout import Leaf
from everstep.snapshot.reading import Range, Shard, ShardReader
from everstep.snapshot.replicas import gather
from everstep.snapshot.restore_cuda import accelerator
from everstep.snapshot.ring_pump import Row

__all__ = ["Restoration", "Shard", "Wanted"]


@dataclass(slots=True)
class Wanted:
    """A leaf that somebody wants, and the tensor that takes it."""

    name: str
    tensor: torch.Tensor


class Restoration:
    """Copies wanted leaves out of the shards of one snapshot. Use as a context manager.

    Args:
        shards: All ranks' shards of the snapshot, by rank.
        rank: Whose private leaves are wanted.
        executor: Spreads the work, which runs without the GIL, over its threads.
        pinned: Tells what lies in pinned memory of this process already.
        accelerators: Gives the way to a device, or None if bytes go there through torch.

    Attributes:
        problem: Why bytes could not travel to a device at once, if the device was the reason.
    """

    def __init__(
        self,
        shards: Mapping[int, Shard],
        rank: int,
        executor: Executor | None = None,
        *,
        pinned: Pinned | None = None,
        accelerators: Callable[[torch.device], Accelerator | None] = accelerator,
    ) -> None:
        self.problem = ""
        self._pinned = pinned
        self._accelerators = accelerators
        self._shards = shards
        self._rank = rank
        self._executor = executor
        self._leaves = {
            holder: {leaf.name: leaf for leaf in shard.layout.leaves}
            for holder, shard in shards.items()
        }
        self._pieces: dict[int, list[Row]] = {}
        self._sent: dict[torch.device, dict[int, list[Row]]] = {}
        self._fills: dict[torch.device, DeviceFill | None] = {}
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._planned: dict[str, torch.Tensor] = {}
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

    def verify(
        self, names: Iterable[str], devices: Mapping[str, torch.device] | None = None
    ) -> None:
        """Check every unit that holds a byte of these leaves; touch no tensor.

        Args:
            names: Of the leaves.
            devices: Where those leaves will be wanted that are not wanted on the CPU, as far as
                that is known. They travel there now, once, if there is room.

        Raises:
            ShardCorrupt: If a unit does not match its digest.
            FormatInvalid: If a file is too short, or the shards do not hold every byte.
        """
        on_host: dict[int, list[Range]] = {}
        on_device: dict[DeviceFill, dict[int, list[Range]]] = {}
        for leaf, device in self._bound_for(names, devices or {}).values():
            fill = None if device is None else self._fill_for(device)
            ranges = on_host if fill is None else on_device.setdefault(fill, {})
            for holder, offset, _, size in self._sources(leaf):
                ranges.setdefault(holder, []).append((offset, offset + size))
        for fill, ranges in on_device.items():
            if not fill.stage(ranges):
                self.problem = self.problem or fill.problem
                for holder, wanted in ranges.items():
                    on_host.setdefault(holder, []).extend(wanted)
        for holder, wanted in on_host.items():
            unchecked = [part for part in wanted if not self._is_staged(holder, part)]
            self._reader(holder).verify(unchecked)

    def plan(self, wanted: Sequence[Wanted]) -> None:
        """Say which tensor takes which leaf.

        Raises:
            StateMismatch: If dtype or shape of a tensor are not those of its leaf.
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
            self._reader(holder).copy(pieces)
        for device, wanted in self._sent.items():
            fill = self._fills[device]
            assert fill is not None
            _send(fill, wanted)
        failpoint("client.restore.copied")
        with torch.no_grad():
            for tensor, staged in [*self._staged, *self._copies]:
                _fill(tensor, staged)

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

    def _is_staged(self, holder: int, part: Range) -> bool:
        """Whether the units of a range were checked on a device, for what lies beside it."""
        fills = filter(None, self._fills.values())
        return any(fill.staged_rows(0, holder, part[0], part[1] - part[0]) for fill in fills)

    def _bound_for(
        self, names: Iterable[str], devices: Mapping[str, torch.device]
    ) -> dict[str, tuple[Leaf, torch.device | None]]:
        """Each leaf once, with the first device where one of its names is wanted."""
        bound: dict[str, tuple[Leaf, torch.device | None]] = {}
        for name in names:
            leaf = self._leaf(name)
            if leaf is not None and bound.get(leaf.name, (leaf, None))[1] is None:
                bound[leaf.name] = leaf, devices.get(name)
        return bound

    def _leaf(self, name: str) -> Leaf | None:
        aliases = self._shards[self._rank].layout.aliases
        return self._leaves[self._rank].get(aliases.get(name, name))

    def _plan_one(self, item: Wanted) -> None:
        leaf = self._leaf(item.name)
        if leaf is None:
            raise StateMismatch("a leaf is not in the snapshot.", missing=(item.name,))
        tensor = item.tensor
        if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (leaf.dtype, leaf.shape):
            saved = f"{leaf.dtype}{list(leaf.shape)}"
            attached = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
            change = f"{item.name}: {saved} -> {attached}"
            raise StateMismatch("a leaf has another form.", reshaped=(change,))
        first = self._planned.get(leaf.name)
        if first is not None:
            if first.data_ptr() != tensor.data_ptr() or first.stride() != tensor.stride():
                self._copies.append((tensor, first))
            return
        self._planned[leaf.name] = target = tensor
        fill = self._fill_for(tensor.device)
        reached = fill is not None or tensor.device.type == "cpu"
        if not reached or not _is_flat(tensor):
            where = tensor.device if reached else None
            target = torch.empty(tensor.shape, dtype=tensor.dtype, device=where)
            self._staged.append((tensor, target))
        pieces = self._pieces if fill is None else self._sent.setdefault(tensor.device, {})
        for holder, offset, start, size in self._sources(leaf):
            pieces.setdefault(holder, []).append((target.data_ptr() + start, offset, size))

    def _sources(self, leaf: Leaf) -> Iterator[tuple[int, int, int, int]]:
        """(rank, offset in its image, offset in the leaf, bytes) of what makes up a leaf."""
        if not leaf.whole_bytes:
            return
        holders = {
            holder: [(leaves[leaf.name].start, leaves[leaf.name].stop)]
            for holder, leaves in self._leaves.items()
            if leaf.name in leaves
            and leaves[leaf.name].held_bytes
            and (holder == self._rank or (leaf.replicated and leaves[leaf.name].replicated))
        }
        for holder, start, stop in gather(
            leaf.name, leaf.whole_bytes, holders, own_rank=self._rank
        ):
            held = self._leaves[holder][leaf.name]
            yield holder, held.offset + start - held.start, start, stop - start


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
