"""Muon (KellerJordan/Muon; arXiv 2502.16982 for Moonlight): momentum made orthogonal.

For hidden matrices; embeddings, heads and vectors belong to AdamW. Follows Keller Jordan's code: an
average (not a sum), Nesterov, five Newton-Schulz iterations in bf16 with his coefficients, scale
sqrt(max(1, rows / columns)); `adjust="match_rms_adamw"` is Moonlight's, 0.2 sqrt(max(rows,
columns)), with which AdamW's learning rates fit. Tensors of more dimensions are flattened after the
first.
Deviations: a matrix that ranks share is gathered by each of them and orthogonalised by each, where
others share the work. The products are torch's: their bits may depend on threads and device.
"""

from math import sqrt
from typing import Any, ClassVar, Unpack

import torch

from everstep.client.optim.arguments import flag, fraction, not_negative, whole
from everstep.client.optim.codecs import Role, rows_of
from everstep.client.optim.directed import DirectedOptimizer
from everstep.client.optim.optimizer import Options, Parameters
from everstep.client.optim.reference import Values, update
from everstep.client.optim.slots import Slot
from everstep.client.optim.spread import gathered, own_part
from everstep.kernels.optimizer_tables import single
from everstep.proto.errors import InvalidConfiguration

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_LEAST_NORM = 1e-7
ADJUSTMENTS = ("original", "match_rms_adamw")


@update("momentum_direction")
def momentum_direction(values: Values) -> None:
    """m = m b1 + g c1; direction = g x + m y."""
    k = values.scalars
    (m,) = values.states
    m = m * k["b1"] + values.gradient * k["c1"]
    values.states = [m]
    values.direction = values.gradient * k["x"] + m * k["y"]


class Muon(DirectedOptimizer):
    """Muon with its momentum in codes.

    Args:
        params: Matrices, or groups of them.
        lr: Learning rate.
        momentum: Of the average.
        weight_decay: Decoupled.
        nesterov: Mix the gradient into the direction once more.
        ns_steps: Newton-Schulz iterations.
        adjust: "original" or "match_rms_adamw", how the shape scales an update.
        options: What all optimizers here have; see `Options`.

    Raises:
        InvalidConfiguration: If an argument is out of range, or a parameter is no matrix.
    """

    method = "momentum_direction"
    states: ClassVar[tuple[tuple[str, Role], ...]] = (("momentum_buffer", "signed"),)

    def __init__(
        self,
        params: Parameters,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust: str = "original",
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust": adjust,
        }
        super().__init__(params, own, **options)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse what is out of range."""
        super().check(group)
        fraction(group, "momentum")
        not_negative(group, "weight_decay")
        flag(group, "nesterov")
        whole(group, "ns_steps", least=1)
        if group["adjust"] not in ADJUSTMENTS:
            problem = f"{group['adjust']!r} is not one of {', '.join(ADJUSTMENTS)}"
            raise InvalidConfiguration("adjust", problem)
        for place, parameter in enumerate(group["params"]):
            if parameter.dim() < 2:
                raise InvalidConfiguration(
                    f"params[{place}]",
                    f"its shape is {tuple(parameter.shape)}, and Muon is for matrices; give "
                    "vectors to AdamW (see everstep.optim.plan)",
                )

    def scalars(self, group: dict[str, Any], step: int, state: dict[str, Any]) -> tuple[float, ...]:
        """b1, c1, x, y."""
        momentum = group["momentum"]
        x, y = (1 - momentum, momentum) if group["nesterov"] else (0.0, 1.0)
        return tuple(map(single, (momentum, 1 - momentum, x, y)))

    def turned(
        self, batch: list[Slot], directions: list[torch.Tensor]
    ) -> list[tuple[float, float]]:
        """Make each orthogonal."""
        found = []
        for slot, direction in zip(batch, directions, strict=True):
            group, lr = slot.group, float(slot.group["lr"])
            rows, row = rows_of(slot.parameter.shape)
            matrix = gathered(direction, slot.parameter).reshape(rows, row)
            made = orthogonal(matrix, group["ns_steps"]).reshape(slot.parameter.shape)
            direction.copy_(own_part(made, slot.parameter))
            scale = sqrt(max(1.0, rows / row))
            if group["adjust"] == "match_rms_adamw":
                scale = 0.2 * sqrt(max(rows, row))
            found.append((lr * scale, 1 - lr * group["weight_decay"]))
        return found


def orthogonal(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly, in bf16."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / (x.norm() + _LEAST_NORM)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    made: torch.Tensor = x.T if is_tall else x
    return made
