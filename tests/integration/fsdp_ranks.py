"""Training runs whose state is spread over ranks, started as torchrun does: see test_fsdp.py.

Run with a plain interpreter, so it imports nothing of the tests'. Each rank writes what it saw to
``OUT/PHASE-KIND-RANK.json``. What is reported of a tensor is a digest of all its global bytes.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import everstep

WORDS, WIDTH, HEADS, INNER, LENGTH = 37, 26, 2, 46, 7
SAVED_STEP, LAST_STEP = 3, 6
Objects = dict[str, Any]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        weights = (query @ key.transpose(-1, -2)).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.gains = nn.Parameter(torch.ones(2))  # fewer than there are ranks
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gains[0] * self.attention(self.norm(x))
        return x + self.gains[1] * self.dropout(self.down(self.up(self.after(x)).relu()))


class Transformer(nn.Module):
    """Sizes that no number of ranks divides, and two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False).bfloat16()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.to(self.head.weight.dtype)).float()


class Run:
    """One rank's part of a run.

    Args:
        kind: "fsdp"; "tensors", the same over tensor parallelism; or "zero", DDP with a
            ZeroRedundancyOptimizer.
        seed: Of the weights.
        device: "cpu" or "cuda".
    """

    def __init__(self, kind: str, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.kind = kind
        self.device = torch.device(device)
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.model: nn.Module = Transformer().to(self.device)
        self.bare = self.model
        self.readers, self.reader = self.world, self.rank  # that have a batch of their own
        {"fsdp": self._fsdp, "tensors": self._tensors, "zero": self._zero}[kind]()
        torch.manual_seed(100 + self.reader)

    def _fsdp(self, mesh: Any = None) -> None:
        for part in [*self.bare.blocks, self.bare.head, self.bare]:
            fully_shard(part, mesh=mesh or init_device_mesh(self.device.type, (self.world,)))
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def _tensors(self) -> None:
        shape = (self.world // 2, 2) if self.world > 1 else (1, 1)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("shard", "tensor"))
        self.readers, self.reader = shape[0], mesh.get_local_rank("shard")
        columns, rows = ColwiseParallel(), RowwiseParallel()
        plan = {f"attention.{name}": columns for name in ("query", "key", "value")}
        for block in self.bare.blocks:
            parallelize_module(
                block, mesh["tensor"], {**plan, "attention.out": rows, "up": columns, "down": rows}
            )
        self._fsdp(mesh["shard"])

    def _zero(self) -> None:
        self.bare.float()  # all that ZeroRedundancyOptimizer accepts
        self.model = DistributedDataParallel(self.bare, find_unused_parameters=True)
        self.optimizer = ZeroRedundancyOptimizer(
            self.model.parameters(), optimizer_class=torch.optim.AdamW, lr=0.01
        )

    def step(self, number: int) -> None:
        """Every rank has its part of the step's data, and its own dropout."""
        every = torch.Generator().manual_seed(number)
        batch = torch.randint(WORDS, (12, LENGTH + 1), generator=every).to(self.device)
        batch = batch.tensor_split(self.readers)[self.reader]
        self.optimizer.zero_grad()
        found = self.model(batch[:, :-1])
        nn.functional.cross_entropy(found.flatten(0, 1), batch[:, 1:].flatten()).backward()
        self.optimizer.step()

    def steps(self, first: int, last: int) -> None:
        for number in range(first, last + 1):
            self.step(number)

    def connected(self) -> everstep.Client:
        client = everstep.connect(self.kind, on_busy="wait")
        client.attach(model=self.model, optimizer=self.optimizer)
        return client

    def tensors(self) -> dict[str, str]:
        """Digests of those that this rank has, all ranks' parts of each; every rank calls it."""
        inner = getattr(self.optimizer, "optim", self.optimizer)
        found = dict(self.bare.state_dict())
        for name, parameter in self.bare.named_parameters():
            for key, value in inner.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = value
        return {
            name: digest(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
            for name, tensor in found.items()
        }

    def generators(self) -> str:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state())
        return digest(torch.cat(states))

    def facts(self) -> Objects:
        return {"tensors": self.tensors(), "generators": self.generators()}


def digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def alone(kind: str, device: str, out: Path) -> Objects:
    """The run that nothing happens to."""
    run = Run(kind, 1, device)
    run.steps(1, LAST_STEP)
    return {"end": run.facts()}


def save(kind: str, device: str, out: Path) -> Objects:
    """Train and take a snapshot; the same state as torch itself saves it; train on."""
    run = Run(kind, 1, device)
    client = run.connected()
    seen: Objects = {"start": client.restore()}
    run.steps(1, SAVED_STEP)
    seen["committed"] = client.snapshot(SAVED_STEP).wait()
    seen["saved"] = run.facts()
    if kind == "zero":
        run.optimizer.consolidate_state_dict(0)
        if run.rank == 0:
            states = {"model": run.bare.state_dict(), "optimizer": run.optimizer.state_dict()}
            torch.save(states, out / "zero.pt")
    else:
        model, optimizer = get_state_dict(run.model, run.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=out / kind)
    run.step(SAVED_STEP + 1)
    return seen


def resume(kind: str, device: str, out: Path) -> Objects:
    """Restore into other weights, and go on; the same from what torch saved, and compare."""
    run = Run(kind, 2, device)
    client = run.connected()
    # DDP's ranks have buffers of their own, as far as anybody knows who has not seen the model.
    start = client.restore(on_resize={"model/seen": "rank0"} if kind == "zero" else {})
    seen: Objects = {"start": start, "from": client.restored_from, "notes": client.restored_notes}
    seen["restored"] = run.facts()
    state = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state() if device == "cuda" else None
    run.steps(SAVED_STEP + 1, LAST_STEP)
    seen["end"] = run.facts()

    other = Run(kind, 3, device)
    load(other, out)
    seen["loaded"] = other.tensors()
    torch.set_rng_state(state)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device)
    other.steps(SAVED_STEP + 1, LAST_STEP)
    seen["end of loaded"] = other.facts()
    if run.world > 2:  # for nobody restores after these
        seen["committed"] = client.snapshot(LAST_STEP).wait()
    client.close(timeout=0)
    return seen


def load(run: Run, out: Path) -> None:
    """As one does without Everstep."""
    if run.kind == "zero":
        states = torch.load(out / "zero.pt")
        run.bare.load_state_dict(states["model"])
        run.optimizer.load_state_dict(states["optimizer"])
        return
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=out / run.kind)
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("phases", nargs="+", choices=("alone", "save", "resume"))
    parser.add_argument("--kinds", nargs="+", choices=("fsdp", "tensors", "zero"), required=True)
    parser.add_argument("--name", default="", help="of this launch, in the names of files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--linger", action="store_true", help="wait to be killed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.use_deterministic_algorithms(True)
    distributed.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    phases = {"alone": alone, "save": save, "resume": resume}
    for phase in arguments.phases:
        for kind in arguments.kinds:
            facts = phases[phase](kind, arguments.device, arguments.out)
            facts["pid"] = os.getpid()
            name = f"{arguments.name or phase}-{kind}-{distributed.get_rank()}.json"
            partial = arguments.out / f"{name}.partial"
            partial.write_text(json.dumps(facts))
            partial.rename(arguments.out / name)
    if arguments.linger:
        time.sleep(600)
        sys.exit("nobody killed this rank")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
