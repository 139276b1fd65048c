"""Lightning: kill it whenever you like and start it again, or let it kill itself.

    python lightning_fit.py --kill-at 33; python lightning_fit.py

The last line is the same as that of a run that was left alone, with --job another.
"""

import argparse
import hashlib
import os
import signal

import lightning
import torch
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import everstep

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--job", default="lightning-fit")
parser.add_argument("--kill-at", type=int, help="kill -9 at this step")
options = parser.parse_args()


class Module(lightning.LightningModule):
    """Learns to add."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)
        )

    def training_step(self, batch, index):
        """One batch; at one of them, what a failing node does."""
        if self.global_step == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        (x,) = batch
        return (self.layers(x) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        """The usual."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


lightning.seed_everything(0)
module = Module()
# This loader can say where it is; a plain one goes on between epochs only.
loader = StatefulDataLoader(TensorDataset(torch.randn(160, 16)), batch_size=8, shuffle=True)

callback = everstep.LightningCallback(options.job, interval=5)
trainer = lightning.Trainer(
    max_epochs=4,
    callbacks=[callback],
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(module, loader)

print(f"went on at step {callback.resumed or 0}")
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in module.parameters())
print(f"step {trainer.global_step}, weights {hashlib.sha256(weights).hexdigest()}")
