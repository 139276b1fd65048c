"""The ranks of the resharding benchmark: processes with gloo, FSDP2 and tensor parallelism.

Each layout is what a user would have: `fully_shard` over a mesh, `parallelize_module` before it for
tensor parallelism, AdamW. Processes are forked from a server that has imported torch, so that a
rank starts in a tenth of a second; none of what it times is imported by then but the libraries.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import xxhash

from benchmarks.memory import Peak, anonymous_bytes

WIDTH = 1024
HIDDEN = 4096
BLOCK_PARAMETERS = 2 * WIDTH * HIDDEN + WIDTH
LAYOUTS = {"dp3": (3, 1), "dp4": (4, 1), "dp8": (8, 1), "tp2-dp2": (2, 2)}
"""Data parallel (fully sharded) and tensor parallel ranks."""
ANSWER_S = 300.0


class Block(torch.nn.Module):
    """Two matrices, as a transformer's feed-forward part has them, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = torch.nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norm = torch.nn.RMSNorm(WIDTH)


@dataclass(frozen=True, slots=True)
class Task:
    """What all ranks of one launch do.

    Attributes:
        role: "save", "restore" or "memory": restore, with an eye on the memory instead of time.
        layout: One of `LAYOUTS`.
        job: Whose snapshot.
        launch: Its number.
        address: Of the agent.
        directory: Where dcp's checkpoint is, beside what ranks need to find each other.
        parameters: Of the model.
        ours_first: Whether `client.restore()` comes before `dcp.load`.
    """

    role: str
    layout: str
    job: str
    launch: int
    address: str
    directory: str
    parameters: int
    ours_first: bool = True

    @property
    def world(self) -> int:
        """How many ranks there are."""
        shards, tensors = LAYOUTS[self.layout]
        return shards * tensors


@dataclass(slots=True)
class State:
    """One rank's model and optimizer."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def build(cls, task: Task) -> "State":
        """Shard the model, and have the optimizer make its state."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            SequenceParallel,
            parallelize_module,
        )

        shape = LAYOUTS[task.layout]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        with torch.device("meta"):
            count = max(1, task.parameters // BLOCK_PARAMETERS)
            model = torch.nn.Sequential(*(Block() for _ in range(count)))
        for block in model:
            if shape[1] > 1:
                plan = {
                    "up": ColwiseParallel(),
                    "down": RowwiseParallel(),
                    "norm": SequenceParallel(),
                }
                parallelize_module(block, mesh["tp"], plan)
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        state = cls(model, optimizer)
        state.fill(None)
        optimizer.step()
        optimizer.zero_grad()
        return state

    def tensors(self) -> Iterator[torch.Tensor]:
        """This rank's memory of everything."""
        live: list[torch.Tensor] = [*self.model.parameters()]
        live += [t for p in self.model.parameters() for t in self.optimizer.state[p].values()]
        for tensor in live:
            yield getattr(tensor, "_local_tensor", tensor).detach()

    def fill(self, seed: int | None) -> None:
        """Zeros, or numbers of no meaning; norms and steps are alike on all ranks."""
        for index, tensor in enumerate(self.tensors()):
            if seed is None:
                tensor.zero_()
            elif tensor.dim() < 2:
                tensor.fill_(index)
            else:
                generator = torch.Generator().manual_seed(seed * 1000 + index)
                tensor.uniform_(-1, 1, generator=generator)

    def digest(self) -> str:
        """Of this rank's bytes."""
        state = xxhash.xxh3_128()
        for tensor in self.tensors():
            state.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        return state.hexdigest()

    @property
    def bytes(self) -> int:
        """Of this rank."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def nested(self) -> dict[str, object]:
        """As dcp's users hand it over."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def launch(task: Task) -> list[dict[str, Any]]:
    """Run all ranks of a launch; what each has to say, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.reshard_preload"])
    pairs = [context.Pipe(duplex=False) for _ in range(task.world)]
    ranks = [
        context.Process(target=_run, args=(task, rank, pair[1]), daemon=True)
        for rank, pair in enumerate(pairs)
    ]
    for rank, pair in zip(ranks, pairs, strict=True):
        rank.start()
        pair[1].close()
    try:
        deadline = time.monotonic() + ANSWER_S
        return [_answer(pair[0], deadline) for pair in pairs]
    finally:
        for rank in ranks:
            rank.join(5)
            rank.kill()
            rank.join()


def _answer(connection: Connection, deadline: float) -> dict[str, Any]:
    if not connection.poll(max(0.0, deadline - time.monotonic())):
        raise SystemExit("a rank did not answer in time")
    answer: dict[str, Any] = connection.recv()
    if "error" in answer:
        raise SystemExit(answer["error"])
    return answer


def _run(task: Task, rank: int, connection: Connection) -> None:
    try:
        store = Path(task.directory, f"store-{task.launch}")
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=task.world
        )
        connection.send(_ROLES[task.role](task, rank))
        distributed.barrier()
    except BaseException:
        connection.send({"error": f"rank {rank} of {task.layout}:\n{traceback.format_exc()}"})
    os._exit(0)  # as a trainer that is killed: nothing is closed in good order


def _connect(task: Task, state: State) -> Any:
    import everstep

    client = everstep.connect(
        task.job,
        agent=task.address,
        rank=distributed.get_rank(),
        world=task.world,
        launch_id=str(task.launch),
        nvme_interval=10**9,
    )
    client.attach(model=state.model, optimizer=state.optimizer)
    return client


def save(task: Task, rank: int) -> dict[str, Any]:
    """One snapshot, and the same state by dcp."""
    import torch.distributed.checkpoint as dcp

    state = State.build(task)
    state.fill(rank + 1)
    client = _connect(task, state)
    handle = client.snapshot(1)
    assert handle.wait(), handle
    dcp.save(state.nested(), checkpoint_id=str(Path(task.directory, "dcp")))
    return {"bytes": state.bytes}


def restore(task: Task, rank: int) -> dict[str, Any]:
    """Both ways, each from a barrier on, into a state of zeros; the bytes must be equal."""
    import torch.distributed.checkpoint as dcp

    state = State.build(task)
    client = _connect(task, state)
    nested = state.nested()
    watched = task.role == "memory"
    found: dict[str, Any] = {"bytes": state.bytes}

    def ours() -> None:
        assert client.restore(levels=("memory",)) == 1

    def theirs() -> None:
        dcp.load(nested, checkpoint_id=str(Path(task.directory, "dcp")))

    ways: list[tuple[str, Callable[[], None]]] = [("ours", ours), ("dcp", theirs)]
    digests = set()
    for name, way in ways if task.ours_first else reversed(ways):
        state.fill(None)
        distributed.barrier()
        before = anonymous_bytes()
        with Peak() if watched else nullcontext() as peak:
            begun = time.perf_counter()
            way()
            found[name] = begun, time.perf_counter()
        found[f"{name}_growth"] = peak.bytes - before if peak else 0
        digests.add(state.digest())
        distributed.barrier()
    assert len(digests) == 1, "restored and loaded bytes differ"
    return {**found, "moved": client.restored_bytes}


_ROLES = {"save": save, "restore": restore, "memory": restore}
