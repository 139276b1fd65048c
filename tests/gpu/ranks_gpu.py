"""A training run of two ranks with NCCL, started by torchrun: see test_ddp_gpu.py.

Run with a plain interpreter, so it imports nothing of the tests'. Each rank writes what it saw to
``OUT/PHASE-RANK.json``.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import everstep

WIDTH = 600
Objects = dict[str, Any]


class Run:
    """One rank's part: equal weights and moments, buffers and a residual of its own."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        device = f"cuda:{torch.cuda.current_device()}"
        layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)]
        module = nn.Sequential(*layers).to(device)
        self.model = DistributedDataParallel(module, find_unused_parameters=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.residual = {"residual": torch.zeros(9000, device=device)}
        torch.manual_seed(100 + distributed.get_rank())

    def step(self) -> None:
        batch = torch.randn(64, WIDTH, device=self.residual["residual"].device)
        self.optimizer.zero_grad()
        (self.model(batch) - batch).square().mean().backward()
        self.optimizer.step()
        self.residual["residual"].add_(batch.flatten()[:9000])

    def client(self, job: str) -> everstep.Client:
        client = everstep.connect(job, on_busy="wait")
        per_rank = {"own": self.residual}
        client.attach(per_rank=per_rank, model=self.model, optimizer=self.optimizer)
        return client

    def facts(self) -> Objects:
        module = self.model.module
        return {
            "weights": digest([*module.parameters()]),
            "buffers": digest([*module.buffers()]),
            "optimizer": digest(self.optimizer.state_dict()["state"]),
            "residual": digest(self.residual),
            "generator": digest(torch.cuda.get_rng_state()),
        }


def digest(tree: Any) -> str:
    sha = hashlib.sha256()

    def feed(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            flat = part.detach().cpu().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for value in part.values():
                feed(value)
        elif isinstance(part, list):
            for value in part:
                feed(value)
        else:
            sha.update(repr(part).encode())

    feed(tree)
    return sha.hexdigest()[:16]


def save() -> Objects:
    """Train; snapshots while it goes on, and one whose facts are kept."""
    run = Run(1)
    client = run.client("ddp")
    for step in range(1, 9):
        run.step()
        handle = client.snapshot(step)
    facts = run.facts()
    seen: Objects = {"at 8": facts, "committed": handle.wait()}
    run.step()
    client.close(timeout=0)
    return seen


def drift() -> Objects:
    """A replica that is none any more costs one snapshot; then each rank keeps its own."""
    run = Run(2)
    client = run.client("drift")
    run.step()
    seen: Objects = {"before": client.snapshot(1).wait()}
    weight = run.model.module[2].weight
    if distributed.get_rank() == 1:
        with torch.no_grad():
            weight.mul_(1.5)
    handle = client.snapshot(2)
    seen["drifted"] = [handle.wait(), handle.dropped]
    seen["after"] = client.snapshot(3).wait()
    at_3 = run.facts()
    run.step()
    seen["rewound to"] = client.rewind()
    seen["same again"] = run.facts() == at_3
    client.close(timeout=0)
    return seen


def load() -> Objects:
    """Restore into other weights."""
    run = Run(3)
    client = run.client("ddp")
    seen: Objects = {"start": client.restore(), "restored": run.facts()}
    run.step()
    seen["committed"] = client.snapshot(9).wait()
    client.close(timeout=0)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("phases", nargs="+", choices=("save", "drift", "load"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl")
    phases = {"save": save, "drift": drift, "load": load}
    for phase in arguments.phases:
        facts = phases[phase]()
        path = arguments.out / f"{phase}-{distributed.get_rank()}.json"
        path.write_text(json.dumps(facts))
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
