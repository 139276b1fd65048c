"""Accelerate: kill it whenever you like and start it again, or let it kill itself.

    python accelerate_loop.py --kill-at 33; python accelerate_loop.py

The last line is the same as that of a run that was left alone, with --job another.
"""

import argparse
import hashlib
import os
import signal

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import everstep

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--job", default="accelerate-loop")
parser.add_argument("--kill-at", type=int, help="kill -9 at this step")
options = parser.parse_args()

EPOCHS = 4
BATCHES = 40
ACCUMULATED = 2
STEPS_PER_EPOCH = BATCHES // ACCUMULATED

set_seed(0)
accelerator = Accelerator(
    cpu=True,
    gradient_accumulation_steps=ACCUMULATED,
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
)
model = torch.nn.Sequential(
    torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(TensorDataset(torch.randn(4 * BATCHES, 16)), batch_size=4, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

checkpointer = everstep.AccelerateCheckpointer(accelerator, options.job, interval=5)
start = step = checkpointer.load_state() or 0
print(f"goes on at step {step}")
for epoch in range(start // STEPS_PER_EPOCH, EPOCHS):
    loader.set_epoch(epoch)
    batches = loader
    if epoch == start // STEPS_PER_EPOCH:
        skipped = start % STEPS_PER_EPOCH * ACCUMULATED
        batches = checkpointer.skip_first_batches(loader, skipped)
    for (x,) in batches:
        if step == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with accelerator.accumulate(model):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            checkpointer.save_state(step)
    print(f"epoch {epoch}, step {step}, loss {loss.item():.4f}", flush=True)
checkpointer.end_training()
accelerator.end_training()

weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
print(f"step {step}, weights {hashlib.sha256(weights).hexdigest()}")
