"""Checkpoints of `torch.distributed.checkpoint` over Everstep's levels.

    import torch.distributed.checkpoint as dcp
    from everstep.dcp import EverstepReader, EverstepWriter

    dcp.save(state, storage_writer=EverstepWriter("gpt"), checkpoint_id=step)
    dcp.load(state, storage_reader=EverstepReader("gpt"))

See docs/dcp.md.
"""

from everstep.client.dcp import EverstepReader, EverstepWriter, close

__all__ = ["EverstepReader", "EverstepWriter", "close"]
