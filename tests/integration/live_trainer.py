"""One rank that trains on by itself, whoever else is there: python live_trainer.py --help.

RANK, WORLD_SIZE and EVERSTEP_AGENT say who and where it is. The wrapped model is equal on all ranks
at every step, as after an all-reduce, though no rank ever waits for another: what a step does is a
function of its number. So a rank that joins knows what the others have. Steps are begun by lines
on stdin, each the number of the step; says one JSON object a line. Run by the tests with a plain
interpreter, so it imports nothing of theirs.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from typing import Any

import torch
from torch import distributed, nn, optim
from torch.nn.parallel import DistributedDataParallel

import everstep

Objects = dict[str, Any]


class Run:
    """A replicated part, and one of this rank's own."""

    def __init__(self, rank: int, width: int) -> None:
        torch.manual_seed(1)
        self.model = DistributedDataParallel(nn.Linear(width, width))
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        torch.manual_seed(100 + rank)
        self.own: Objects = {"residual": torch.randn(1000), "steps": 0}
        self._width = width

    def step(self, step: int) -> None:
        same = torch.Generator().manual_seed(step)
        self.optimizer.zero_grad()
        self.model(torch.randn(4, self._width, generator=same)).square().mean().backward()
        self.optimizer.step()
        self.own["residual"] += 1.0
        self.own["steps"] = step

    def facts(self) -> Objects:
        """Digests of what is replicated, and of what is not."""
        momentum = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        shared = [*self.model.parameters(), *momentum]
        return {
            "shared": _digest(shared),
            "own": _digest([self.own["residual"]]),
            "steps": self.own["steps"],
        }


def _digest(tensors: list[torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", default="live")
    parser.add_argument("--width", type=int, default=64, help="of the model; 1000: 8 MB")
    parser.add_argument("--live", action="store_true", help="join live")
    parser.add_argument("--on-busy", default="skip")
    parser.add_argument("--wait-s", type=float, default=0.0, help="for each commit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Alone in its group: the wrapper says what is replicated, nothing else is wanted of it.
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    run = Run(rank, arguments.width)
    client = everstep.connect(
        arguments.job,
        rank=rank,
        world=world,
        on_busy=arguments.on_busy,
        live_join=arguments.live,
    )
    client.attach(per_rank={"own": run.own}, model=run.model, optimizer=run.optimizer)
    say(event="attached", joined=client.joined, incarnation=client.incarnation)
    begun = time.monotonic()
    try:
        start = client.restore()
    except everstep.errors.EverstepError as error:
        say(event="refused", kind=type(error).__name__, text=str(error))
        return
    facts = run.facts()
    say(event="start", step=start, took_s=time.monotonic() - begun, **facts)
    for line in sys.stdin:
        step = int(line)
        run.step(step)
        begun = time.monotonic()
        handle = client.snapshot(step)
        stalled_s = time.monotonic() - begun
        problem = ""
        if arguments.wait_s and not handle.skipped:
            try:
                handle.wait(timeout=arguments.wait_s)
            except everstep.errors.EverstepError as error:
                problem = str(error)
        say(
            event="step",
            step=step,
            stalled_s=stalled_s,
            state=handle.state,
            why=handle.skipped or handle.dropped or problem,
            incarnation=client.incarnation,
            **run.facts(),
        )
    client.close(timeout=0)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
