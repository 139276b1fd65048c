"""AdamP, arXiv 2006.08217 (clovaai/AdamP): Adam whose updates do not lengthen what is normalised.

Where the gradient is nearly orthogonal to the weights, by channel (rows) or else by layer, the part
of the update along the weights is taken out and decay is multiplied by wd_ratio. Defaults are the
authors'. Deviations: no Nesterov variant; the projection is computed before decay in fp32 from the
parameter as it is stored (for bf16 parameters without their correction).
"""

from collections.abc import Callable
from math import sqrt
from typing import Any, ClassVar, Unpack

import torch

from everstep.client.optim.arguments import betas_of, not_negative
from everstep.client.optim.codecs import Role
from everstep.client.optim.directed import DirectedOptimizer
from everstep.client.optim.methods.adamw import moments
from everstep.client.optim.optimizer import Options, Parameters
from everstep.client.optim.slots import Slot
from everstep.client.optim.spread import summed, summed_rows
from everstep.kernels.optimizer_tables import single


class AdamP(DirectedOptimizer):
    """AdamP with its moments in codes.

    Args:
        params: Parameters or groups, as torch's.
        lr: Learning rate.
        betas: Of the average and the second moment.
        eps: Added to the root of the second moment, and to norms.
        weight_decay: Decoupled.
        delta: Of the cosine, times sqrt(dimension), below which an update is projected.
        wd_ratio: What decay is multiplied with then.
        options: What all optimizers here have; see `Options`.

    Raises:
        InvalidConfiguration: If an argument is out of range.
    """

    method = "adam_direction"
    states: ClassVar[tuple[tuple[str, Role], ...]] = (
        ("exp_avg", "signed"),
        ("exp_avg_sq", "second"),
    )

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
        }
        super().__init__(params, own, **options)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse what is out of range."""
        super().check(group)
        betas_of(group, 2)
        not_negative(group, "eps", "weight_decay", "delta", "wd_ratio")

    def scalars(self, group: dict[str, Any], step: int, state: dict[str, Any]) -> tuple[float, ...]:
        """step_size, decay, l2, b1, c1, b2, c2, root, eps."""
        b1, b2 = group["betas"]
        step_size, root = float(group["lr"]) / (1 - b1**step), 1 / sqrt(1 - b2**step)
        numbers = (step_size, *moments(group, True, b1, b2), root, group["eps"])
        return tuple(map(single, numbers))

    def turned(
        self, batch: list[Slot], directions: list[torch.Tensor]
    ) -> list[tuple[float, float]]:
        """Project updates. What was projected is asked of the device once a batch."""
        projected = [
            _projected(slot, direction) for slot, direction in zip(batch, directions, strict=True)
        ]
        found = []
        for slot, was in zip(batch, torch.stack(projected).tolist(), strict=True):
            group = slot.group
            shrink = float(group["lr"]) * group["weight_decay"] * (group["wd_ratio"] if was else 1)
            found.append((slot.work.scalars[0], 1 - shrink))
        return found


def _projected(slot: Slot, direction: torch.Tensor) -> torch.Tensor:
    """Project one update in place; whether it was."""
    if slot.parameter.dim() < 2:
        return torch.zeros((), dtype=torch.bool, device=direction.device)
    group, shape = slot.group, (slot.work.rows, slot.work.row)
    weight = slot.work.parameter.float().reshape(shape)
    gradient = slot.work.gradient.float().reshape(shape)
    turned = direction.reshape(shape)

    def rows(values: torch.Tensor) -> torch.Tensor:
        return summed_rows(values.sum(1, keepdim=True), slot.parameter)

    def layer(values: torch.Tensor) -> torch.Tensor:
        return summed(values.sum(), slot.parameter).reshape(1, 1)

    elements = slot.parameter.numel()
    channels = int(slot.parameter.shape[0])
    for_rows = _cosine(weight, gradient, rows, group["eps"])
    most = summed_rows(for_rows.max(), slot.parameter, largest=True)
    by_rows = most < group["delta"] / sqrt(elements / channels)
    cosine = _cosine(weight, gradient, layer, group["eps"]).reshape(())
    by_layer = (cosine < group["delta"] / sqrt(elements)) & ~by_rows
    along_rows = _without(weight, turned, rows, group["eps"])
    along_layer = _without(weight, turned, layer, group["eps"])
    turned.copy_(torch.where(by_rows, along_rows, torch.where(by_layer, along_layer, turned)))
    was: torch.Tensor = by_rows | by_layer
    return was


def _cosine(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    total: Callable[[torch.Tensor], torch.Tensor],
    eps: float,
) -> torch.Tensor:
    """As torch's cosine_similarity: each norm is at least eps."""
    norms = [total(x * x).sqrt().clamp(min=eps) for x in (weight, gradient)]
    return torch.div(total(weight * gradient), norms[0] * norms[1]).abs()


def _without(
    weight: torch.Tensor,
    direction: torch.Tensor,
    total: Callable[[torch.Tensor], torch.Tensor],
    eps: float,
) -> torch.Tensor:
    """A direction less its part along the weights."""
    unit = torch.div(weight, total(weight * weight).sqrt() + eps)
    return direction - unit * total(unit * direction)
