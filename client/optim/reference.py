"""A step in torch, on any device: slow, and what every kernel must equal bit for bit.

Owns the order of a step: gradient times its scale, states decoded, the method's arithmetic, the
parameter written, states encoded. Owns neither codecs (`codecs/`) nor methods (`methods/`), whose
update functions are entered in `UPDATES`. `Table` has the face that the kernels' tables have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from everstep.client.optim.codecs import CODECS, Codec, Parts, Role
from everstep.client.optim.codecs.corrected import joined, split
from everstep.client.optim.rounding import stochastic
from everstep.kernels.optimizer_work import METHODS, CodedState, Work


@dataclass(slots=True)
class Values:
    """What an update function works on: fp32 tensors [rows, row], replaced by it.

    Attributes:
        parameter: Before and after.
        gradient: Times its scale; without l2.
        states: In the method's order.
        scalars: By name.
        direction: Read by `apply`, made by the direction methods.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    states: list[torch.Tensor]
    scalars: dict[str, float]
    direction: torch.Tensor | None = None

    def decayed_gradient(self) -> torch.Tensor:
        """The gradient and the parameter's coupled decay."""
        return self.gradient + self.parameter * self.scalars["l2"]


Update: TypeAlias = Callable[[Values], None]
UPDATES: dict[str, Update] = {}
"""By method; entered by `client/optim/methods`."""

KEEPS_PARAMETER = ("hessian", "adam_direction", "momentum_direction")
KEEPS_STATES = {"sophia": (1,)}
"""Places of states that a method reads only: their codes stay as they are."""

_BY_KERNEL_NAME: dict[str, tuple[Codec, Role]] = {}


def update(method: str) -> Callable[[Update], Update]:
    """Enter the function as the reference of a method."""

    def enter(function: Update) -> Update:
        UPDATES[method] = function
        return function

    return enter


def sign_of(values: torch.Tensor) -> torch.Tensor:
    """-1, 0 or 1; NaN where it is NaN, which torch's sign makes 0."""
    return torch.where(values.isnan(), values, values.sign())


class Table:
    """Works of one method, ready to be stepped any number of times."""

    def __init__(self, works: Sequence[Work], method: str) -> None:
        self._works, self._method = list(works), method

    @property
    def chunk_count(self) -> int:
        """Pieces that ranges count: here whole works."""
        return len(self._works)

    def refresh(self, works: Sequence[Work]) -> None:
        """Take new addresses and scalars."""
        self._works = list(works)

    def step(
        self,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
        first: int = 0,
        count: int | None = None,
    ) -> None:
        """Step some works.

        Args:
            grad_scale: One fp32 that gradients are multiplied with.
            found_inf: One fp32; nothing is written if it is not 0.
            first: Where to begin.
            count: How many; None: all.
        """
        if found_inf is not None and bool(found_inf.item()):
            return
        end = None if count is None else first + count
        for work in self._works[first:end]:
            _step(work, self._method, grad_scale)


@torch.no_grad()
def _step(work: Work, method: str, grad_scale: torch.Tensor | None) -> None:
    shape = (work.rows, work.row)
    parameter = _decoded_parameter(work).reshape(shape)
    gradient = work.gradient
    if gradient is None:
        gradient = torch.zeros_like(parameter)
    gradient = gradient.float().reshape(shape)
    if grad_scale is not None:
        gradient = gradient * grad_scale
    states = [_decoded(state, work) for state in work.states]
    scalars = dict(zip(METHODS[method].scalars, work.scalars, strict=True))
    direction = None if work.direction is None else work.direction.reshape(shape)
    values = Values(parameter, gradient, states, scalars, direction)
    UPDATES[method](values)
    if method.endswith("_direction"):
        assert values.direction is not None
        work.direction.copy_(values.direction.reshape(work.direction.shape))
    if method not in KEEPS_PARAMETER:
        _write_parameter(work, values.parameter)
    for place, (state, value) in enumerate(zip(work.states, values.states, strict=True)):
        if place not in KEEPS_STATES.get(method, ()):
            _encode(state, value)


def _decoded_parameter(work: Work) -> torch.Tensor:
    if work.correction is not None:
        return joined(work.parameter, work.correction)
    parameter: torch.Tensor = work.parameter.float()
    return parameter


def _write_parameter(work: Work, values: torch.Tensor) -> None:
    values = values.reshape(work.parameter.shape)
    if work.correction is not None:
        rounded, correction = split(values)
        work.parameter.copy_(rounded)
        work.correction.copy_(correction)
    elif work.parameter.dtype == torch.bfloat16 and work.seed:
        work.parameter.copy_(stochastic(values, work.seed))
    else:
        work.parameter.copy_(values)


def codec_of(state: CodedState) -> tuple[Codec, Role]:
    """The codec and role that a kernel's name stands for."""
    if not _BY_KERNEL_NAME or state.codec not in _BY_KERNEL_NAME:
        for codec in CODECS.values():
            for role, name in codec.kernel_names.items():
                _BY_KERNEL_NAME.setdefault(name, (codec, role))
    return _BY_KERNEL_NAME[state.codec]


def _decoded(state: CodedState, work: Work) -> torch.Tensor:
    codec, role = codec_of(state)
    parts = Parts(state.codes, state.scales, state.correction, state.columns)
    return codec.decode(parts, role, state.block, (work.rows, work.row))


def _encode(state: CodedState, values: torch.Tensor) -> None:
    codec, role = codec_of(state)
    made = codec.encode(values, role, state.block)
    _copy(state.codes, made.codes)
    _copy(state.scales, made.scales)
    _copy(state.correction, made.correction)
    _copy(state.columns, made.columns)


def _copy(target: Any, source: torch.Tensor | None) -> None:
    if source is not None:
        target.copy_(source.reshape(target.shape))
