"""One rank of the demo's cluster job, as a process: ``python -m everstep.client.demo.rank``.

Owns the training loop of a rank and what it notes in its diary. Promises that everything it does
follows from the seed and the number of ranks. Without `--interval` it trains without Everstep:
that is the run which the others are compared with.
"""

import argparse
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.client.demo.diary import Diary
from everstep.client.demo.slices import SlicedTraining
from everstep.client.handle import Snapshot
from everstep.proto.errors import DeadlineExceeded, Refused

JOB = "demo"
_COLLECTIVE_TIMEOUT_S = 120
_PARITY_WAIT_S = 60.0
_LAST_PARITY_WAIT_S = 20.0


def train(options: argparse.Namespace) -> None:
    """Train from where the newest snapshot is, or from the start, to the end."""
    diary = Diary(options.directory / f"{options.name}-{options.rank}.jsonl")
    diary.note("imported")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{options.meeting}",
        rank=options.rank,
        world_size=options.world,
        timeout=timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
    )
    training = SlicedTraining(options.rank, options.world, options.steps, options.seed)
    diary.note("built", parameters=training.parameters)
    if options.interval:
        _train_with_snapshots(training, diary, options)
    else:
        for step in range(options.steps):
            diary.note("step", step=step + 1, loss=training.step())
    diary.note("ended", digest=training.digest())
    # Whoever leaves first must not cut off those who are still in the last step.
    distributed.barrier()
    distributed.destroy_process_group()


def _train_with_snapshots(
    training: SlicedTraining, diary: Diary, options: argparse.Namespace
) -> None:
    client = connect(JOB, options.interval, nvme_interval=options.nvme_interval)
    training.attach_to(client)
    diary.note("connected")
    start = client.restore()
    diary.note("restored", step=start, levels=client.restored_from, rejected=client.rejected)
    pending: list[Snapshot] = []
    first = start is None
    for step in range(start or 0, options.steps):
        loss = training.step()
        diary.note("step", step=step + 1, loss=loss)
        handle = client.snapshot(step + 1)
        if not handle.skipped:
            pending.append(handle)
            if first:
                # One round by itself, so that what it sends can be told.
                first = not handle.wait("parity", _PARITY_WAIT_S)
        pending = _noted(pending, diary)
    _await_the_last(pending)
    _noted(pending, diary)
    _close(client, diary)


def _await_the_last(pending: list[Snapshot]) -> None:
    """The run may be over before its last steps are protected, and nobody would know of it. The
    newest of them may be given up, on a busy machine: then the one before it counts."""
    deadline = time.monotonic() + _LAST_PARITY_WAIT_S
    for handle in reversed(pending):
        with suppress(DeadlineExceeded, Refused):
            if handle.wait("parity", max(0.0, deadline - time.monotonic())):
                return


def _noted(pending: list[Snapshot], diary: Diary) -> list[Snapshot]:
    """Note what has become of the newest snapshots; those of which there is more to come."""
    left = []
    for handle in pending[-8:]:
        if handle.done("parity"):
            diary.note("protected", step=handle.step)
        elif not handle.dropped:
            left.append(handle)
    return left


def _close(client: Client, diary: Diary) -> None:
    client.close()
    stats = client.stats
    diary.note(
        "closed",
        taken=stats.taken,
        committed=stats.committed,
        dropped=stats.dropped,
        skipped=stats.skipped,
        stall_s=stats.stall_s - stats.setup_s,
    )


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(prog="python -m everstep.client.demo.rank")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--meeting", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--interval", type=int, default=0)
    parser.add_argument("--nvme-interval", type=int)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
