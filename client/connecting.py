"""Making a client: which rank this process is, and which agent it talks to.

Owns the checks of what `connect` is given, and nothing of what follows. Promises that a wrong
argument is refused before anybody else hears of this process.
"""

import torch

from everstep.client import environment
from everstep.client.client import Client
from everstep.client.launching import find_agent
from everstep.client.limits import Limits
from everstep.proto.errors import Refused
from everstep.proto.ids import checked_name


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
        address, job, launch, interval, nvme_interval, on_busy, limits, live_join=live_join
    )
