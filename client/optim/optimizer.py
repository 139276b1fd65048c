"""The optimizer that all methods share: groups, state, scales of gradients, and the step.

Owns what torch.optim.Optimizer asks of one, and the tables that kernels step. Promises that state
is plain tensors under plain keys (`torch.load(weights_only=True)` reads it), that loading casts
nothing, that the same bits come of any number of threads, and that a step without a found_inf does
not wait for a device. Does not promise the same bits as torch's optimizers: sums are bracketed
otherwise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeAlias, TypedDict, Unpack

import torch

from everstep.client.optim import dispatch
from everstep.client.optim.arguments import flag, not_negative, number, whole
from everstep.client.optim.clipping import coefficient, total_norm
from everstep.client.optim.codecs import MIN_ELEMENTS, Role, codec_named, valid_block
from everstep.client.optim.rounding import seed_of
from everstep.client.optim.slots import STEP, Slot, Wanted, made_slot
from everstep.client.optim.spread import local_gradient
from everstep.kernels.optimizer_work import Work
from everstep.proto.errors import InvalidConfiguration

Parameters: TypeAlias = Iterable[Any]
"""Parameters, (name, parameter) pairs, or groups of them, as torch.optim takes them."""

MASTERS = ("bf16_int8",)
_GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Options(TypedDict, total=False):
    """What every optimizer here takes; all but `kernels` may differ by group.

    Attributes:
        codec: How states are held: "int8", "dynamic", "4bit", "4bit-rank1", "fp8", "bf16",
            "bf16+8", "fp32".
        block: Elements that share a scale; None: the codec's own.
        min_elements: Parameters with fewer keep fp32 states.
        maximize: Go up instead of down.
        clip_norm: The norm that gradients are clipped to in the step itself, over all groups that
            have the same; None: not at all.
        master: "bf16_int8": bf16 parameters get an int8 correction, and are stepped as 24 bits.
        stochastic_rounding: bf16 parameters without a master copy are rounded at random.
        seed: Of that.
        kernels: "auto", or "reference" for torch alone, which is slow.
    """

    codec: str
    block: int | None
    min_elements: int
    maximize: bool
    clip_norm: float | None
    master: str | None
    stochastic_rounding: bool
    seed: int
    kernels: dispatch.Choice


_SHARED: dict[str, Any] = {
    "codec": "int8",
    "block": None,
    "min_elements": MIN_ELEMENTS,
    "maximize": False,
    "clip_norm": None,
    "master": None,
    "stochastic_rounding": False,
    "seed": 0,
}


class Optimizer(torch.optim.Optimizer):
    """A method of `methods/` on parameters whose states are held with codecs.

    Args:
        params: Parameters or groups.
        own: The method's own options and their defaults.
        options: Those of `Options`.

    Raises:
        InvalidConfiguration: If an option is unknown or out of range, by name and value.

    Attributes:
        method: What kernels know it as.
        states: Names and roles of its states, in the order of `optimizer_work.METHODS`.
        scalars_differ: Whether parameters of one group and step have scalars of their own.
    """

    method: ClassVar[str]
    states: ClassVar[tuple[tuple[str, Role], ...]]
    scalars_differ: ClassVar[bool] = False
    _step_supports_amp_scaling = True

    def __init__(self, params: Parameters, own: dict[str, Any], **options: Unpack[Options]) -> None:
        self._forget()
        asked: dict[str, Any] = dict(options)
        self.kernels = asked.pop("kernels", "auto")
        if self.kernels not in dispatch.CHOICES:
            problem = f"{self.kernels!r} is not one of {', '.join(dispatch.CHOICES)}"
            raise InvalidConfiguration("kernels", problem)
        for name, value in asked.items():
            if name not in _SHARED:
                raise InvalidConfiguration(name, f"{value!r} was given, and it is no option here")
        super().__init__(params, {**own, **_SHARED, **asked})

    def scalars(self, group: dict[str, Any], step: int, state: dict[str, Any]) -> tuple[float, ...]:
        """The method's fp32 scalars for one step, in the order of `optimizer_work.METHODS`.

        Args:
            group: The options.
            step: Counted from 1.
            state: The parameter's; to be used only where `scalars_differ`.
        """
        raise NotImplementedError

    def check(self, group: dict[str, Any]) -> None:
        """Refuse options of a group that are out of range; methods add to it."""
        not_negative(group, "lr")
        codec = codec_named(group["codec"])
        group["block"] = valid_block(codec, group["block"])
        whole(group, "min_elements", "seed")
        flag(group, "maximize", "stochastic_rounding")
        if group["clip_norm"] is not None and number(group, "clip_norm") <= 0:
            raise InvalidConfiguration("clip_norm", f"{group['clip_norm']!r} is not positive")
        if group["master"] is not None and group["master"] not in MASTERS:
            problem = f"{group['master']!r} is neither None nor one of {', '.join(MASTERS)}"
            raise InvalidConfiguration("master", problem)
        if group["master"] is not None and group["stochastic_rounding"]:
            raise InvalidConfiguration(
                "stochastic_rounding", f"True, and master is {group['master']!r}: choose one"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; its options are checked.

        Raises:
            InvalidConfiguration: If an option is out of range. The group is not added.
        """
        super().add_param_group(param_group)
        try:
            self.check(self.param_groups[-1])
        except InvalidConfiguration:
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradients that there are.

        Args:
            closure: Computes the loss and gradients anew; its result is returned.

        Raises:
            InvalidConfiguration: If a parameter or gradient cannot be stepped: nothing was.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None or not bool(found_inf.item()):
                self._step()
        return loss

    def prepare(self) -> None:
        """Make the states of all parameters that require gradients, as the first step would.

        It gives `Client.restore` tensors to fill in place, also of parameters that ranks share.
        """
        for ordinal, group, parameter in self._members():
            if parameter.requires_grad:
                self._slot(parameter, group, self._wanted(group), ordinal)

    def before_step(self, slots: list[Slot]) -> None:
        """What a method does once all gradients are there, before steps are counted."""

    def advance(self, slots: list[Slot], grad_scale: torch.Tensor, key: Any) -> None:
        """Step parameters of one device whose gradients have one scale."""
        self.run(self.method, slots, [slot.work for slot in slots], grad_scale, key)

    def run(
        self,
        method: str,
        slots: list[Slot],
        works: list[Work],
        grad_scale: torch.Tensor,
        key: Any = None,
    ) -> None:
        """Step works by one of the kernels' methods.

        Args:
            method: One of `optimizer_work.METHODS`.
            slots: Whose works they are, all of one kind.
            works: As many.
            grad_scale: One fp32 on their device.
            key: Under which their table is kept for the next step; None: it is not.
        """
        kept = None if key is None else self._tables.get((method, key))
        if kept is not None and kept[0] == slots:
            table = kept[1]
            table.refresh(works)
        else:
            device, is_unknown = slots[0].kind
            choice: dispatch.Choice = "reference" if is_unknown else self.kernels
            table = dispatch.table(works, method, device, choice)
            if key is not None:
                self._tables[method, key] = (slots, table)
        table.step(grad_scale)

    def _step(self) -> None:
        slots = self.with_gradients()
        buckets = _buckets(slots)
        scales = self._scales(buckets)
        self.before_step(slots)
        self._count(slots)
        for key, same in buckets.items():
            if same:
                self.advance(same, scales[key], key)
        for slot in slots:
            slot.work.gradient = None
            if slot.is_staged:
                slot.local.copy_(slot.work.parameter)
        self.touch(slots)

    def touch(self, slots: list[Slot]) -> None:
        """Count a change of what kernels write behind torch's back: autograd and captures go by
        the versions."""
        torch.autograd.graph.increment_version([t for slot in slots for t in slot.changed])

    def with_gradients(self) -> list[Slot]:
        """Slots of all parameters that have a gradient, which their works are given."""
        found, known, states = [], self._slots, self.state
        wanted, last = None, None
        for ordinal, group, parameter in self._members():
            gradient = parameter.grad
            if gradient is None:
                continue
            if group is not last:
                wanted, last = self._wanted(group), group
            assert wanted is not None
            slot = known.get(parameter)
            if slot is None or not slot.is_current(states[parameter], wanted):
                slot = self._slot(parameter, group, wanted, ordinal)
            slot.group = group
            slot.work.gradient = _usable(slot, gradient)
            if slot.is_staged:
                slot.work.parameter.copy_(slot.local)
            found.append(slot)
        return found

    def _count(self, slots: list[Slot]) -> None:
        """Count the step, and set what depends on its number."""
        known: dict[tuple[int, int], tuple[float, ...]] = {}
        for slot in slots:
            group, step, work = slot.group, int(slot.count) + 1, slot.work
            slot.count[()] = step
            if self.scalars_differ:
                work.scalars = self.scalars(group, step, self.state[slot.parameter])
            else:
                scalars = known.get((id(group), step))
                if scalars is None:
                    scalars = known[id(group), step] = self.scalars(group, step, {})
                work.scalars = scalars
            work.seed = 0
            if group["stochastic_rounding"]:
                work.seed = seed_of(group["seed"], slot.ordinal, step, slot.offset)

    def _scales(self, buckets: dict[Any, list[Slot]]) -> dict[Any, torch.Tensor]:
        """What each bucket's gradients are multiplied with."""
        amplified = getattr(self, "grad_scale", None)
        by_clip: dict[float | None, list[Any]] = {}
        for key in buckets:
            by_clip.setdefault(key[3], []).append(key)
        scales = {}
        for clip_norm, keys in by_clip.items():
            scale = None
            if amplified is not None:
                scale = amplified.float().reciprocal().reshape(1)
            if clip_norm is not None:
                scale = self.constant(keys[0][0]) if scale is None else scale
                norm = total_norm([slot for key in keys for slot in buckets[key]], scale)
                scale = scale * coefficient(norm, clip_norm)
            for key in keys:
                device, _, maximize, _ = key
                if scale is None:
                    scales[key] = self.constant(device, maximize)
                else:
                    scales[key] = (-scale if maximize else scale).to(device)
        return scales

    def constant(self, device: torch.device, maximize: bool = False) -> torch.Tensor:
        """1, or -1, as an fp32 tensor that stays where it is."""
        kept = self._constants.get((device, maximize))
        if kept is None:
            kept = torch.full((1,), -1.0 if maximize else 1.0, device=device)
            self._constants[device, maximize] = kept
        return kept

    def _slot(
        self, parameter: torch.Tensor, group: dict[str, Any], wanted: Wanted, ordinal: int
    ) -> Slot:
        """Look at a parameter and its state anew."""
        state = self.state[parameter]
        before = self._held.get(parameter)
        name = _name(group, parameter, ordinal)
        slot = made_slot(parameter, state, self.states, wanted, before, ordinal, name)
        self._slots[parameter] = slot
        self._held[parameter] = (slot.codec.name, slot.block)
        return slot

    def _members(self) -> Iterator[tuple[int, dict[str, Any], torch.Tensor]]:
        """Ordinal, group and parameter of all parameters."""
        ordinal = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                yield ordinal, group, parameter
                ordinal += 1

    def _wanted(self, group: dict[str, Any]) -> Wanted:
        asked = (group["codec"], group["block"], group["min_elements"], group["master"])
        kept = self._wanteds.get(asked)
        if kept is None:
            kept = self._wanteds[asked] = Wanted(*asked)
        return kept

    def _forget(self) -> None:
        """Whatever follows from groups and state: it is made again when it is needed."""
        self._slots: dict[torch.Tensor, Slot] = {}
        self._held: dict[torch.Tensor, tuple[str, int]] = {}
        self._tables: dict[Any, tuple[list[Slot], dispatch.Stepper]] = {}
        self._constants: dict[tuple[torch.device, bool], torch.Tensor] = {}
        self._wanteds: dict[Any, Wanted] = {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a state over, as torch does, but with no dtype changed.

        Args:
            state_dict: Of an optimizer of this method, with any codec; or of torch's of that name.
        """
        super().load_state_dict({**state_dict, "state": _Uncast(state_dict["state"])})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("kernels", "auto")
        self._forget()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch's own, of which a first state knows nothing
                    group.setdefault(name, value)
            group["block"] = valid_block(codec_named(group["codec"]), group["block"])
            for parameter in group["params"]:
                if parameter in self.state:
                    self._held[parameter] = (group["codec"], group["block"])
                    _unwrap(parameter, self.state[parameter])


class _Kept:
    """A value that torch's load_state_dict does not look into."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Uncast(dict[Any, Any]):
    """The state of a state_dict, of which load_state_dict casts nothing.

    torch casts state to the parameter's dtype, codes (to fp32) and scales (to bf16) alike, through
    a function that a subclass cannot replace.
    """

    def items(self) -> Any:
        for key, state in super().items():
            if isinstance(state, dict):
                state = {name: _Kept(value) for name, value in state.items()}
            yield key, state


def _unwrap(parameter: torch.Tensor, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(value, _Kept):
            value = value.value
            if isinstance(value, torch.Tensor) and name != STEP:
                value = value.to(parameter.device)
            state[name] = value


def _usable(slot: Slot, gradient: torch.Tensor) -> torch.Tensor:
    """This rank's gradient as kernels take it: contiguous."""
    if slot.parameter is not slot.local:
        gradient = local_gradient(slot.parameter, gradient)
    if gradient.layout is not torch.strided or gradient.dtype not in _GRADIENT_DTYPES:
        found = gradient.dtype if gradient.layout is torch.strided else gradient.layout
        problem = f"its gradient is {found}; dense fp32, fp16 and bf16 can be"
        raise InvalidConfiguration(_name(slot.group, slot.parameter, slot.ordinal), problem)
    return gradient if gradient.is_contiguous() else gradient.contiguous()


def _buckets(slots: list[Slot]) -> dict[Any, list[Slot]]:
    """Slots that one table holds: device, kind of kernel, maximize, clip_norm."""
    found: dict[Any, list[Slot]] = {}
    group, kind, bucket = None, None, []
    for slot in slots:
        if slot.group is not group or slot.kind != kind:
            group, kind = slot.group, slot.kind
            bucket = found.setdefault((*kind, group["maximize"], group["clip_norm"]), [])
        if slot.work.rows and slot.work.row:
            bucket.append(slot)
    return {key: same for key, same in found.items() if same or key[3] is not None}


def _name(group: dict[str, Any], parameter: torch.Tensor, ordinal: int) -> str:
    names = group.get("param_names")
    for member, name in zip(group["params"], names or (), strict=False):
        if member is parameter:
            return f"parameter {name!r}"
    return f"parameter {ordinal} {tuple(parameter.shape)}"
