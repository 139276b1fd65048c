"""One rank of a training run over several nodes, to be killed: python cluster_trainer.py --help.

RANK, WORLD_SIZE and EVERSTEP_AGENT say who and where it is. Every step is a function of the state
before it alone, so that a run which was interrupted ends like one that was not. Says one JSON
object a line. Run by the tests with a plain interpreter, so it imports nothing of theirs.
"""

import argparse
import hashlib
import json
import os
import sys
from typing import Any

import torch
from torch import nn, optim

import everstep
from everstep.proto.errors import EverstepError

Objects = dict[str, Any]


class Run:
    """A rank's own part, larger with the rank, and one that is equal on all ranks."""

    def __init__(self, rank: int, width: int) -> None:
        torch.manual_seed(1)
        self.shared = nn.Linear(width, width)
        torch.manual_seed(100 + rank)
        self.own = nn.Linear(width, width + 16 * rank)
        self.optimizer = optim.AdamW(self.own.parameters(), lr=0.01)
        self.shared_optimizer = optim.SGD(self.shared.parameters(), lr=0.01, momentum=0.9)
        self.counts: Objects = {"steps": 0}
        self._width = width

    def objects(self) -> Objects:
        return {
            "shared": self.shared,
            "shared_optimizer": self.shared_optimizer,
            "counts": self.counts,
        }

    def per_rank(self) -> Objects:
        return {"own": self.own, "optimizer": self.optimizer}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.own(torch.randn(4, self._width)).square().mean().backward()
        self.optimizer.step()
        # Equal on all ranks: as after an all-reduce.
        seed = self.counts["steps"]
        same = torch.Generator().manual_seed(seed)
        self.shared_optimizer.zero_grad()
        self.shared(torch.randn(4, self._width, generator=same)).square().mean().backward()
        self.shared_optimizer.step()
        self.counts["steps"] = seed + 1

    def digest(self) -> str:
        """Of every bit."""
        sha = hashlib.sha256(repr(self.counts).encode())
        for thing in (self.own, self.optimizer, self.shared, self.shared_optimizer):
            _feed(sha, thing.state_dict())
        _feed(sha, torch.get_rng_state())
        return sha.hexdigest()[:16]


def _feed(sha: Any, tree: Any) -> None:
    if isinstance(tree, torch.Tensor):
        sha.update(tree.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(tree, dict):
        for key, value in tree.items():
            sha.update(repr(key).encode())
            _feed(sha, value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            _feed(sha, value)
    else:
        sha.update(repr(tree).encode())


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", default="gpt")
    parser.add_argument("--until", type=int, required=True, help="the last step")
    parser.add_argument("--width", type=int, default=96, help="of the layers; 600: some MiB")
    parser.add_argument("--level", default="memory", help="each step is awaited at this level")
    parser.add_argument("--nvme-interval", type=int, help="steps between flushes")
    parser.add_argument("--timeout-s", type=float, default=30.0)
    parser.add_argument("--alone", action="store_true", help="train without Everstep")
    parser.add_argument("--no-restore", action="store_true", help="begin at step 0")
    parser.add_argument("--linger", action="store_true", help="stay attached until stdin ends")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    run = Run(rank, arguments.width)
    if arguments.alone:
        for _ in range(arguments.until):
            run.step()
        say(event="end", step=arguments.until, digest=run.digest())
        return
    more = {} if arguments.nvme_interval is None else {"nvme_interval": arguments.nvme_interval}
    client = everstep.connect(arguments.job, on_busy="wait", **more)
    client.attach(per_rank=run.per_rank(), **run.objects())
    start = None if arguments.no_restore else client.restore()
    say(event="start", step=start, incarnation=client.incarnation, digest=run.digest())
    for step in range((start or 0) + 1, arguments.until + 1):
        run.step()
        handle = client.snapshot(step)
        digest = run.digest()
        problem = ""
        try:
            committed = handle.wait(level=arguments.level, timeout=arguments.timeout_s)
        except EverstepError as error:
            committed, problem = False, str(error)
        say(event="step", step=step, digest=digest, committed=committed, problem=problem)
    say(event="end", step=arguments.until, digest=run.digest())
    if arguments.linger:
        sys.stdin.read()
    client.close()


if __name__ == "__main__":
    main()
