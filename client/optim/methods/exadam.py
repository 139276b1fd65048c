"""EXAdam, arXiv 2412.20302 (AhmedMostafa16/EXAdam): Adam with other corrections of its moments.

Follows the authors' code, whose last version takes decoupled decay before the update. In it the
corrected gradient is g / (1 - b1^t) d1, which the code and the paper's algorithm agree on.
"""

from typing import Any, ClassVar, Unpack

import torch

from everstep.client.optim.arguments import betas_of, not_negative
from everstep.client.optim.codecs import Role
from everstep.client.optim.codecs.codec import root_of
from everstep.client.optim.methods.adamw import moments
from everstep.client.optim.optimizer import Optimizer, Options, Parameters
from everstep.client.optim.reference import Values, update
from everstep.kernels.optimizer_tables import single


@update("exadam")
def exadam(values: Values) -> None:
    """(m t + g t) / (sqrt((v inverse2) d2) + eps) off the parameter, for t = inverse1 d1."""
    k = values.scalars
    gradient = values.decayed_gradient()
    m, v = values.states
    m = m * k["b1"] + gradient * k["c1"]
    v = v * k["b2"] + (gradient * gradient) * k["c2"]
    values.states = [m, v]
    d1 = torch.div(v, v + k["eps"]) * k["b2t"] + 1.0
    square = m * m
    d2 = torch.div(square, square + k["eps"]) * k["b1t"] + 1.0
    t = d1 * k["inverse1"]
    root = root_of((v * k["inverse2"]) * d2)
    direction = torch.div(m * t + gradient * t, root + k["eps"])
    values.parameter = values.parameter * k["decay"] - direction * k["step_size"]


class EXAdam(Optimizer):
    """EXAdam with its moments in codes.

    Args:
        params: Parameters or groups, as torch's.
        lr: Learning rate.
        betas: Of the average and the second moment.
        eps: Added wherever there is a division.
        weight_decay: Decoupled.
        options: What all optimizers here have; see `Options`.

    Raises:
        InvalidConfiguration: If an argument is out of range.
    """

    method = "exadam"
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
        """step_size, decay, l2, b1, c1, b2, c2, inverse1, inverse2, b1t, b2t, eps."""
        b1, b2 = group["betas"]
        b1t, b2t = b1**step, b2**step
        own = (1 / (1 - b1t), 1 / (1 - b2t), b1t, b2t, group["eps"])
        return tuple(map(single, (float(group["lr"]), *moments(group, True, b1, b2), *own)))
