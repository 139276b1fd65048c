"""Hugging Face's Trainer: kill it whenever you like and start it again, or let it kill itself.

    python hf_trainer.py --kill-at 33; python hf_trainer.py

The last line is the same as that of a run that was left alone, with --job another.
"""

import argparse
import hashlib
import os
import signal
import tempfile

import torch
import transformers

import everstep

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--job", default="hf-trainer")
parser.add_argument("--kill-at", type=int, help="kill -9 at this step")
options = parser.parse_args()


class Kill(transformers.TrainerCallback):
    """What a failing node does."""

    def on_step_begin(self, args, state, control, **kwargs):
        """End the process, as if the power were gone."""
        if state.global_step == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


transformers.set_seed(0)
words = torch.randint(0, 64, (120, 16))
model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
)
arguments = transformers.TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    num_train_epochs=4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    logging_steps=10,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)

callback = everstep.HuggingFaceCallback(options.job, interval=5)
trainer = transformers.Trainer(
    model,
    arguments,
    train_dataset=[{"input_ids": row, "labels": row} for row in words],
    callbacks=[callback, Kill()],
)
trainer.train(resume_from_checkpoint=callback.resume_from_checkpoint())

print(f"went on at step {callback.resumed or 0}")
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
print(f"step {trainer.state.global_step}, weights {hashlib.sha256(weights).hexdigest()}")
