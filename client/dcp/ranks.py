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
        Refused: If it is another.
    """
    if rank is not None and rank != address.rank:
        raise _other_ranks(
            address, f"this is rank {rank}", f"rank {address.rank} of {address.world}"
        )


def check_world(address: Address, world: int) -> None:
    """Return only if DCP has as many ranks as the job.

    Raises:
        Refused: If it has not.
    """
    if world != address.world:
        raise _other_ranks(address, f"there are {world} rank(s)", str(address.world))


def _other_ranks(address: Address, theirs: str, ours: str) -> Refused:
    return Refused(
        f"{theirs} to torch.distributed.checkpoint, and {ours} to job {address.job!r}. Nothing was "
        "saved or loaded. With process_group= or no_dist=, give writer and reader the rank= and "
        "world= of that group, and each group a job of its own."
    )
