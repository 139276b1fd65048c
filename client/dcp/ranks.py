"""Who a process is to `torch.distributed.checkpoint`, and so to Everstep.

Owns the rule. Promises that a save or a load among other ranks than those of the job is refused: it
would wait for ranks that never come.
"""

import torch

from everstep.client.dcp.connection import Address
from everstep.proto.errors import Refused


def address_of(job: str, agent: str | None, rank: int | None, world: int | None) -> Address:
    """As given, else by torch.distributed, else alone: the environment says nothing, as for DCP.

    Raises:
        Refused: If only one of rank and world is given.
    """
    if (rank is None) != (world is None):
        raise Refused("give both rank= and world=, or neither.")
    if rank is not None and world is not None:
        return Address(job, agent, rank, world)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return Address(job, agent, distributed.get_rank(), distributed.get_world_size())
    return Address(job, agent, 0, 1)


def check_rank(address: Address, rank: int | None) -> None:
    """Return only if DCP's number of this rank, where it tells, is the job's.

    Raises:
        Refused: If it is another: `process_group=` or `no_dist=` was given.
    """
    if rank is not None and rank != address.rank:
        raise Refused(
            f"this is rank {rank} to torch.distributed.checkpoint, and rank {address.rank} of "
            f"{address.world} to job {address.job!r}. Nothing was saved or loaded. With "
            "process_group= or no_dist=, give rank= and world= of that group here as well, and a "
            "job of its own to each group."
        )
