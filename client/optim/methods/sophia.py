"""SophiaG, arXiv 2305.14342 (Liuhong99/Sophia): momentum over an estimated Hessian diagonal.

The estimate is Gauss-Newton-Bartlett's: every `hessian_interval` steps or so sample labels from the
model, run another backward, and call `update_hessian`. Defaults are the authors' (rho 0.04 with
`batch_tokens` 5120, the tokens of a batch, by which the estimate is multiplied). Deviation: the
threshold is rho times batch_tokens times h, as the latest code has it; the first one clamped the
ratio at gamma instead.
"""

from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch

from everstep.client.optim.arguments import betas_of, not_negative, whole
from everstep.client.optim.codecs import Role
from everstep.client.optim.optimizer import Optimizer, Options, Parameters
from everstep.client.optim.reference import Values, sign_of, update
from everstep.kernels.optimizer_tables import single


@update("sophia")
def sophia(values: Values) -> None:
    """p = p decay - step_size (sign(m) min(|m| / (h rho + 1e-15), 1)); h is read only."""
    k = values.scalars
    gradient = values.decayed_gradient()
    m, h = values.states
    m = m * k["b1"] + gradient * k["c1"]
    values.states = [m, h]
    ratio = torch.div(m.abs(), h * k["rho"] + single(1e-15))
    ratio = torch.where(ratio > 1.0, torch.ones_like(ratio), ratio)
    direction = sign_of(m) * ratio
    values.parameter = values.parameter * k["decay"] - direction * k["step_size"]


@update("hessian")
def hessian(values: Values) -> None:
    """h = h b2 + (g g) c2."""
    k, gradient = values.scalars, values.gradient
    (h,) = values.states
    values.states = [h * k["b2"] + (gradient * gradient) * k["c2"]]


class Sophia(Optimizer):
    """SophiaG with its average and estimate in codes.

    Args:
        params: Parameters or groups, as torch's.
        lr: Learning rate.
        betas: Of the average, and of the estimate.
        rho: How large steps may be.
        batch_tokens: By which the estimate is multiplied.
        weight_decay: Decoupled.
        options: What all optimizers here have; see `Options`.

    Raises:
        InvalidConfiguration: If an argument is out of range.
    """

    method = "sophia"
    states: ClassVar[tuple[tuple[str, Role], ...]] = (("exp_avg", "signed"), ("hessian", "second"))

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        batch_tokens: int = 5120,
        weight_decay: float = 0.1,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "batch_tokens": batch_tokens,
            "weight_decay": weight_decay,
        }
        super().__init__(params, own, **options)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse what is out of range."""
        super().check(group)
        betas_of(group, 2)
        not_negative(group, "rho", "weight_decay")
        whole(group, "batch_tokens", least=1)

    def scalars(self, group: dict[str, Any], step: int, state: dict[str, Any]) -> tuple[float, ...]:
        """step_size, decay, l2, b1, c1, rho."""
        lr, b1 = float(group["lr"]), group["betas"][0]
        decay = 1 - lr * group["weight_decay"]
        rho = group["rho"] * group["batch_tokens"]
        return tuple(map(single, (lr, decay, 0.0, b1, 1 - b1, rho)))

    @torch.no_grad()
    def update_hessian(self) -> None:
        """Take the gradients of sampled labels into the estimate; no step is taken.

        It changes state outside of `step`: where a client takes snapshots, call it in
        ``with client.updating():``.

        Raises:
            InvalidConfiguration: As by `step`.
        """
        by_device: dict[torch.device, list[Any]] = {}
        for slot in self.with_gradients():
            by_device.setdefault(slot.local.device, []).append(slot)
        for device, slots in by_device.items():
            works = []
            for slot in slots:
                b2 = slot.group["betas"][1]
                scalars = (single(b2), single(1 - b2))
                states = (slot.work.states[1],)
                works.append(replace(slot.work, states=states, scalars=scalars))
            self.run("hessian", slots, works, self.constant(device))
            self.touch(slots)
            for slot in slots:
                slot.work.gradient = None
