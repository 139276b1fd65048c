"""The demo's model: a small GPT that reads and writes bytes.

Owns the model alone, in plain torch; Everstep needs nothing of it. Promises the same result for
the same weights, input and random state on the same machine.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

BYTES = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the model is."""

    width: int = 128
    layers: int = 6
    heads: int = 4
    window: int = 64
    """Bytes that the model sees at once."""
    dropout: float = 0.05


class Block(nn.Module):
    """Attention to what came before, then two linear layers, each added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.before_attention = nn.LayerNorm(shape.width)
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.mix = nn.Linear(shape.width, shape.width, bias=False)
        self.before_widening = nn.LayerNorm(shape.width)
        self.widen = nn.Linear(shape.width, 4 * shape.width)
        self.narrow = nn.Linear(4 * shape.width, shape.width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes in and out: batch, window, width."""
        batch, window, width = x.shape
        heads = self.query_key_value(self.before_attention(x))
        heads = heads.view(batch, window, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.mix(seen.transpose(1, 2).reshape(x.shape)))
        wide = functional.gelu(self.widen(self.before_widening(x)))
        narrow: torch.Tensor = self.dropout(self.narrow(wide))
        return x + narrow


class ByteGPT(nn.Module):
    """Predicts each next byte; output and input share the table of bytes."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, shape.width)
        self.places = nn.Embedding(shape.window, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.last = nn.LayerNorm(shape.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.04)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """From bytes to the scores of the bytes that follow."""
        x = self.bytes(window) + self.places.weight[: window.shape[1]]
        return functional.linear(self.last(self.blocks(x)), self.bytes.weight)

    def loss(self, window: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy, in nats a byte."""
        scores = self(window)
        return functional.cross_entropy(scores.view(-1, BYTES), following.view(-1))
