"""A training run on a device as a process of its own, to be killed: python gpu_trainer.py --help.

Run by the tests with a plain interpreter, so it imports nothing of theirs. Says first what it
restored, then for each step the digest of its state, before that step's snapshot is begun.
"""

import argparse
import hashlib
import json
from typing import Any

import torch
from torch import nn

import everstep


def digest_of(objects: dict[str, Any]) -> str:
    """Of every bit of the weights and moments."""
    digest = hashlib.sha256()
    for thing in objects.values():
        for tensor in _tensors(thing.state_dict()):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in _tensors(value)]
    return []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--agent", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--until", type=int, default=100_000)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 700), nn.GELU(), nn.Linear(700, 700)).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    objects = {"model": model, "optimizer": optimizer}
    client = everstep.connect(options.job, agent=options.agent, rank=0, world=1, on_busy="wait")
    client.attach(**objects)
    restored = client.restore()
    print(json.dumps({"restored": restored, "digest": digest_of(objects)}), flush=True)
    committed: list[everstep.Snapshot] = []
    for step in range((restored or 0) + 1, options.until + 1):
        batch = torch.randn(64, 700, device="cuda")
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        digest = digest_of(objects)
        newest = max((handle.step for handle in committed if handle.done()), default=0)
        print(json.dumps({"step": step, "digest": digest, "committed": newest}), flush=True)
        committed = [*committed[-8:], client.snapshot(step)]
    if committed:
        committed[-1].wait()
    client.close(timeout=0)


if __name__ == "__main__":
    main()
