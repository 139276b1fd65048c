"""A training run as a process of its own, to be killed: python trainer.py --help.

Run by the tests with a plain interpreter, so it imports nothing of theirs.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torchdata.stateful_dataloader import StatefulDataLoader

import everstep

Objects = dict[str, Any]
CASES: dict[str, Callable[[Any], optim.Optimizer]] = {
    "adamw": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "lbfgs": lambda p: optim.LBFGS(p, max_iter=2, history_size=3),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.hidden = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.drop(self.norm(self.hidden(self.embed(tokens)))))
        return out


class Run:
    """Everything that is attached, and the loop over it."""

    def __init__(self, case: str, seed: int) -> None:
        torch.manual_seed(seed)
        model = Model()
        optimizer = CASES[case](model.parameters())
        self.objects: Objects = {
            "model": model,
            "optimizer": optimizer,
            "scheduler": lr_scheduler.OneCycleLR(
                optimizer, 0.05, total_steps=100, cycle_momentum=case != "lbfgs"
            ),
            "loader": StatefulDataLoader(list(range(40)), 8, shuffle=True),
            "progress": {"step": 0, "loss": 0.0, "seen": []},
        }
        self.batches: Any = None

    def step(self) -> None:
        model, optimizer = self.objects["model"], self.objects["optimizer"]
        tokens = self._next_batch()
        losses = []

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 40)
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
        self.objects["scheduler"].step()
        progress = self.objects["progress"]
        progress["step"] += 1
        progress["loss"] = losses[-1]
        progress["seen"] = [*progress["seen"][-5:], *tokens.tolist()]

    def _next_batch(self) -> torch.Tensor:
        while True:
            if self.batches is None:
                self.batches = iter(self.objects["loader"])
            batch: torch.Tensor | None = next(self.batches, None)
            if batch is not None:
                return batch
            self.batches = None

    def digest(self) -> str:
        """Of every bit of the state but the loader's own words for it."""
        digest = hashlib.sha256()
        for name in ("model", "optimizer", "scheduler", "progress"):
            thing = self.objects[name]
            _feed(digest, thing.state_dict() if hasattr(thing, "state_dict") else thing)
        _feed(digest, torch.get_rng_state())
        return digest.hexdigest()


def _feed(digest: Any, tree: Any) -> None:
    if isinstance(tree, torch.Tensor):
        digest.update(f"{tree.dtype}{list(tree.shape)}".encode())
        digest.update(tree.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(tree, dict):
        for key, value in tree.items():
            digest.update(repr(key).encode())
            _feed(digest, value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            _feed(digest, value)
    else:
        digest.update((tree.hex() if isinstance(tree, float) else repr(tree)).encode())


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--until", type=int, required=True)
    parser.add_argument("--snapshot-at", type=int, nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="train without Everstep")
    parser.add_argument("--linger", action="store_true", help="wait to be killed at the end")
    parser.add_argument("--close", action="store_true", help="close the clients at the end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clients = []
    for case in arguments.cases:
        run = Run(case, arguments.seed)
        start = None
        if not arguments.alone:
            client = everstep.connect(f"job-{case}", on_busy="wait")
            clients.append(client)
            client.attach(**run.objects)
            start = client.restore()
        handles = []
        for step in range((start or 0) + 1, arguments.until + 1):
            run.step()
            if step in arguments.snapshot_at and not arguments.alone:
                handles.append(client.snapshot(step))
        committed = [handle.step for handle in handles if handle.wait()]
        say(case=case, start=start, committed=committed, digest=run.digest())
    if arguments.linger:
        sys.stdin.read()
    if arguments.close:
        for client in clients:
            client.close()


if __name__ == "__main__":
    main()
