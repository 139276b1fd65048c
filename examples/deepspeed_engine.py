"""DeepSpeed: kill it whenever you like and start it again, or let it kill itself.

    python deepspeed_engine.py --kill-at 33; python deepspeed_engine.py

The last line is the same as that of a run that was left alone, with --job another.
"""

import argparse
import hashlib
import os
import signal
import tempfile
from pathlib import Path

import deepspeed
import torch

import everstep

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--job", default="deepspeed-engine")
parser.add_argument("--kill-at", type=int, help="kill -9 at this step")
options = parser.parse_args()

STEPS = 60
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}

# One process on a CPU, without a launcher, and nothing to compile for several.
os.environ.setdefault("LOCAL_RANK", "0")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(
    "gloo", auto_mpi_discovery=False, init_method="tcp://127.0.0.1:0", rank=0, world_size=1
)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)

# Where DeepSpeed would write its files; here it holds a few bytes a checkpoint, and may be lost.
directory = str(Path(tempfile.gettempdir(), f"deepspeed-{options.job}"))
checkpoints = everstep.DeepSpeedCheckpointEngine(options.job)
checkpoints.install(engine)
if checkpoints.resume(directory):
    engine.load_checkpoint(directory)
print(f"goes on at step {engine.global_steps}")
while engine.global_steps < STEPS:
    if engine.global_steps == options.kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(engine.gradient_accumulation_steps()):
        x = torch.randn(8, 16)
        loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
    if engine.global_steps % 5 == 0:
        engine.save_checkpoint(directory)
checkpoints.cleanup()

weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
print(f"step {engine.global_steps}, weights {hashlib.sha256(weights).hexdigest()}")
torch.distributed.destroy_process_group()
