"""AdEMAMix, arXiv 2409.03137 (apple/ml-ademamix): AdamW with a second, slow average.

Defaults are the authors' code's, with weight decay decoupled, and their warm-ups of alpha and of
beta3 by half-life. Deviation: with betas[0] = 0 the fast average is kept all the same.
"""

from math import log, sqrt
from typing import Any, ClassVar, Unpack

import torch

from everstep.client.optim.arguments import betas_of, not_negative, whole
from everstep.client.optim.codecs import Role
from everstep.client.optim.codecs.codec import root_of
from everstep.client.optim.methods.adamw import moments
from everstep.client.optim.optimizer import Optimizer, Options, Parameters
from everstep.client.optim.reference import Values, update
from everstep.kernels.optimizer_tables import single


@update("ademamix")
def ademamix(values: Values) -> None:
    """(fast inverse1 + slow alpha) / (sqrt(v) root + eps) off the parameter."""
    k = values.scalars
    gradient = values.decayed_gradient()
    fast, slow, v = values.states
    fast = fast * k["b1"] + gradient * k["c1"]
    slow = slow * k["b3"] + gradient * k["c3"]
    v = v * k["b2"] + (gradient * gradient) * k["c2"]
    values.states = [fast, slow, v]
    mixed = fast * k["inverse1"] + slow * k["alpha"]
    direction = torch.div(mixed, root_of(v) * k["root"] + k["eps"])
    values.parameter = values.parameter * k["decay"] - direction * k["step_size"]


class AdEMAMix(Optimizer):
    """AdEMAMix with its three states in codes.

    Args:
        params: Parameters or groups, as torch's.
        lr: Learning rate.
        betas: Of the fast average, the second moment, the slow average.
        alpha: Weight of the slow average.
        alpha_warmup: Steps in which alpha grows from 0; 0: none.
        beta3_warmup: Steps in which the slow average's beta grows from betas[0]; 0: none.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        options: What all optimizers here have; see `Options`.

    Raises:
        InvalidConfiguration: If an argument is out of range.
    """

    method = "ademamix"
    states: ClassVar[tuple[tuple[str, Role], ...]] = (
        ("exp_avg_fast", "signed"),
        ("exp_avg_slow", "signed"),
        ("exp_avg_sq", "second"),
    )

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        alpha_warmup: int = 0,
        beta3_warmup: int = 0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "alpha_warmup": alpha_warmup,
            "beta3_warmup": beta3_warmup,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, own, **options)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse what is out of range."""
        super().check(group)
        betas_of(group, 3)
        not_negative(group, "alpha", "eps", "weight_decay")
        whole(group, "alpha_warmup", "beta3_warmup")

    def scalars(self, group: dict[str, Any], step: int, state: dict[str, Any]) -> tuple[float, ...]:
        """step_size, decay, l2, b1, c1, b2, c2, b3, c3, inverse1, alpha, root, eps."""
        b1, b2, b3 = group["betas"]
        alpha = group["alpha"] * _grown(step, group["alpha_warmup"])
        part = _grown(step, group["beta3_warmup"])
        if part < 1:
            life = (1 - part) * _half_life(b1) + part * _half_life(b3)
            b3 = 0.5 ** (1 / (life + 1))
        inverse1, root = 1 / (1 - b1**step), 1 / sqrt(1 - b2**step)
        own = (b3, 1 - b3, inverse1, alpha, root, group["eps"])
        return tuple(map(single, (float(group["lr"]), *moments(group, True, b1, b2), *own)))


def _grown(step: int, warmup: int) -> float:
    return step / warmup if step < warmup else 1.0


def _half_life(beta: float) -> float:
    return log(0.5) / log(beta + 1e-8) - 1
