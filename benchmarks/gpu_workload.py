"""What the GPU benchmark trains: a GPT of 1.24 G parameters, and the clock that times its steps.

Owns the model, its optimizers and the measurement of blocks of steps. Promises that every method
is timed the same way: device events around whole blocks, the host held to one step ahead of the
device. ``--device cpu --tiny`` runs the same code small, to try the benchmark's logic; its figures
mean nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Size:
    """The form of the model and of its batch."""

    layers: int = 24
    width: int = 2048
    heads: int = 16
    vocabulary: int = 13 * 1024
    rows: int = 8
    tokens: int = 1024

    @classmethod
    def tiny(cls) -> "Size":
        """Seconds on two cores."""
        return cls(layers=2, width=128, heads=4, vocabulary=512, rows=2, tokens=32)


class Block(nn.Module):
    """Attention and a perceptron, both behind a norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.first_norm = nn.LayerNorm(size.width)
        self.queries_keys_values = nn.Linear(size.width, 3 * size.width, bias=False)
        self.projection = nn.Linear(size.width, size.width, bias=False)
        self.second_norm = nn.LayerNorm(size.width)
        self.wide = nn.Linear(size.width, 4 * size.width, bias=False)
        self.narrow = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """One layer."""
        rows, tokens, width = hidden.shape
        mixed = self.queries_keys_values(self.first_norm(hidden))
        split = mixed.view(rows, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(rows, tokens, width)
        hidden = hidden + self.projection(attended)
        widened = functional.gelu(self.wide(self.second_norm(hidden)), approximate="tanh")
        narrowed: torch.Tensor = self.narrow(widened)
        return hidden + narrowed


class Gpt(nn.Module):
    """A plain decoder with tied embeddings."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.tokens, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of predicting each next token."""
        hidden = self.embedding(tokens) + self.positions.weight
        for block in self.blocks:
            hidden = block(hidden)
        scores = functional.linear(self.norm(hidden), self.embedding.weight)
        flat = scores[:, :-1].reshape(-1, scores.shape[-1])
        return functional.cross_entropy(flat, tokens[:, 1:].reshape(-1))


class EightBitStandIn(torch.optim.Optimizer):
    """State of the size that AdamW with 8-bit moments has: it says nothing about training.

    Per parameter two uint8 moments and a float scale for every 256 of their elements. All of it
    changes at every step, as the real one's would, so that no copy can be saved.
    """

    GROUP = 256

    def __init__(self, parameters: Any, lr: float = 1e-4) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move everything a little."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            states = [self._state(parameter) for parameter in moved]
            torch._foreach_add_(moved, [p.grad for p in moved], alpha=-group["lr"])
            for name in ("exp_avg", "exp_avg_sq"):
                torch._foreach_add_([state[name] for state in states], 1)
                torch._foreach_add_([state[f"{name}_scale"] for state in states], 1e-3)

    def _state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            groups = -(-parameter.numel() // self.GROUP)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
                state[f"{name}_scale"] = torch.zeros(groups, device=parameter.device)
        return state


class Pace:
    """Times blocks of steps, and holds the host to one step ahead of the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun_s = 0.0
        self._begun: torch.cuda.Event | None = None
        self._before: torch.cuda.Event | None = None

    def synchronize(self) -> None:
        """Let the device finish all that it was given."""
        if self._cuda:
            torch.cuda.synchronize()

    def begin(self) -> None:
        """The first step's work follows."""
        self._begun_s = time.perf_counter()
        if self._cuda:
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()

    def stepped(self) -> None:
        """A step's work was enqueued: wait for the end of the one before it."""
        if self._cuda:
            now = torch.cuda.Event()
            now.record()
            if self._before is not None:
                self._before.synchronize()
            self._before = now

    def end(self) -> float:
        """Seconds from `begin` until the device has done all that was enqueued since."""
        if self._begun is None:
            return time.perf_counter() - self._begun_s
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        ended.synchronize()
        return self._begun.elapsed_time(ended) / 1e3


@dataclass(slots=True)
class Training:
    """The model, its optimizer and one batch of made-up tokens."""

    model: Gpt
    optimizer: torch.optim.Optimizer
    tokens: torch.Tensor
    pace: Pace
    device: torch.device
    steps_done: int = 0
    before_update: list[Callable[[], object]] = field(default_factory=list)

    @classmethod
    def start(cls, device: str, size: Size, *, steps: int = 2) -> "Training":
        """Build it on the device and take some steps, which allocate the optimizer's state."""
        where = torch.device(device)
        torch.manual_seed(0)
        with where:
            model = Gpt(size)
            tokens = torch.randint(size.vocabulary, (size.rows, size.tokens))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        training = cls(model, optimizer, tokens, Pace(where), where)
        if steps:
            training.steps(steps)
        training.pace.synchronize()
        return training

    def eight_bit(self) -> None:
        """Go on with the stand-in for 8-bit moments; the moments so far are let go of."""
        self.optimizer = EightBitStandIn(self.model.parameters())
        self.steps(2)
        self.pace.synchronize()

    def step(self) -> None:
        """Enqueue one step as a user's loop would; nothing is read back."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.model(self.tokens)
        loss.backward()
        for action in self.before_update:
            action()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1

    def steps(self, count: int, after: Callable[[int], object] | None = None) -> float:
        """Take steps; return the seconds of each on the average.

        Args:
            count: How many.
            after: Called with the number of steps done so far, after each.
        """
        self.pace.begin()
        for _ in range(count):
            self.step()
            if after is not None:
                after(self.steps_done)
            self.pace.stepped()
        return self.pace.end() / count

    def objects(self) -> dict[str, Any]:
        """What a user would attach."""
        return {"model": self.model, "optimizer": self.optimizer}

    def state(self) -> dict[str, Any]:
        """What a user would save."""
        return {name: thing.state_dict() for name, thing in self.objects().items()}

    @property
    def state_bytes(self) -> int:
        """Of all tensors."""
        states = self.optimizer.state.values()
        tensors = [tensor for state in states for tensor in state.values()]
        return sum(t.nbytes for t in [*self.model.parameters(), *tensors])
