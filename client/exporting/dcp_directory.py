"""A checkpoint of torch.distributed.checkpoint, written piece by piece by one process.

Owns the planner that has torch's own writer ask for boxes of tensors, one at a time. A tensor is
stored in several chunks where it is large, or where ranks had parts of it (`sharded`); readers put
them together. Promises that one box is in memory at a time.
"""

import dataclasses
import io
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from everstep.client.exporting.replacing import partial_of, put_directory, write_error
from everstep.client.exporting.state import Exported
from everstep.snapshot.consolidating import PieceReader, boxes
from everstep.snapshot.layout import element_bytes
from everstep.snapshot.reshard import Box, Tensor, box_of

CHUNK_BYTES = 32 << 20
MARKS = (".metadata",)


def write_dcp(
    state: Exported, reader: PieceReader, output: Path, *, force: bool, sharded: bool = False
) -> None:
    """Write a state as dcp.save does.

    Args:
        state: What to write.
        reader: Has the bytes of its placeholders.
        output: The directory.
        force: Replace an older checkpoint.
        sharded: A file for each rank, with the parts that it had.

    Raises:
        Refused: If the output is there. Nothing was written.
        ShardCorrupt: If a unit is damaged. Nothing is left behind.
        OutOfSpace: If it does not fit. Likewise.
        WriteFailed: If the device fails. Likewise.
    """
    partial = partial_of(output)
    try:
        # Nothing is copied ahead: all chunks lie in the same memory, one after the other.
        writer = FileSystemWriter(partial, per_thread_copy_ahead=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            _save(writer, Planner(state, reader, sharded=sharded))
        put_directory(partial, output, force=force, marks=MARKS)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise write_error(output, state.nbytes, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(writer: FileSystemWriter, planner: "Planner") -> None:
    """What dcp.save does, for all ranks in one process."""
    writer.set_up_storage_writer(True)
    planner.set_up_planner(planner.exported.tree, writer.storage_meta(), True)
    plans = [writer.prepare_local_plan(plan) for plan in planner.local_plans()]
    plans, metadata = planner.create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    results = [writer.write_data(plan, planner).wait() for plan in plans]
    writer.finish(metadata, results)


class Planner(DefaultSavePlanner):
    """Plans boxes in place of whole tensors, and resolves them from the shards."""

    def __init__(self, exported: Exported, reader: PieceReader, *, sharded: bool) -> None:
        super().__init__()
        self.exported = exported
        self._reader = reader
        self._sharded = sharded
        self._boxes: dict[tuple[str, torch.Size], tuple[Tensor, Box]] = {}
        self._memory: Any = numpy.empty(CHUNK_BYTES, dtype=numpy.uint8)

    def local_plans(self) -> list[SavePlan]:
        """The plans of all ranks; of one, unless the state is to stay sharded."""
        by_rank: dict[int, list[WriteItem]] = {0: []}
        for item in self.create_local_plan().items:
            source = self.exported.placeholders.source(self.state_dict[item.index.fqn])
            if not isinstance(source, Tensor) or not source.elements:
                by_rank[0].append(item)
                continue
            for rank, box in self._parts(source):
                found = _item(item, box)
                assert found.index.offset is not None
                self._boxes[found.index.fqn, found.index.offset] = source, box
                by_rank.setdefault(rank, []).append(found)
        return [SavePlan(items, planner_data=self.mappings) for _, items in sorted(by_rank.items())]

    def _parts(self, source: Tensor) -> Iterator[tuple[int, Box]]:
        itemsize = element_bytes(source.dtype)
        whole = [(0, Box.whole(source.shape))]
        for rank, box in _held(source) if self._sharded and source.is_sharded else whole:
            for part in boxes(box, itemsize, CHUNK_BYTES):
                yield rank, part

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """One box's bytes, good until the next is asked for; anything else as torch does."""
        offset = write_item.index.offset
        found = None if offset is None else self._boxes.get((write_item.index.fqn, offset))
        if found is None:
            return super().resolve_data(write_item)
        source, box = found
        self._reader.read(source, box, int(self._memory.ctypes.data))
        size = box.elements * element_bytes(source.dtype)
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=size)
        dtype = getattr(torch, source.dtype)
        return flat.view(dtype).reshape(box.shape)


def _held(source: Tensor) -> list[tuple[int, Box]]:
    """The boxes of a sharded tensor, each with the first rank that has it."""
    found: dict[Box, int] = {}
    for rank in sorted(source.leaves):
        for leaf in source.leaves[rank]:
            if box_of(leaf).elements:
                found.setdefault(box_of(leaf), rank)
    return [(rank, box) for box, rank in found.items()]


def _item(item: WriteItem, box: Box) -> WriteItem:
    assert item.tensor_data is not None
    offset, shape = torch.Size(box.offset), torch.Size(box.shape)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=offset, sizes=shape),
        properties=TensorProperties(dtype=item.tensor_data.properties.dtype),
        size=item.tensor_data.size,
    )
    index = MetadataIndex(item.index.fqn, offset)
    return dataclasses.replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data)
