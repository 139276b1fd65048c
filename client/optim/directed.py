"""Methods whose direction is changed as a whole tensor before it is applied: AdamP, Muon.

Owns the three passes: the kernels make a direction in fp32, torch changes it, the kernels apply it.
Promises that no more than `_BATCH_ELEMENTS` of directions are held at a time, or one parameter's.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch

from everstep.client.optim.optimizer import Optimizer
from everstep.client.optim.reference import Values, update
from everstep.client.optim.slots import Slot
from everstep.kernels.optimizer_tables import single
from everstep.kernels.optimizer_work import Work

_BATCH_ELEMENTS = 1 << 24


@update("apply")
def apply(values: Values) -> None:
    """p = p decay - step_size direction."""
    k = values.scalars
    assert values.direction is not None
    values.parameter = values.parameter * k["decay"] - values.direction * k["step_size"]


class DirectedOptimizer(Optimizer):
    """An optimizer that looks at directions.

    Attributes:
        method: One of the kernels' direction methods.
    """

    method: ClassVar[str]

    def turned(
        self, batch: list[Slot], directions: list[torch.Tensor]
    ) -> list[tuple[float, float]]:
        """Change directions in place.

        Args:
            batch: Whose they are.
            directions: In the shape of each one's local part.

        Returns:
            For each step size and decay, the scalars of `apply`.
        """
        raise NotImplementedError

    def advance(self, slots: list[Slot], grad_scale: torch.Tensor, key: Any) -> None:
        """Step parameters of one device whose gradients have one scale."""
        for batch in _batches(slots):
            directions = _directions(batch)
            for slot, direction in zip(batch, directions, strict=True):
                slot.work.direction = direction
            self.run(self.method, batch, [slot.work for slot in batch], grad_scale)
            works = []
            for slot, numbers in zip(batch, self.turned(batch, directions), strict=True):
                works.append(_apply(slot.work, numbers))
                slot.work.direction = None
            self.run("apply", batch, works, grad_scale)


def _apply(work: Work, numbers: tuple[float, float]) -> Work:
    scalars = (single(numbers[0]), single(numbers[1]))
    return replace(work, gradient=None, states=(), scalars=scalars)


def _batches(slots: list[Slot]) -> Iterator[list[Slot]]:
    batch: list[Slot] = []
    elements = 0
    for slot in slots:
        if batch and elements + slot.local.numel() > _BATCH_ELEMENTS:
            yield batch
            batch, elements = [], 0
        batch.append(slot)
        elements += slot.local.numel()
    if batch:
        yield batch


def _directions(batch: list[Slot]) -> list[torch.Tensor]:
    """Room for directions, each beginning at 64 bytes."""
    sizes = [-(-slot.local.numel() // 16) * 16 for slot in batch]
    room = torch.empty(sum(sizes), dtype=torch.float32, device=batch[0].local.device)
    pieces = torch.split(room, sizes)
    shapes = [(piece, slot.local) for piece, slot in zip(pieces, batch, strict=True)]
    return [piece[: local.numel()].reshape(local.shape) for piece, local in shapes]
