"""Storage for `torch.distributed.checkpoint`: its writer and its reader over Everstep's levels.

Public names are re-exported by `everstep.dcp`.
"""

from everstep.client.dcp.connection import close
from everstep.client.dcp.reader import EverstepReader
from everstep.client.dcp.writer import EverstepWriter

__all__ = ["EverstepReader", "EverstepWriter", "close"]
