"""What the optimizers train: a byte-level GPT on the sources of Python's standard library.

Owns the text, the model and one run. Promises that a run depends on its seed, its optimizer and the
device alone: the text is in sorted order and split by file, every batch and every initial weight
comes from the seed, and all methods see the same ones.
"""

import math
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

CLIP_NORM = 1.0
HELD_OUT_EVERY = 12
"""Each so many-th file is for validation."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained.

    Attributes:
        width: Of the model.
        layers: Of the model.
        context: Bytes of a sequence.
        batch: Sequences of a step.
        steps: Optimizer steps.
        warmup: Steps until the learning rate is reached; cosine from there to a tenth.
        validation: Batches of validation text.
    """

    width: int = 192
    layers: int = 4
    context: int = 256
    batch: int = 32
    steps: int = 1000
    warmup: int = 100
    validation: int = 48


FULL = Size()
SHORT = Size(width=64, layers=2, context=64, batch=8, steps=80, warmup=10, validation=8)


class Block(nn.Module):
    """Attention and MLP, normalised before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 32
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One layer."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))


class ByteGpt(nn.Module):
    """Named as torchtitan names: tok_embeddings, layers, norm, output."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(256, size.width)
        self.pos_embeddings = nn.Embedding(size.context, size.width)
        self.layers = nn.ModuleList(Block(size.width) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, bias=False)
        self.output = nn.Linear(size.width, 256, bias=False)
        self.register_buffer("positions", torch.arange(size.context), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                within = ("out.weight", "down.weight")
                deep = math.sqrt(2 * size.layers) if name.endswith(within) else 1.0
                nn.init.normal_(parameter, std=0.02 / deep)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of all bytes but the first, each predicted from those before."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.tok_embeddings(inputs) + self.pos_embeddings(self.positions)
        for layer in self.layers:
            x = layer(x)
        logits = self.output(self.norm(x)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on and to validate with, uint8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = [p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts)]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, path in enumerate(sorted(files)):
        parts[index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(path.read_bytes())
    train, held_out = (b"\n".join(part) for part in parts)
    return tuple(  # type: ignore[return-value]
        torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, held_out)
    )


@dataclass(slots=True)
class Outcome:
    """What one run gave.

    Attributes:
        loss: Of the validation text after the last step, nats a byte.
        curve: (step, validation loss on a sixth of the batches).
        state_bytes: Of the optimizer, a parameter.
        seconds: Of the whole run, among others at that time.
        parameters: Of the model.
    """

    loss: float
    curve: list[tuple[int, float]]
    state_bytes: float
    seconds: float
    parameters: int


class Batches:
    """Windows of a text, drawn ahead from a seed."""

    def __init__(self, text: torch.Tensor, size: Size, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        last = len(text) - size.context - 1
        offsets = torch.randint(last, (count, size.batch), generator=generator)
        self.offsets = offsets.to(text.device)
        self.within = torch.arange(size.context + 1, device=text.device)
        self.text = text

    def __getitem__(self, step: int) -> torch.Tensor:
        return self.text[self.offsets[step][:, None] + self.within].long()


def backward_of(model: nn.Module, first: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """What fills the gradients for a batch; on CUDA a graph, since the model is small."""
    device = first.device.type

    def anew(tokens: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            loss = model(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)

    if device != "cuda":
        return anew
    held = first.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            anew(held)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        anew(held)

    def replay(tokens: torch.Tensor) -> None:
        held.copy_(tokens)
        graph.replay()

    return replay


def train(
    optimizers_of: Callable[[nn.Module], Iterable[torch.optim.Optimizer]],
    size: Size,
    seed: int,
    text: tuple[torch.Tensor, torch.Tensor],
) -> Outcome:
    """One run from the first step to the last.

    Args:
        optimizers_of: Makes the optimizers for a model.
        size: How much.
        seed: Of weights and batches.
        text: As of `texts`, on the device to train on.
    """
    begun = time.perf_counter()
    torch.manual_seed(seed)
    model = ByteGpt(size).to(text[0].device)
    parameters = sum(p.numel() for p in model.parameters())
    optimizers = list(optimizers_of(model))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _schedule(step, size)) for o in optimizers
    ]
    batches = Batches(text[0], size, size.steps, seed)
    held_out = Batches(text[1], size, size.validation, 0)
    backward = backward_of(model, batches[0])
    curve = []
    for step in range(size.steps):
        backward(batches[step])
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if (step + 1) % max(1, size.steps // 10) == 0:
            curve.append((step + 1, validate(model, held_out, max(1, size.validation // 6))))
    return Outcome(
        validate(model, held_out, size.validation),
        curve,
        sum(state_bytes(optimizer) for optimizer in optimizers) / parameters,
        time.perf_counter() - begun,
        parameters,
    )


def _schedule(step: int, size: Size) -> float:
    if step < size.warmup:
        return (step + 1) / size.warmup
    done = (step - size.warmup) / max(1, size.steps - size.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def validate(model: nn.Module, held_out: Batches, count: int) -> float:
    """Mean loss of the first so many batches."""
    losses = []
    for index in range(count):
        tokens = held_out[index]
        with torch.autocast(
            tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"
        ):
            losses.append(model(tokens))
    return float(torch.stack(losses).double().mean())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state."""
    tensors = (v for state in optimizer.state.values() for v in state.values())
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
