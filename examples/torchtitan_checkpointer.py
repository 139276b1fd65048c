"""torchtitan's components: kill it whenever you like and start it again, or let it kill itself.

    python torchtitan_checkpointer.py --kill-at 33; python torchtitan_checkpointer.py

The last line is the same as that of a run that was left alone, with --job another. In torchtitan's
own Trainer, which wants an accelerator, one assignment does it:

    config.checkpoint = everstep.TorchTitanCheckpointManager.Config(enable=True, job="llama")
"""

import argparse
import hashlib
import os
import signal

import torch
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)

import everstep

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--job", default="torchtitan-checkpointer")
parser.add_argument("--kill-at", type=int, help="kill -9 at this step")
options = parser.parse_args()

STEPS = 60


class Trainer:
    """The part of torchtitan's that has to do with checkpoints, call by call."""

    def __init__(self, checkpoint):
        torch.manual_seed(0)
        self.step = 0
        self.model = torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)
        )
        adamw = ParamGroupConfig(
            pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}
        )
        self.optimizers = OptimizersContainer.Config(
            param_groups=[adamw], implementation="for-loop"
        ).build(model_parts=[self.model])
        self.lr_schedulers = LRSchedulersContainer.Config(warmup_steps=10).build(
            optimizers=self.optimizers, training_steps=STEPS
        )
        self.checkpointer = checkpoint.build(
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            states={"train_state": self},
            sd_adapter=None,
        )

    def state_dict(self):
        """What the Trainer itself keeps."""
        return {"step": self.step}

    def load_state_dict(self, state):
        """Take it back."""
        self.step = state["step"]

    def train(self):
        """Load, then step and save, then close."""
        self.checkpointer.load(step=-1)
        print(f"goes on at step {self.step}")
        while self.step < STEPS:
            if self.step == options.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.step += 1
            self.optimizers.zero_grad()
            x = torch.randn(8, 16)
            (self.model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            self.checkpointer.maybe_wait_for_staging()
            self.optimizers.step()
            self.lr_schedulers.step()
            self.checkpointer.save(self.step, last_step=self.step == STEPS)
        self.checkpointer.close()


checkpoint = everstep.TorchTitanCheckpointManager.Config(enable=True, job=options.job, interval=5)
trainer = Trainer(checkpoint)
trainer.train()

weights = b"".join(tensor.detach().numpy().tobytes() for tensor in trainer.model.parameters())
print(f"step {trainer.step}, weights {hashlib.sha256(weights).hexdigest()}")
