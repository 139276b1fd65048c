"""What the server of the resharding benchmark's ranks has imported when it forks one.

All that building a sharded model imports, too, as late as that may be.
"""

import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor.parallel

import benchmarks.reshard_ranks
import everstep.client.connecting

__all__ = ["benchmarks", "everstep", "torch"]
