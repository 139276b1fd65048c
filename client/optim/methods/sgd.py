"""SGD with momentum, as torch.optim.SGD has it: coupled l2, dampening, Nesterov.

Deviation: the average begins at zero, not at the first gradient, so that with dampening the first
step is smaller than torch's; and it is kept with momentum = 0, too (torch keeps none).
"""

from typing import Any, ClassVar, Unpack

from everstep.client.optim.arguments import flag, fraction, not_negative, number
from everstep.client.optim.codecs import Role
from everstep.client.optim.optimizer import Optimizer, Options, Parameters
from everstep.client.optim.reference import Values, update
from everstep.kernels.optimizer_tables import single
from everstep.proto.errors import InvalidConfiguration


@update("sgd")
def sgd(values: Values) -> None:
    """m = m momentum + g c1; p = p decay - step_size (g x + m y)."""
    k = values.scalars
    gradient = values.decayed_gradient()
    (m,) = values.states
    m = m * k["momentum"] + gradient * k["c1"]
    values.states = [m]
    direction = gradient * k["x"] + m * k["y"]
    values.parameter = values.parameter * k["decay"] - direction * k["step_size"]


class SGD(Optimizer):
    """SGD with its momentum in codes.

    Args:
        params: Parameters or groups, as torch's.
        lr: Learning rate.
        momentum: Of the sum of gradients.
        dampening: What gradients are diminished by in that sum.
        weight_decay: Coupled (l2).
        nesterov: Step by the gradient and the momentum.
        options: What all optimizers here have; see `Options`.

    Raises:
        InvalidConfiguration: If an argument is out of range.
    """

    method = "sgd"
    states: ClassVar[tuple[tuple[str, Role], ...]] = (("momentum_buffer", "signed"),)

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, own, **options)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse what is out of range."""
        super().check(group)
        fraction(group, "momentum")
        not_negative(group, "weight_decay")
        flag(group, "nesterov")
        dampening = number(group, "dampening")
        if group["nesterov"] and (dampening or not group["momentum"]):
            problem = f"True, with momentum {group['momentum']!r} and dampening {dampening!r}"
            raise InvalidConfiguration("nesterov", problem)

    def scalars(self, group: dict[str, Any], step: int, state: dict[str, Any]) -> tuple[float, ...]:
        """step_size, decay, l2, momentum, c1, x, y."""
        momentum, l2 = group["momentum"], group["weight_decay"]
        x, y = (1.0, momentum) if group["nesterov"] else (0.0, 1.0)
        numbers = (float(group["lr"]), 1.0, l2, momentum, 1.0 - group["dampening"], x, y)
        return tuple(map(single, numbers))
