"""SGD-SaI, arXiv 2412.11768 (AnonymousAlethiometer/SGD_SaI): one learning rate a tensor, set once.

The first gradient's signal-to-noise ratio, norm / (deviation + eps), scales a tensor's learning
rate ever after. Follows the authors' code, version 1.0.4, which divides it by the largest of all
tensors; `normalize=False` is the paper's and version 1.0.3's. Deviations: the ratio is state
(theirs is computed anew after a restart), and that of a parameter which comes later is of its own
first gradient. The largest is that of the tensors that this rank has.
"""

from typing import Any, ClassVar, Unpack

import torch

from everstep.client.optim.arguments import flag, fraction, not_negative
from everstep.client.optim.codecs import Role
from everstep.client.optim.optimizer import Optimizer, Options, Parameters
from everstep.client.optim.slots import Slot
from everstep.client.optim.spread import summed
from everstep.kernels.optimizer_tables import single

_RATIO = "gsnr"


class SGDSaI(Optimizer):
    """SGD-SaI with its momentum in codes.

    Args:
        params: Parameters or groups, as torch's.
        lr: Learning rate of the tensor with the largest ratio.
        momentum: Of the average.
        eps: Added to the deviation.
        weight_decay: Decoupled.
        normalize: Divide ratios by the largest.
        options: What all optimizers here have; see `Options`.

    Raises:
        InvalidConfiguration: If an argument is out of range.
    """

    method = "sgd"
    states: ClassVar[tuple[tuple[str, Role], ...]] = (("momentum_buffer", "signed"),)
    scalars_differ: ClassVar[bool] = True

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        normalize: bool = True,
        **options: Unpack[Options],
    ) -> None:
        self._largest = 1.0
        own = {
            "lr": lr,
            "momentum": momentum,
            "eps": eps,
            "weight_decay": weight_decay,
            "normalize": normalize,
        }
        super().__init__(params, own, **options)

    def check(self, group: dict[str, Any]) -> None:
        """Refuse what is out of range."""
        super().check(group)
        fraction(group, "momentum")
        not_negative(group, "eps", "weight_decay")
        flag(group, "normalize")

    def before_step(self, slots: list[Slot]) -> None:
        """Set the ratios that are not set yet; this waits for the device, once a parameter."""
        for slot in slots:
            state = self.state[slot.parameter]
            if _RATIO not in state:
                state[_RATIO] = _ratio(slot)
        ratios = [float(s[_RATIO]) for s in self.state.values() if _RATIO in s]
        self._largest = max(ratios, default=1.0)

    def scalars(self, group: dict[str, Any], step: int, state: dict[str, Any]) -> tuple[float, ...]:
        """step_size, decay, l2, momentum, c1, x, y; the first gradient is the first average."""
        lr, momentum = float(group["lr"]), group["momentum"]
        ratio = float(state[_RATIO]) / (self._largest if group["normalize"] else 1.0)
        kept, taken = (0.0, 1.0) if step == 1 else (momentum, 1 - momentum)
        decay = 1 - lr * group["weight_decay"]
        return tuple(map(single, (lr * ratio, decay, 0.0, kept, taken, 0.0, 1.0)))


def _ratio(slot: Slot) -> torch.Tensor:
    """Norm over deviation of the whole gradient, fp32 on the CPU."""
    gradient = slot.work.gradient.double()
    parts = [gradient.sum(), (gradient * gradient).sum()]
    count = slot.parameter.numel()
    total, squares = (float(x) for x in summed(torch.stack(parts), slot.parameter).tolist())
    variance = max(0.0, squares - total * total / count) / (count - 1) if count > 1 else 0.0
    ratio = squares**0.5 / (variance**0.5 + slot.group["eps"])
    return torch.tensor(ratio, dtype=torch.float32)
