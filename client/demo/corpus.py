"""Real text for the demo: the Python standard library's own source files.

Owns the choice of files and the batches drawn from them. Promises the same text wherever the same
Python is installed, and a stream of batches whose whole position is in `state_dict`, apart from
the random generators of Python and NumPy, which it uses on purpose: a restore that forgets one of
them shows. Downloads nothing.
"""

import random
import sysconfig
from pathlib import Path
from typing import Any

import numpy
import torch

from everstep.proto.errors import Refused

_TEXT_BYTES = 2_000_000


def standard_library(limit_bytes: int = _TEXT_BYTES) -> torch.Tensor:
    """The first `limit_bytes` of the standard library's modules, in the order of their names.

    Raises:
        Refused: If this Python was installed without its source files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    if len(text) < min(limit_bytes, 100_000):
        raise Refused(
            f"{folder} holds {len(text):,} bytes of Python source, too few to train on. Run the "
            "demo with a Python that was installed with its standard library as .py files."
        )
    return torch.frombuffer(text[:limit_bytes], dtype=torch.uint8).clone()


class Batches:
    """Batches of byte windows, each window once an epoch, in an order drawn anew each epoch.

    Args:
        text: Bytes.
        window: How many bytes the model sees at once.
        size: Windows in a batch.
    """

    def __init__(self, text: torch.Tensor, window: int, size: int) -> None:
        self._text = text
        self._window = window
        self._size = size
        self._count = len(text) // window - 2
        self._order = self._shuffled()
        self._position = 0
        self._epoch = 0

    def _shuffled(self) -> torch.Tensor:
        order = random.sample(range(self._count), self._count)
        return torch.tensor(order, dtype=torch.int32)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch: inputs, and the byte that follows each of them."""
        if self._position + self._size > self._count:
            self._order = self._shuffled()
            self._position = 0
            self._epoch += 1
        chosen = self._order[self._position : self._position + self._size].tolist()
        self._position += self._size
        # Shifted at random, so that a window is not cut at the same byte in every epoch.
        shifts = numpy.random.randint(0, self._window, size=self._size).tolist()
        starts = [n * self._window + shift for n, shift in zip(chosen, shifts, strict=True)]
        rows = torch.stack([self._text[s : s + self._window + 1] for s in starts]).long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"order": self._order, "position": self._position, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._order = state["order"]
        self._position = state["position"]
        self._epoch = state["epoch"]
