"""SPAM, arXiv 2501.06842 (TianjinYellow/SPAM-Optimizer): Adam that clips spikes and starts anew.

Follows the authors' code: every `reset_interval` steps the moments are zero again and the learning
rate grows from a hundredth by a cosine over `warmup_steps`; an element whose square is more than
`threshold` times its second moment is clipped to that, but not in the first `grace_steps` steps nor
in as many after a reset; bias is corrected by all steps, not by those since the reset; eps is added
before the correction. Deviations: all elements have moments (the authors' density of 1; there is no
sparse variant), decay is decoupled and taken before the update, and nothing is kept but the step.
Do not clip gradients by norm as well: the spikes would no longer be seen.
"""

from math import cos, pi, sqrt
from typing import Any, ClassVar, Unpack

import torch

from everstep.client.optim.arguments import betas_of, not_negative, whole
from everstep.client.optim.codecs import Role
from everstep.client.optim.codecs.codec import root_of
from everstep.client.optim.methods.adamw import direction, moments
from everstep.client.optim.optimizer import Optimizer, Options, Parameters
from everstep.client.optim.reference import Values, sign_of, update
from everstep.client.optim.slots import STEP, Slot
from everstep.kernels.optimizer_tables import single
from everstep.snapshot.placement import local_of


@update("spam")
def spam(values: Values) -> None:
    """g = sign(g) sqrt(v theta) where g g > v theta, if theta > 0; then adam."""
    k = values.scalars
    gradient = values.decayed_gradient()
    if k["theta"] > 0:
        limit = values.states[1] * k["theta"]
        clipped = sign_of(gradient) * root_of(limit)
        gradient = torch.where(gradient * gradient > limit, clipped, gradient)
    values.parameter = values.parameter * k["decay"]
    direction(values, gradient)
    assert values.direction is not None
    values.parameter = values.parameter - values.direction * k["step_size"]


class SPAM(Optimizer):
    """SPAM with its moments in codes.

    Args:
        params: Parameters or groups, as torch's.
        lr: Learning rate.
        betas: Of the average and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        threshold: Of spikes; 0: none is clipped.
        grace_steps: Steps without clipping at first and after a reset.
        reset_interval: Steps between resets; 0: none.
        warmup_steps: In which the learning rate grows after a reset.
        options: What all optimizers here have; see `Options`.

    Raises:
        InvalidConfiguration: If an argument is out of range.
    """

    method = "spam"
    states: ClassVar[tuple[tuple[str, Role], ...]] = (
        ("exp_avg", "signed"),
        ("exp_avg_sq", "second"),
    )

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        threshold: float = 5000.0,
        grace_steps: int = 20,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "threshold": threshold,
            "grace_steps": grace_steps,
            "reset_interval": reset_interval,
            "warmup_steps": warmup_steps,
        }
        super().__init__(params, own, **options)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse what is out of range."""
        super().check(group)
        betas_of(group, 2)
        not_negative(group, "eps", "weight_decay", "threshold")
        whole(group, "grace_steps", "reset_interval", "warmup_steps")

    def scalars(self, group: dict[str, Any], step: int, state: dict[str, Any]) -> tuple[float, ...]:
        """step_size, decay, l2, b1, c1, b2, c2, root, eps, theta."""
        b1, b2 = group["betas"]
        root = 1 / sqrt(1 - b2**step)
        step_size = float(group["lr"]) / (1 - b1**step) * _warmed(group, step)
        interval, grace = group["reset_interval"], group["grace_steps"]
        clips = step >= grace and (not interval or step % interval >= grace)
        theta = group["threshold"] if clips else 0.0
        own = (root, group["eps"] * root, theta)
        return tuple(map(single, (step_size, *moments(group, True, b1, b2), *own)))

    def before_step(self, slots: list[Slot]) -> None:
        """Forget the moments where the step to come is a reset; zero bytes decode to zeros."""
        for slot in slots:
            interval = slot.group["reset_interval"]
            if interval and (int(slot.count) + 1) % interval == 0:
                for key, tensor in zip(slot.keys, slot.tensors, strict=True):
                    if key != STEP and key.startswith("exp_avg"):
                        local_of(tensor).zero_()


def _warmed(group: dict[str, Any], step: int) -> float:
    """The learning rate's factor."""
    interval, steps = group["reset_interval"], group["warmup_steps"]
    if not interval or step < interval or step % interval > steps or not steps:
        return 1.0
    return float(1 - 0.99 * 0.5 * (1 + cos(pi * (step % interval) / steps)))
