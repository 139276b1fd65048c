"""Making a client: which rank this process is, and which agent it talks to.

Owns the checks of what `connect` is given, and nothing of what follows. Promises that a wrong
argument is refused before anybody else hears of this process.
"""

from typing import Literal

import torch

from everstep.client import environment
from everstep.client.client import Client
from everstep.client.launching import find_agent
from everstep.client.limits import Limits
from everstep.proto.errors import Refused
from everstep.proto.ids import checked_name
from everstep.snapshot.device import DeviceOptions

_MOST_IN_FLIGHT = 6
"""An agent has eight slots at most: these, the newest commit, and one that is flushed."""


def connect(
    job: str,
    interval: int = 1,
    *,
    agent: str | None = None,
    rank: int | None = None,
    world: int | None = None,
    launch_id: str | None = None,
    nvme_interval: int | None = None,
    on_busy: str = "skip",
    live_join: bool = False,
    scratch_bytes: int | None = None,
    incremental: bool = False,
    digests: Literal["device", "host"] = "device",
    captures_in_flight: int | None = None,
    limits: Limits | None = None,
) -> Client:
    """Connect this trainer to its node's agent, starting one if there is none.

    Args:
        job: The run's name; restarts of the same run use the same name.
        interval: `Client.snapshot` acts at every step that this divides.
        agent: ``unix:/path`` of the agent's socket. By default ``EVERSTEP_AGENT``, else this
            user's own agent under ``EVERSTEP_HOME``, which outlives the trainer.
        rank: This process's number; by default from torch.distributed, torchrun or Slurm.
        world: How many processes the job has; likewise.
        launch_id: Equal on all ranks of one launch and different in the next; likewise.
        nvme_interval: Flush to NVMe every so many steps, instead of the agent's own interval.
        on_busy: "skip" a snapshot when the one before it is still being copied or flushed, or
            "wait" for it, bounded.
        live_join: If the job's other ranks are running, take this rank over from a process that
            is gone, while they go on: see docs/live-join.md. If they are not, this is an ordinary
            start.
        scratch_bytes: The most device memory, on each device, for clones of what an optimizer's
            step would overtake; 0 for none. By default half of what is free then.
        incremental: Leave out what the slot holds already, megabyte by megabyte, of what is on an
            accelerator.
        digests: Who digests what is on an accelerator: the "device", or the "host" after the copy.
        captures_in_flight: How many snapshots may be copied at once, 1 to 6, each with a slot of
            its own; by default 2 if anything attached is on an accelerator, else 1.
        limits: How long to wait for what.

    Returns:
        A client, attached to the agent as one rank of the job.

    Raises:
        InvalidName: If the job's name is no plain name.
        RankClaimed: If another living process is this rank of this job.
        Refused: If a rank would join live with another world than is running.
        AgentUnavailable: If no agent answers.
    """
    checked_name("job", job)
    if on_busy not in ("skip", "wait"):
        raise Refused(f"on_busy={on_busy!r}: say 'skip' or 'wait'.")
    if interval < 1 or (nvme_interval is not None and nvme_interval < 1):
        raise Refused("interval and nvme_interval count steps: give 1 or more.")
    options = _options(scratch_bytes, incremental, digests, captures_in_flight)
    distributed = torch.distributed
    if (
        rank is None
        and world is None
        and distributed.is_available()
        and distributed.is_initialized()
    ):
        rank, world = distributed.get_rank(), distributed.get_world_size()
    limits = limits or Limits()
    launch = environment.launch(rank, world, launch_id=launch_id)
    address = find_agent(agent, limits.agent_start_s)
    return Client(
        address,
        job,
        launch,
        interval,
        nvme_interval,
        on_busy,
        limits,
        live_join=live_join,
        options=options,
        captures_in_flight=captures_in_flight,
    )


def _options(
    scratch_bytes: int | None,
    incremental: bool,
    digests: Literal["device", "host"],
    captures_in_flight: int | None,
) -> DeviceOptions:
    if scratch_bytes is not None and scratch_bytes < 0:
        raise Refused(f"scratch_bytes={scratch_bytes}: give 0 or more, or None to choose.")
    if digests not in ("device", "host"):
        raise Refused(f"digests={digests!r}: say 'device' or 'host'.")
    if captures_in_flight is not None and not 1 <= captures_in_flight <= _MOST_IN_FLIGHT:
        raise Refused(
            f"captures_in_flight={captures_in_flight}: give 1 to {_MOST_IN_FLIGHT}, or None."
        )
    return DeviceOptions(scratch_bytes=scratch_bytes, incremental=incremental, digests=digests)
