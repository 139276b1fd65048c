"""A model whose state is spread over the ranks: each keeps one slice of weights and moments.

Owns how the demo's cluster job trains: every rank computes with all weights, which it gathers from
the others before each step, but only the owner of a slice updates it and has its two moments of
Adam. So a lost node takes with it what no other node has, as in any job that is too large for one.
Promises the same bits for the same seed and number of ranks. Needs a process group.
"""

import random

import numpy
import torch
from torch import distributed, nn

from everstep.client.client import Client
from everstep.client.demo.corpus import Batches, standard_library
from everstep.client.demo.digest import digest_of
from everstep.client.demo.model import ByteGPT, Shape

SHAPE = Shape(width=288, layers=4, heads=4)
_BATCH = 2
_LEARNING_RATE = 1e-3


class Slice(nn.Module):
    """This rank's part of all weights laid end to end."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)


class SlicedTraining:
    """One rank's share of the training.

    Args:
        rank: Which; its batches and its random generators are its own.
        world: How many slices there are.
        steps: In all, for the learning rate.
        seed: Of everything random.
    """

    def __init__(self, rank: int, world: int, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = ByteGPT(SHAPE)
        random.seed(seed + rank)
        numpy.random.seed(seed + rank)
        torch.manual_seed(seed + 1 + rank)
        self.batches = Batches(standard_library(), SHAPE.window, _BATCH)
        self._world = world
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        each = -(-self.parameters // world)
        self._all = torch.zeros(each * world)
        self._gradients = torch.zeros(each * world)
        self._lay_out()
        self._own = slice(rank * each, (rank + 1) * each)
        self.slice = Slice(self._all[self._own].clone())
        self.optimizer = torch.optim.AdamW(
            self.slice.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def _lay_out(self) -> None:
        """Let the model's parameters and gradients be parts of the two long tensors."""
        offset = 0
        for parameter in self.model.parameters():
            end = offset + parameter.numel()
            self._all[offset:end].copy_(parameter.detach().reshape(-1))
            parameter.data = self._all[offset:end].view_as(parameter)
            parameter.grad = self._gradients[offset:end].view_as(parameter)
            offset = end

    def step(self) -> float:
        """One update; returns this rank's loss before it."""
        self.gather()
        loss = self.model.loss(*self.batches.draw())
        self._gradients.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        distributed.all_reduce(self._gradients)
        self.slice.weights.grad = self._gradients[self._own] / self._world
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def gather(self) -> None:
        """Take every rank's slice into the model."""
        own = self.slice.weights.detach()
        distributed.all_gather(list(self._all.chunk(self._world)), own)

    def attach_to(self, client: Client) -> None:
        """Name everything that a restart needs; all of it is this rank's alone."""
        client.attach(
            per_rank={
                "slice": self.slice,
                "optimizer": self.optimizer,
                "scheduler": self.scheduler,
                "batches": self.batches,
            }
        )

    def digest(self) -> str:
        """A digest of every byte of this rank's weights and optimizer state."""
        return digest_of(self.slice.state_dict(), self.optimizer.state_dict())
