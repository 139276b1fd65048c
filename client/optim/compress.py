"""Any torch optimizer, with its state in a codec between steps.

Owns the wrapper. The optimizer itself becomes an engine without state: for each step, parameter by
parameter (or group by group), states are decoded, the optimizer's own step runs on them, and they
are encoded again. So between steps there are codes alone, in checkpoints too, and during one there
is one parameter's state in full precision beside them. The step costs the optimizer's own eager
time and two passes of a codec; the optimizers of this package do both in one fused pass.

Promises: what cannot be held is refused when the optimizer is wrapped, with the reason; what is
held as it is, is told (`kept`, and once in the log). Codes of a DTensor parameter are DTensors,
placed as it is, where `spread.py` says that they can be. Numbers in groups that the optimizer
changes (a step counter, an annealed rate) change once a step, however many parts it is taken in.

Does not promise to notice that an optimizer mixes parameters in its step (a norm over all of them):
optimizers of `torch.optim` are taken a parameter at a time, others a group at a time.
"""

import logging
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal, cast, overload

import torch

from everstep.client.optim.codecs import (
    MIN_ELEMENTS,
    ROLES,
    Codec,
    Parts,
    Role,
    codec_named,
    left_plain,
    valid_block,
)
from everstep.client.optim.codecs.codec import CODES
from everstep.client.optim.engine import (
    check,
    numbers_of,
    own_step,
    state_made_for,
)
from everstep.client.optim.spread import check_spread, row_is_split, spread_like
from everstep.client.optim.state_names import LEFT_AS_THEY_ARE, ROLE_OF_STATE
from everstep.proto.errors import InvalidConfiguration, NotCompressible
from everstep.snapshot.placement import local_of

log = logging.getLogger("everstep")

_DTYPE = "dtype"
_WEIGHT_CODEC = "bf16+8"
_PROBE_SIZE = 8
_PLAIN = (bool, int, float, str, type(None))


def compress(
    optimizer: torch.optim.Optimizer,
    codec: str = "int8",
    *,
    block: int | None = None,
    roles: Mapping[str, str] | None = None,
    min_elements: int = MIN_ELEMENTS,
    at_a_time: Literal["parameter", "group"] | None = None,
) -> "Compressed":
    """Keep an optimizer's elementwise state in a codec between steps.

    Use the result in the optimizer's place, also for LR schedulers and hooks: the one given is
    taken over and must not be used any more.

    Args:
        optimizer: Fresh, or one that has stepped: its state is encoded at once.
        codec: For states, unless a group has a "codec" of its own. Weight-like states (averaged or
            anchored parameters) take "bf16+8" in place of codecs that are not for weights.
        block: Elements that share a scale; None: the codec's own.
        roles: By state name, "signed", "second" or "weight" where the name is not known, or "keep".
        min_elements: Parameters of fewer keep their states as they are.
        at_a_time: How much is in full precision during a step; None: a parameter where the
            optimizer is torch's, else a group.

    Raises:
        NotCompressible: If it has state that codes cannot hold; the reason says which.
        InvalidConfiguration: If an argument is none of its possible values, or a parameter is
            sharded so that blocks would lie across ranks.
    """
    return Compressed(optimizer, codec, block, dict(roles or {}), min_elements, at_a_time)


