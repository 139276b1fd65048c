"""A training run of several ranks, started by torchrun: see test_ranks.py for what is asked of it.

Each rank writes what it saw to ``OUT/PHASE-RANK.json``.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn, optim
from torch.nn.parallel import DistributedDataParallel

import everstep
from everstep.proto.errors import DeadlineExceeded

WIDTH = 200
Objects = dict[str, Any]


class Run:
    """One rank's part of the run: equal weights, everything else its own."""

    def __init__(self) -> None:
        rank = distributed.get_rank()
        torch.manual_seed(1)
        layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)]
        # Without this option DDP orders its buckets anew after the first step of a process, and
        # with them the sums of three ranks: no two runs with different starts would be equal.
        model = DistributedDataParallel(nn.Sequential(*layers), find_unused_parameters=True)
        self.objects: Objects = {"model": model, "optimizer": optim.AdamW(model.parameters())}
        self.per_rank: Objects = {"own": {"residual": torch.zeros(50), "rank": -1}}
        torch.manual_seed(100 + rank)

    def step(self) -> None:
        model, optimizer = self.objects["model"], self.objects["optimizer"]
        batch = torch.randn(8, WIDTH)  # from this rank's own generator
        optimizer.zero_grad()
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
        own = self.per_rank["own"]
        own["residual"].add_(batch[0, :50])
        own["rank"] = distributed.get_rank()

    def facts(self) -> Objects:
        model = self.objects["model"].module
        return {
            "weights": digest([*model.parameters()]),
            "buffers": digest([*model.buffers()]),
            "optimizer": digest(self.objects["optimizer"].state_dict()["state"]),
            "residual": digest(self.per_rank["own"]["residual"]),
            "own_rank": self.per_rank["own"]["rank"],
            "generator": digest(torch.get_rng_state()),
        }


def digest(tree: Any) -> str:
    sha = hashlib.sha256()

    def feed(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            flat = part.detach().contiguous().reshape(-1)
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


def connected(job: str, run: Run) -> everstep.Client:
    client = everstep.connect(job, on_busy="wait")
    client.attach(per_rank=run.per_rank, **run.objects)
    return client


def alone(until: int) -> Objects:
    """The run that nothing happens to."""
    run = Run()
    for _ in range(until):
        run.step()
    return run.facts()


def first_launch() -> Objects:
    """Train, snapshot 3 and 7; then a step that only rank 0 captures."""
    run = Run()
    client = connected("ranks", run)
    seen: Objects = {"start": client.restore(), "incarnation": client.incarnation}
    for step in range(1, 10):
        run.step()
        if step in (3, 7):
            handle = client.snapshot(step)
            seen[f"at {step}"] = run.facts()
            seen[f"committed {step}"] = handle.wait()
    if distributed.get_rank() == 0:
        handle = client.snapshot(9)
        try:
            handle.wait(timeout=1.0)
        except DeadlineExceeded as error:
            seen["alone at 9"] = [handle.state, list(error.late)]
    return seen


def drift() -> Objects:
    """A replica that is none any more costs one snapshot; then each rank keeps its own."""
    run = Run()
    client = connected("drift", run)
    run.step()
    seen: Objects = {"before": client.snapshot(1).wait()}
    weight = run.objects["model"].module[2].weight
    if distributed.get_rank() == 1:
        with torch.no_grad():
            weight.mul_(1.5)
    handle = client.snapshot(2)
    seen["drifted"] = [handle.wait(), handle.dropped]
    seen["after"] = client.snapshot(3).wait()
    at_3 = run.facts()
    seen["own weights"] = at_3["weights"]
    run.step()
    seen["rewound to"] = client.rewind()
    seen["same again"] = run.facts() == at_3
    seen["on again"] = client.snapshot(4).wait()
    client.close(timeout=0)
    return seen


def second_launch(until: int) -> Objects:
    """Restore, and go on to the end."""
    run = Run()
    client = connected("ranks", run)
    seen: Objects = {"start": client.restore(), "restored": run.facts()}
    seen["incarnation"] = client.incarnation
    for _ in range(seen["start"], until):
        run.step()
    seen["end"] = run.facts()
    seen["committed"] = client.snapshot(until).wait()
    client.close()
    return seen


def restarted(until: int) -> Objects:
    """Rank 1 dies in the first attempt; torchrun starts all of them again."""
    run = Run()
    client = connected("restarted", run)
    seen: Objects = {"start": client.restore(), "restored": run.facts()}
    for step in range((seen["start"] or 0) + 1, until + 1):
        run.step()
        if step == 4:
            seen["committed"] = client.snapshot(step).wait()
        if step == 6 and seen["start"] is None and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    seen["end"] = run.facts()
    client.close(timeout=0)
    return seen


def write(out: Path, phase: str, facts: Objects) -> None:
    path = out / f"{phase}-{distributed.get_rank()}.json"
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps({"pid": os.getpid(), **facts}))
    temporary.rename(path)


def initialise() -> None:
    """As init_process_group() alone would, but apart from the attempt before a restart.

    torch 2.13 gives all attempts under one torchrun the same store, and with it the addresses of
    processes that are gone.
    """
    environ = os.environ
    store = distributed.TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))
    attempt = distributed.PrefixStore(environ["TORCHELASTIC_RESTART_COUNT"], store)
    rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    distributed.init_process_group("gloo", store=attempt, rank=rank, world_size=world)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("phases", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=int, default=12)
    parser.add_argument("--linger", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    initialise()
    phases = {
        "alone": lambda: alone(arguments.until),
        "first": first_launch,
        "drift": drift,
        "second": lambda: second_launch(arguments.until),
        "restarted": lambda: restarted(arguments.until),
    }
    for phase in arguments.phases:
        write(arguments.out, phase, phases[phase]())
    if arguments.linger:
        time.sleep(600)
        sys.exit("nobody killed this rank")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
