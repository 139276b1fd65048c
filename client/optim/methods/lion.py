"""Lion, arXiv 2302.06675 (google/automl/lion): the sign of an average is the update.

Defaults are the authors'. They advise a learning rate 3 to 10 times smaller than AdamW's and as
much more decay. Deviation: a NaN average gives a NaN update, not 0.
"""

from typing import Any, ClassVar, Unpack

from everstep.client.optim.arguments import betas_of, not_negative
from everstep.client.optim.codecs import Role
from everstep.client.optim.methods.adamw import moments
from everstep.client.optim.optimizer import Optimizer, Options, Parameters
from everstep.client.optim.reference import Values, sign_of, update
from everstep.kernels.optimizer_tables import single


@update("lion")
def lion(values: Values) -> None:
    """u = m b1 + g c1; m = m b2 + g c2; p = p decay - step_size sign(u)."""
    k = values.scalars
    gradient = values.decayed_gradient()
    (m,) = values.states
    u = m * k["b1"] + gradient * k["c1"]
    values.states = [m * k["b2"] + gradient * k["c2"]]
    values.parameter = values.parameter * k["decay"] - sign_of(u) * k["step_size"]


class Lion(Optimizer):
    """Lion with its average in codes.

    Args:
        params: Parameters or groups, as torch's.
        lr: Learning rate.
        betas: Of the update, and of the average that is kept.
        weight_decay: Decoupled.
        options: What all optimizers here have; see `Options`.

    Raises:
        InvalidConfiguration: If an argument is out of range.
    """

    method = "lion"
    states: ClassVar[tuple[tuple[str, Role], ...]] = (("exp_avg", "signed"),)

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        own = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, own, **options)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse what is out of range."""
        super().check(group)
        betas_of(group, 2)
        not_negative(group, "weight_decay")

    def scalars(self, group: dict[str, Any], step: int, state: dict[str, Any]) -> tuple[float, ...]:
        """step_size, decay, l2, b1, c1, b2, c2."""
        numbers = (float(group["lr"]), *moments(group, True, *group["betas"]))
        return tuple(map(single, numbers))