class Compressed(torch.optim.Optimizer):
    """A torch optimizer whose state is codes; made by `compress`.

    Attributes:
        engine: The optimizer that does the arithmetic; has no state between steps.
        kept: Why a state, by its name, stays as it is.
    """

    def __init__(
        self,
        engine: torch.optim.Optimizer,
        codec: str,
        block: int | None,
        roles: dict[str, str],
        min_elements: int,
        at_a_time: str | None,
    ) -> None:
        for name, role in roles.items():
            if role not in (*ROLES, "keep"):
                raise InvalidConfiguration(
                    f"roles[{name!r}]", f"{role!r} is not one of {ROLES} or 'keep'"
                )
        if at_a_time not in (None, "parameter", "group"):
            raise InvalidConfiguration("at_a_time", f"{at_a_time!r} is not 'parameter' or 'group'")
        valid_block(codec_named(codec), block)
        check(engine)
        self.engine = engine
        self.kept: dict[str, str] = {}
        self._codec, self._block = codec, block
        self._roles = {**ROLE_OF_STATE, **dict.fromkeys(LEFT_AS_THEY_ARE, "keep"), **roles}
        self._min_elements = min_elements
        torchs = type(engine).__module__.startswith("torch.optim")
        self._whole_groups = (at_a_time or ("parameter" if torchs else "group")) == "group"
        self._probe(engine.param_groups)
        self._taken_over = False
        super().__init__(engine.param_groups, engine.defaults)
        self._taken_over = True
        for group in self.param_groups:
            self._set_defaults(group)
        for group in self.param_groups:
            for parameter in group["params"]:
                self._take(group, parameter)
        engine.state.clear()

    def _set_defaults(self, group: dict[str, Any]) -> None:
        group.setdefault("codec", self._codec)
        group.setdefault("block", self._block)
        codec = codec_named(group["codec"])
        block = valid_block(codec, group["block"])
        for number, parameter in enumerate(group["params"]):
            if not self._left_plain(codec, parameter):
                check_spread(parameter, codec, block, f"parameter {number} of its group")

    def _left_plain(self, codec: Codec, parameter: torch.Tensor) -> bool:
        split = row_is_split(parameter)
        shape = tuple(parameter.shape)
        return bool(left_plain(codec, shape, self._min_elements, row_split=split))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the optimizer itself would."""
        if not self._taken_over:
            self.param_groups.append(param_group)
            return
        self.engine.param_groups = self.param_groups
        self.engine.add_param_group(param_group)
        try:
            self._set_defaults(self.param_groups[-1])
        except InvalidConfiguration:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load codes, or the state of the optimizer uncompressed: the next step encodes it."""
        groups = state_dict["param_groups"]
        super().load_state_dict({**state_dict, "state": {}})
        saved = (index for group in groups for index in group["params"])
        live = (parameter for group in self.param_groups for parameter in group["params"])
        for index, parameter in zip(saved, live, strict=True):
            if index in state_dict["state"]:
                values = state_dict["state"][index].items()
                self.state[parameter] = {
                    key: _placed(value, key, parameter, index, groups) for key, value in values
                }
        for group in self.param_groups:
            self._set_defaults(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the optimizer, on decoded state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbers = numbers_of(self.engine)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            parts = [parameters] if self._whole_groups else [[p] for p in parameters]
            before = {key: value for key, value in group.items() if key != "params"}
            tensors = [(v, v.clone()) for v in before.values() if isinstance(v, torch.Tensor)]
            for part in filter(None, parts):
                vars(self.engine).update(numbers)
                for tensor, value in tensors:
                    tensor.copy_(value)
                self._step_of(group, before, part)
        return loss

    def _step_of(
        self, group: dict[str, Any], before: dict[str, Any], parameters: list[torch.Tensor]
    ) -> None:
        engine, sub = self.engine, {**before, "params": parameters}
        for parameter in parameters:
            if parameter in self.state:
                engine.state[parameter] = self._decoded(group, parameter)
        engine.param_groups = [sub]
        try:
            own_step(engine)
        finally:
            engine.param_groups = self.param_groups
            for parameter in parameters:
                self._take(group, parameter)
        group.update({key: value for key, value in sub.items() if key != "params"})

    def _take(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        """Encode what the engine has for a parameter."""
        state = self.engine.state.pop(parameter, None)
        if not state:
            return
        encoded: dict[str, Any] = {}
        for name, value in state.items():
            if not self._coded(parameter, name, value):
                encoded[name] = value
                continue
            codec, role, block = self._by_name(group, name)
            plain = codec.plain and value.dtype == torch.float32
            if plain or self._left_plain(codec, parameter):
                encoded[name] = value
                continue
            forms = codec.forms(tuple(parameter.shape), role, block)
            parts = codec.encode(local_of(value), role, block)
            for part, tensor in parts.named().items():
                encoded[f"{name}.{part}"] = spread_like(tensor, forms[part], parameter)
            if value.dtype != torch.float32:
                encoded[f"{name}.{_DTYPE}"] = torch.empty(0, dtype=value.dtype)
        self.state[parameter] = encoded

    def _decoded(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
        stored = self.state[parameter]
        state: dict[str, Any] = {}
        for key, value in stored.items():
            name, _, part = key.rpartition(".")
            if part == CODES and name:
                codec, role, block = self._by_name(group, name)
                kind = stored.get(f"{name}.{_DTYPE}")
                dtype = torch.float32 if kind is None else kind.dtype
                # As the optimizer itself made it: fused kernels want the parameter's strides.
                state[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
                whole = local_of(state[name])
                forms = codec.forms(whole.shape, role, block)
                parts = Parts(**{part: local_of(stored[f"{name}.{part}"]) for part in forms})
                whole.copy_(codec.decode(parts, role, block, whole.shape))
            elif part not in (*Parts._fields, _DTYPE) or not name:
                state[key] = value
        return state

    def _by_name(self, group: dict[str, Any], name: str) -> tuple[Codec, Role, int]:
        role = cast(Role, self._roles[name])
        codec = codec_named(group["codec"])
        if role not in codec.kernel_names:
            codec = codec_named(_WEIGHT_CODEC)
        return codec, role, valid_block(codec, group["block"])

    def _coded(self, parameter: torch.Tensor, name: str, value: Any) -> bool:
        """Whether a state is held as codes; what cannot be held at all is refused."""
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, _PLAIN):
                what = f"its state {name!r} is a {type(value).__name__}, not a tensor or a number"
                raise NotCompressible(type(self.engine).__name__, what)
            return False
        if not value.is_floating_point() or value.numel() == 1:
            return False
        if value.shape != parameter.shape:
            return self._keep(name, "its shape is not the parameter's")
        if name not in self._roles:
            return self._keep(name, "its name is not known; roles= can say what it is")
        if self._roles[name] == "keep":
            return self._keep(name, LEFT_AS_THEY_ARE.get(name, "as said by roles="))
        return True

    def _keep(self, name: str, reason: str) -> bool:
        if name not in self.kept:
            self.kept[name] = reason
            log.warning("%s: state %r stays as it is: %s", type(self.engine).__name__, name, reason)
        return False

    def _probe(self, groups: list[dict[str, Any]]) -> None:
        """See what state the optimizer makes, on stand-ins, before anything is changed."""
        seen = set()
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                shape = tuple(min(size, _PROBE_SIZE) for size in parameter.shape)
                if (number, len(shape)) not in seen and prod(shape):
                    seen.add((number, len(shape)))
                    stand_in = torch.full(shape, 0.5, dtype=parameter.dtype)
                    stand_in = torch.nn.Parameter(stand_in.to(parameter.device))
                    for name, value in state_made_for(self.engine, group, stand_in).items():
                        self._coded(stand_in, name, value)


def _placed(
    value: Any, key: str, parameter: torch.Tensor, index: int, groups: list[dict[str, Any]]
) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if key == "step":
        return torch.optim.Optimizer._process_value_according_to_param_policy(
            parameter, value.clone(), index, groups, key
        )
    return value.to(local_of(parameter).device, copy=True)
