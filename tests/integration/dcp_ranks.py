"""One rank of a job that saves and loads with torch.distributed.checkpoint; see test_dcp_ranks.py.

Each phase writes what it found to PHASE-RANK.json. Full tensors are compared by digest.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard as OldShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from everstep.dcp import EverstepReader, EverstepWriter

JOB = "dcp"


class Model(nn.Module):
    """Uneven and empty shards, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.randn(1))
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(batch)) * self.scale


def digest(tensor: torch.Tensor) -> str:
    """Of all of it, wherever it is."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    flat = whole.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return f"{whole.dtype}{list(whole.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def digests(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of every tensor, by its path; other values as text."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": one for inner, one in digests(value).items()}
        else:
            found[key] = digest(value) if isinstance(value, torch.Tensor) else repr(value)
    return found


def sharded(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model under FSDP2, and its optimizer after one step."""
    torch.manual_seed(seed)
    model = Model()
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step."""
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    """As torchtitan saves it."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, **more}


def spread(shape: tuple[int, ...], mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """Zeros."""
    return distribute_tensor(torch.zeros(shape), mesh, placements)


def low(fill: float) -> DTensor:
    """In bfloat16, by columns: uneven."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(torch.full((3, 5), fill).bfloat16() / 3, mesh, [Shard(1)])


CHUNKS = {
    "rows": [(0, 0, 0, 5, 20), (1, 5, 0, 5, 20)],
    "columns": [(0, 0, 0, 10, 9), (1, 0, 9, 10, 11)],
    "in turn": [(0, 0, 0, 2, 20), (1, 2, 0, 1, 20), (0, 3, 0, 3, 20), (1, 6, 0, 4, 20)],
    "one rank": [(1, 0, 0, 8, 20), (1, 8, 0, 2, 20)],
}
"""Of a tensor of 10 by 20: (rank, row, column, rows, columns)."""


def in_chunks(whole: torch.Tensor, chunks: list[tuple[int, ...]]) -> Any:
    """A sharded tensor of the older kind."""
    shards = [
        OldShard.from_tensor_and_offsets(
            whole[row : row + rows, column : column + columns].clone(), [row, column], rank
        )
        for rank, row, column, rows, columns in chunks
        if rank == dist.get_rank()
    ]
    return init_from_local_shards(shards, whole.shape)


def box_of(whole: torch.Tensor, place: Any) -> torch.Tensor:
    """The part of a tensor that is one of its shards."""
    (row, column), (rows, columns) = place.shard_offsets, place.shard_sizes
    return whole[row : row + rows, column : column + columns]


class FailsOnRank1(dcp.DefaultSavePlanner):
    """A planner that cannot read a tensor on rank 1."""

    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("rank 1 cannot read it")
        return super().resolve_data(write_item)


def failure(attempt: Callable[[], object]) -> str:
    """What an attempt that must fail says."""
    try:
        attempt()
    except CheckpointException as error:
        return str(error)
    return ""


class Phases:
    """What a launch is asked to do, one after another."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.writer = EverstepWriter(JOB, nvme_interval=1)
        self.reader = EverstepReader(JOB, nvme_interval=1)

    def save(self) -> dict[str, Any]:
        """FSDP2, with objects; then the same under the same mesh, zeroed, is loaded."""
        model, optimizer = sharded(0)
        words = ["a", {"deep": (1, 2)}]
        state = state_of(model, optimizer, step=1, words=words, low=low(7.0), one=torch.ones(3))
        dcp.save(state, storage_writer=self.writer, checkpoint_id=self.out / "step-1")
        dcp.save(state, checkpoint_id=self.out / "reference")
        saved = digests(state)
        model, optimizer = sharded(1)
        words = ["", {"deep": 0}]
        other = state_of(model, optimizer, step=0, words=words, low=low(0.0), one=torch.zeros(3))
        before = digests(other)
        dcp.load(other, storage_reader=self.reader)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=other["model"],
            optim_state_dict=other["optimizer"],
        )
        found = {"saved": saved, "before": before, "loaded": digests(other)}
        found["set"] = digests(state_of(model, optimizer))
        # DCP's own load into another model says how training is to go on.
        theirs = sharded(2)
        reference = state_of(*theirs)
        dcp.load(reference, checkpoint_id=self.out / "reference")
        set_state_dict(
            *theirs,
            model_state_dict=reference["model"],
            optim_state_dict=reference["optimizer"],
        )
        for trained in (theirs, (model, optimizer)):
            train(*trained)
        found["expected"] = digests(state_of(*theirs))
        found["trained"] = digests(state_of(model, optimizer))
        return found

    def tensor_parallel(self) -> dict[str, Any]:
        """What FSDP2 saved, on another mesh: by columns, replicated, and by rows of another."""
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = {
            "first.weight": spread((5, 6), mesh, [Shard(1)]),
            "first.bias": spread((5,), mesh, [Replicate()]),
            "second.weight": spread((1, 5), mesh, [Shard(1)]),
            "second.bias": torch.zeros(1),
        }
        state = {"model": model, "step": 0}
        dcp.load(state, storage_reader=self.reader, checkpoint_id=1)
        found = digests(state)
        dcp.save(state, storage_writer=self.writer, checkpoint_id="step-2")
        again = {"model": {"first.weight": spread((5, 6), mesh, [Shard(0)])}}
        dcp.load(again, storage_reader=self.reader, checkpoint_id=2)
        return {"found": found, "again": digests(again)}

    def resharding(self) -> dict[str, Any]:
        """From each way to divide a tensor to each other, on one mesh dimension."""
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        ways: list[list[Placement]] = [[Shard(0)], [Shard(1)], [Replicate()]]
        return self._between(mesh, ways, 20)

    def two_dimensions(self) -> dict[str, Any]:
        """The same on two: HSDP, tensor parallel in FSDP, and both dimensions on one."""
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
        ways: list[list[Placement]] = [
            [Replicate(), Shard(0)],
            [Shard(0), Shard(1)],
            [Shard(0), Shard(0)],
            [Shard(1), Replicate()],
        ]
        return self._between(mesh, ways, 30)

    def _between(self, mesh: DeviceMesh, ways: list[list[Placement]], step: int) -> dict[str, Any]:
        found = {}
        for saved_as in ways:
            whole = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
            state = {"w": distribute_tensor(whole, mesh, saved_as), "plain": whole[:2].clone()}
            dcp.save(state, storage_writer=self.writer, checkpoint_id=step)
            for loaded_as in ways:
                other = {"w": spread((7, 5), mesh, loaded_as), "plain": torch.zeros(2, 5)}
                dcp.load(other, storage_reader=self.reader, checkpoint_id=step)
                found[f"{saved_as} -> {loaded_as}"] = digests(other) == digests(state)
            step += 1
        return found

    def sharded_tensors(self) -> dict[str, Any]:
        """The older sharded tensors, in chunks of all kinds, in place of plain ones and back."""
        whole = torch.arange(200.0).reshape(10, 20)
        found, step = {}, 40
        for saved_as, chunks in CHUNKS.items():
            state = {"sharded": in_chunks(whole, chunks), "plain": whole + 1}
            dcp.save(state, storage_writer=self.writer, checkpoint_id=step)
            for loaded_as, others in CHUNKS.items():
                zeros = torch.zeros_like(whole)
                other = {"sharded": zeros, "plain": in_chunks(zeros, others)}
                dcp.load(other, storage_reader=self.reader, checkpoint_id=step)
                same = [
                    torch.equal(shard.tensor, box_of(whole + 1, shard.metadata))
                    for shard in other["plain"].local_shards()
                ]
                found[f"{saved_as} -> {loaded_as}"] = all(same) and torch.equal(zeros, whole)
            step += 1
        return found

    def asynchronous(self) -> dict[str, Any]:
        """Saved in the background while the model goes on; two of them."""
        model, optimizer = sharded(2)
        found, group = [], dist.new_group(backend="gloo")
        for _ in range(2):
            state = state_of(model, optimizer)
            saved = digests(state)
            future = dcp.async_save(state, storage_writer=self.writer, process_group=group)
            train(model, optimizer)
            future.result()
            found.append({"saved": saved, "id": self.writer.checkpoint_id})
        other = state_of(*sharded(3))
        self.reader.reset()
        dcp.load(other, storage_reader=self.reader)
        return {"saves": found, "loaded": digests(other), "id": self.reader.checkpoint_id}

    def failing(self) -> dict[str, Any]:
        """A save that fails on one rank, or is asked for differently, is none; the next one is."""
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        rank = dist.get_rank()

        def state(fill: float) -> dict[str, Any]:
            values = torch.full((5, 4), fill)
            return {"w": distribute_tensor(values, mesh, [Shard(0)]), "own": torch.full((2,), fill)}

        def save(fill: float, step: int, **options: Any) -> None:
            dcp.save(state(fill), storage_writer=self.writer, checkpoint_id=step, **options)

        save(1.0, 100)
        broken = failure(lambda: save(2.0, 101, planner=FailsOnRank1()))
        differently = failure(lambda: save(3.0, 102 + rank))
        loaded = state(0.0)
        self.reader.reset()
        dcp.load(loaded, storage_reader=self.reader)
        earlier = failure(
            lambda: dcp.load(state(0.0), storage_reader=self.reader, checkpoint_id=55)
        )
        mixed = failure(
            lambda: dcp.load(
                {"other": torch.zeros(1)}, storage_reader=self.reader, checkpoint_id=100
            )
        )
        alone = failure(lambda: save(3.5, 105, no_dist=True))
        group = self.group_of_rank_0()
        save(4.0, 110)
        after = state(0.0)
        dcp.load(after, storage_reader=self.reader, checkpoint_id=110)
        return {
            "broken": broken,
            "differently": differently,
            "loaded": digests(loaded),
            "earlier": earlier,
            "missing": mixed,
            "each alone": alone,
            "group": group,
            "after": digests(after),
        }

    def group_of_rank_0(self) -> float | None:
        """A checkpoint of some of the ranks is a job of its own."""
        group = dist.new_group([0])
        if dist.get_rank() > 0:
            return None
        options: dict[str, Any] = {"job": "rank-0", "rank": 0, "world": 1}
        loaded = {"w": torch.zeros(1)}
        state = {"w": torch.full((1,), 3.0)}
        dcp.save(state, storage_writer=EverstepWriter(**options), process_group=group)
        dcp.load(loaded, storage_reader=EverstepReader(**options), process_group=group)
        return loaded["w"].item()

    def protected(self) -> dict[str, Any]:
        """At level parity: nodes that are lost take nothing with them."""
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        state = {"w": distribute_tensor(torch.arange(100_000.0), mesh, [Shard(0)]), "step": 50}
        writer = EverstepWriter(JOB, level="parity", nvme_interval=1)
        dcp.save(state, storage_writer=writer, checkpoint_id=50)
        return digests(state)

    def load(self) -> dict[str, Any]:
        """What other numbers of ranks have saved: two of them, and one."""
        found = {}
        for step in (1, 200):
            state = state_of(*sharded(4), step=0)
            dcp.load(state, storage_reader=self.reader, checkpoint_id=step)
            found[str(step)] = digests(state)
        return found


def main() -> None:
    """Run the phases that are named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("phases", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--meet", type=Path, required=True, help="a file, new for each launch")
    options = parser.parse_args()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.meet}",
        rank=options.rank,
        world_size=options.world,
    )
    phases = Phases(options.out)
    for name in options.phases:
        found = getattr(phases, name)()
        path = options.out / f"{name}-{dist.get_rank()}.json"
        path.with_suffix(".part").write_text(json.dumps(found))
        path.with_suffix(".part").rename(path)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
