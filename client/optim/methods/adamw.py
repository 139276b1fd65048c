"""AdamW and Adam.

AdamW: arXiv 1711.05101, as torch.optim.AdamW (decay first, then the update). Adam: arXiv 1412.6980,
with coupled l2 as torch.optim.Adam has it. Deviations: no amsgrad; a second moment is divided as
sqrt(v) * root, where torch divides by a correction.
"""

from math import sqrt
from typing import Any, ClassVar, Unpack

import torch

from everstep.client.optim.arguments import betas_of, not_negative
from everstep.client.optim.codecs import Role
from everstep.client.optim.codecs.codec import root_of
from everstep.client.optim.optimizer import Optimizer, Options, Parameters
from everstep.client.optim.reference import Values, update
from everstep.kernels.optimizer_tables import single


@update("adam")
def adam(values: Values) -> None:
    """m and v from the gradient, then m / (sqrt(v) root + eps) off the parameter."""
    k = values.scalars
    gradient = values.decayed_gradient()
    values.parameter = values.parameter * k["decay"]
    direction(values, gradient)
    assert values.direction is not None
    values.parameter = values.parameter - values.direction * k["step_size"]


@update("adam_direction")
def adam_direction(values: Values) -> None:
    """What `adam` multiplies with the step size."""
    direction(values, values.decayed_gradient())


def direction(values: Values, gradient: torch.Tensor) -> None:
    """m = m b1 + g c1; v = v b2 + (g g) c2; m / (sqrt(v) root + eps)."""
    k = values.scalars
    m, v = values.states
    m = m * k["b1"] + gradient * k["c1"]
    v = v * k["b2"] + (gradient * gradient) * k["c2"]
    values.states = [m, v]
    values.direction = torch.div(m, root_of(v) * k["root"] + k["eps"])


class AdamW(Optimizer):
    """AdamW with its moments in codes.

    Args:
        params: Parameters or groups, as torch's.
        lr: Learning rate.
        betas: Of the average and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        options: What all optimizers here have; see `Optimizer`.

    Raises:
        InvalidConfiguration: If an argument is out of range.
    """

    method = "adam"
    states: ClassVar[tuple[tuple[str, Role], ...]] = (
        ("exp_avg", "signed"),
        ("exp_avg_sq", "second"),
    )
    decoupled: ClassVar[bool] = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own, **options)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse what is out of range."""
        super().check(group)
        betas_of(group, 2)
        not_negative(group, "eps", "weight_decay")

    def scalars(self, group: dict[str, Any], step: int, state: dict[str, Any]) -> tuple[float, ...]:
        """step_size, decay, l2, b1, c1, b2, c2, root, eps."""
        lr, (b1, b2) = float(group["lr"]), group["betas"]
        step_size, root = lr / (1 - b1**step), 1 / sqrt(1 - b2**step)
        numbers = (step_size, *moments(group, self.decoupled, b1, b2), root, group["eps"])
        return tuple(map(single, numbers))


class Adam(AdamW):
    """Adam with its moments in codes; `weight_decay` is coupled (l2), 0 unless given."""

    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)


def moments(group: dict[str, Any], decoupled: bool, b1: float, b2: float) -> tuple[float, ...]:
    """decay, l2, b1, c1, b2, c2."""
    decay = group["weight_decay"]
    shrink, l2 = (1 - float(group["lr"]) * decay, 0.0) if decoupled else (1.0, decay)
    return shrink, l2, b1, 1 - b1, b2, 1 - b2
