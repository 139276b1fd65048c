"""The process: arguments in, a snapshot made through the agent, one JSON document out."""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from everstep.client import rng
from everstep.client.client import Client
from everstep.client.connecting import connect
from everstep.client.importing.dcp_directory import read_dcp
from everstep.client.importing.parts import about, chosen, part_of
from everstep.client.importing.safetensors_files import read_safetensors
from everstep.client.importing.sources import FORMATS, format_of
from everstep.client.importing.torch_file import read_torch
from everstep.client.limits import Limits
from everstep.proto.errors import (
    AgentUnavailable,
    EverstepError,
    NothingRecoverable,
    Refused,
    Retryable,
)

_READERS = {"dcp": read_dcp, "safetensors": read_safetensors, "torch": read_torch}
_SEED = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one import; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m everstep.client.importing")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--agent", default=None)
    parser.add_argument("--format", choices=FORMATS, default="auto")
    parser.add_argument("--part", action="append", default=[])
    parser.add_argument("--step", type=int, default=None)
    parser.add_argument("--timeout-s", type=float, default=3600.0)
    asked = parser.parse_args(arguments)
    # Libraries may print; the document must stay alone.
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        report = imported(
            asked.source,
            asked.job,
            form=asked.format,
            parts=asked.part,
            step=asked.step,
            agent=asked.agent,
            timeout_s=asked.timeout_s,
        )
    except EverstepError as error:
        failure = {"type": type(error).__name__, "message": str(error)}
        if isinstance(error, AgentUnavailable):
            failure |= {"address": error.address, "detail": error.detail}
        stdout.write(json.dumps({"error": failure}) + "\n")
        return 2 if isinstance(error, Refused) else 1
    stdout.write(json.dumps(report) + "\n")
    return 0


def imported(
    source: Path,
    job: str,
    *,
    form: str = "auto",
    parts: Sequence[str] = (),
    step: int | None = None,
    agent: str | None = None,
    timeout_s: float = 3600.0,
) -> dict[str, Any]:
    """Make a first snapshot of a checkpoint.

    Args:
        source: A file or directory.
        job: That has no snapshot yet.
        form: One of `FORMATS`.
        parts: What of it; see `client.importing.parts.chosen`.
        step: The snapshot's; by default what an export of ours says, else 0.
        agent: Its address; by default this user's own, which is started if need be.
        timeout_s: How long the snapshot may take.

    Returns:
        What was imported.

    Raises:
        Refused: If the job has snapshots, or the checkpoint cannot be imported. Nothing was.
        FormatInvalid: If the checkpoint is damaged. Nothing was imported.
        NotPersisted: If it is in memory, and could not be written to NVMe.
    """
    form = format_of(source) if form == "auto" else form
    tree = _READERS[form](source)
    said, generators = about(tree)
    attached = [part_of(name, below) for name, below in chosen(tree, parts).items()]
    if step is None:
        step = int(said.get("step", 0))
    limits = Limits(offer_s=30.0, setup_s=timeout_s, seal_s=timeout_s, close_s=timeout_s)
    with connect(job, agent=agent, rank=0, world=1, limits=limits) as client:
        _check_first(client, attached[0].name)
        client.attach(
            placement={part.name: part.place for part in attached},
            **{part.name: part.target for part in attached},
        )
        _set_generators(generators)
        levels = _committed(client, step, timeout_s)
    return {
        "job": job,
        "step": step,
        "source": str(source.absolute()),
        "format": form,
        "levels": levels,
        "parts": [
            {"name": p.name, "kind": p.kind, "tensors": p.tensors, "bytes": p.nbytes}
            for p in attached
        ],
        "tensors": sum(part.tensors for part in attached),
        "bytes": sum(part.nbytes for part in attached),
    }


def _check_first(client: Client, name: str) -> None:
    try:
        there = client.peek(name)
    except NothingRecoverable as error:
        raise Refused(f"job {client.job!r} has snapshots: {error} Nothing was imported.") from error
    if there is not None:
        raise Refused(
            f"job {client.job!r} has a snapshot of step {there[0]} already, and an import makes a "
            "first one. Choose another name, or free the job with `everstep gc --job ... --all`. "
            "Nothing was imported."
        )


def _set_generators(states: dict[str, Any]) -> None:
    """Those of an export of ours, else the same for every import: each snapshot has some."""
    random.seed(_SEED)
    numpy.random.seed(_SEED)
    torch.manual_seed(_SEED)
    if states:
        rng.restore(states)


def _committed(client: Client, step: int, timeout_s: float) -> list[str]:
    """Take the snapshot; the levels that have it."""
    handle = client.snapshot(step, force=True)
    if not handle.wait("memory", timeout=timeout_s):
        why = handle.skipped or handle.dropped
        raise Retryable(f"the agent did not take the snapshot: {why}. Nothing was imported.")
    levels = ["memory"]
    try:
        if handle.wait("nvme", timeout=timeout_s):
            levels.append("nvme")
    except Refused:
        pass  # this agent has no such level
    return levels


if __name__ == "__main__":
    sys.exit(main())
