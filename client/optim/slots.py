"""One parameter's states as they are kept, and the work that a step makes of them.

Owns the keys in an optimizer's state (`exp_avg.codes`, `exp_avg.scales`, or plain `exp_avg`), their
first values, and the way from one codec to another when a group's codec was changed. Promises that
what is in the state is never cast, and that what does not fit is refused by its key. All-zero bytes
decode to zeros with every codec, so a new state is zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch

from everstep.client.optim.codecs import (
    CODECS,
    Codec,
    Parts,
    Role,
    codec_named,
    left_plain,
    rows_of,
    valid_block,
)
from everstep.client.optim.codecs.codec import CODES, PARTS, REFERENCE_ONLY, Form
from everstep.client.optim.spread import check_spread, offset_of, row_is_split, spread_like
from everstep.kernels.optimizer_work import CodedState, Work
from everstep.proto.errors import InvalidConfiguration
from everstep.snapshot.placement import local_of

MASTER = "master.correction"
STEP = "step"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a group asks for its states.

    Attributes:
        codec: By name.
        block: Elements that share a scale; None: the codec's own.
        min_elements: Smaller parameters keep fp32 states.
        master: "bf16_int8" or None.
    """

    codec: str
    block: int | None
    min_elements: int
    master: str | None


@dataclass(slots=True, eq=False)
class Slot:
    """A parameter, its state's tensors and its work.

    Attributes:
        parameter: As the optimizer has it.
        local: This rank's memory of it.
        address: Of that.
        wanted: What its group asked for when the slot was made.
        codec: What its states are held with; fp32 where they were left plain.
        block: Elements that share a scale.
        ordinal: Its place in the optimizer.
        offset: Of this rank's part.
        work: For kernels; its gradient is of the last step.
        keys: Of the state's tensors.
        tensors: These, to see whether they were replaced.
        step: The count of steps, as it is in the state.
        count: The same memory for numpy, which is ten times as fast.
        count_address: Of that.
        changed: What a step writes.
        kind: Device, and whether kernels lack the codec.
        group: The options of the last step.
    """

    parameter: torch.Tensor
    local: torch.Tensor
    address: int
    wanted: Wanted
    codec: Codec
    block: int
    ordinal: int
    offset: int
    work: Work
    keys: list[str]
    tensors: list[torch.Tensor]
    step: torch.Tensor
    count: Any
    count_address: int
    changed: list[torch.Tensor]
    kind: tuple[torch.device, bool]
    group: dict[str, Any] = field(default_factory=dict)

    def is_current(self, state: dict[str, Any], wanted: Wanted) -> bool:
        """Whether the parameter, its state and what is asked for are as they were."""
        local = self.local
        if self.wanted is not wanted and self.wanted != wanted:
            return False
        if self.parameter is not local and local_of(self.parameter) is not local:
            return False
        if local.data_ptr() != self.address or self.step.data_ptr() != self.count_address:
            return False
        return all(map(is_, map(state.get, self.keys), self.tensors))

    @property
    def is_staged(self) -> bool:
        """Whether the parameter is stepped in a contiguous copy."""
        return self.work.parameter is not self.local


def made_slot(
    parameter: torch.Tensor,
    state: dict[str, Any],
    states: Sequence[tuple[str, Role]],
    wanted: Wanted,
    before: tuple[str, int] | None,
    ordinal: int,
    name: str,
) -> Slot:
    """Look at a parameter's state, make what is missing and convert what is held otherwise.

    Args:
        parameter: Of one of the optimizer's groups.
        state: Its state, changed in place.
        states: Names and roles of the method's states.
        wanted: What its group asks for.
        before: Codec and block that coded states there are held with; None: those wanted.
        ordinal: The parameter's place in the optimizer.
        name: The parameter's, for errors.

    Raises:
        InvalidConfiguration: If the parameter, or a tensor of its state, cannot be.
    """
    local = local_of(parameter)
    _check_parameter(parameter, local, name)
    codec, block = chosen(parameter, wanted, name)
    shape = tuple(local.shape)
    held: list[tuple[str, torch.Tensor]] = []
    coded = []
    old = (codec_named(before[0]), before[1]) if before else (codec, block)
    for key, role in states:
        _settle(parameter, state, key, role, (codec, block), old, name)
        tensors = {part: state[_key(codec, key, part)] for part in codec.forms(shape, role, block)}
        held += [(_key(codec, key, part), tensor) for part, tensor in tensors.items()]
        mine = {part: local_of(tensor) for part, tensor in tensors.items()}
        coded.append(CodedState(codec.kernel_names[role], block, **mine))
    correction = _master(parameter, state, wanted, held, name)
    held.append((STEP, _counted(state)))
    rows, row = rows_of(shape)
    stepped = local if local.is_contiguous() else local.detach().contiguous()
    work = Work(rows, row, stepped, None, tuple(coded), (), correction)
    return Slot(
        parameter,
        local,
        local.data_ptr(),
        wanted,
        codec,
        block,
        ordinal,
        offset_of(parameter),
        work,
        [key for key, _ in held],
        [tensor for _, tensor in held],
        state[STEP],
        state[STEP].numpy(),
        state[STEP].data_ptr(),
        [local, *(local_of(tensor) for _, tensor in held)],
        (local.device, any(one.codec.startswith(REFERENCE_ONLY) for one in coded)),
    )


def chosen(parameter: torch.Tensor, wanted: Wanted, name: str) -> tuple[Codec, int]:
    """The codec and block that a parameter's states are held with."""
    codec = codec_named(wanted.codec)
    split = row_is_split(parameter)
    if left_plain(codec, tuple(parameter.shape), wanted.min_elements, row_split=split):
        codec = CODECS["fp32"]
    block = valid_block(codec, wanted.block)
    check_spread(parameter, codec, block, name)
    return codec, block


def decoded(
    parameter: torch.Tensor,
    state: dict[str, Any],
    key: str,
    role: Role,
    held_with: tuple[Codec, int],
) -> torch.Tensor | None:
    """This rank's part of a state in fp32, however it is held; None if there is none."""
    shape = tuple(local_of(parameter).shape)
    if isinstance(state.get(key), torch.Tensor):
        return local_of(state[key]).float()
    codec, block = held_with
    forms = codec.forms(shape, role, block)
    if codec.plain or any(f"{key}.{part}" not in state for part in forms):
        return None
    parts = {part: local_of(state[f"{key}.{part}"]) for part in forms}
    return codec.decode(Parts(**parts), role, block, shape)


def _key(codec: Codec, key: str, part: str) -> str:
    return key if codec.plain else f"{key}.{part}"


def _settle(
    parameter: torch.Tensor,
    state: dict[str, Any],
    key: str,
    role: Role,
    now: tuple[Codec, int],
    before: tuple[Codec, int],
    name: str,
) -> None:
    """See that one state is there and is held as it is to be."""
    codec, block = now
    local = local_of(parameter)
    is_plain = isinstance(state.get(key), torch.Tensor)
    is_coded = isinstance(state.get(f"{key}.{CODES}"), torch.Tensor)
    if role not in codec.kernel_names:
        raise InvalidConfiguration("codec", f"{codec.name!r} does not hold {key}, a {role} state")
    if is_plain:
        # torch's own optimizers have state of the parameter's dtype.
        as_it_is = Form(tuple(local.shape), local_of(state[key]).dtype)
        _check_form(state[key], as_it_is, f"{name}, state {key}", "fp32")
        if codec.plain and as_it_is.dtype == torch.float32:
            _check_forms(local, state, key, role, now, name)
            return
    elif is_coded:
        _check_forms(local, state, key, role, before, name)
        if now == before:
            return
    values = decoded(parameter, state, key, role, before) if is_plain or is_coded else None
    for part in PARTS:
        state.pop(f"{key}.{part}", None)
    state.pop(key, None)
    if values is None:
        made = _zeros(local, codec, role, block)
    else:
        made = codec.encode(values.to(local.device), role, block).named()
    whole = codec.forms(tuple(parameter.shape), role, block)
    for part, tensor in made.items():
        state[_key(codec, key, part)] = spread_like(tensor, whole[part], parameter)


def _zeros(local: torch.Tensor, codec: Codec, role: Role, block: int) -> dict[str, torch.Tensor]:
    forms = codec.forms(tuple(local.shape), role, block)
    return {
        part: torch.zeros(form.shape, dtype=form.dtype, device=local.device)
        for part, form in forms.items()
    }


def _check_forms(
    local: torch.Tensor,
    state: dict[str, Any],
    key: str,
    role: Role,
    held_with: tuple[Codec, int],
    name: str,
) -> None:
    """Tensors of a state have the shapes and dtypes that its codec gives them, and lie flat."""
    codec, block = held_with
    for part, form in codec.forms(tuple(local.shape), role, block).items():
        at = _key(codec, key, part)
        _check_form(state.get(at), form, f"{name}, state {at}", codec.name)
        found = local_of(state[at])
        if found.is_contiguous() and found.device == local.device:
            continue
        if found is not state[at]:
            problem = f"it is on {found.device}, with strides {found.stride()}"
            raise InvalidConfiguration(f"{name}, state {at}", problem)
        state[at] = found.to(local.device).contiguous()


def _check_form(tensor: Any, form: Form, name: str, codec: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise InvalidConfiguration(name, f"codec {codec!r} wants it, and it is missing")
    found = local_of(tensor)
    if tuple(found.shape) != form.shape or found.dtype != form.dtype:
        raise InvalidConfiguration(
            name,
            f"it is {found.dtype} {tuple(found.shape)}, and codec {codec!r} wants {form.dtype} "
            f"{form.shape}",
        )


def _check_parameter(parameter: torch.Tensor, local: torch.Tensor, name: str) -> None:
    if local.layout != torch.strided:
        raise InvalidConfiguration(name, f"its layout is {local.layout}, which is not stepped")
    if local.dtype not in _DTYPES:
        raise InvalidConfiguration(name, f"its dtype is {local.dtype}; fp32, fp16 and bf16 can be")


def _counted(state: dict[str, Any]) -> torch.Tensor:
    """The count of steps, as a number in the host's memory."""
    step = state.get(STEP, 0.0)
    fits = isinstance(step, torch.Tensor) and step.dtype == torch.float32 and step.dim() == 0
    if not fits or step.device.type != "cpu":
        state[STEP] = torch.tensor(float(step), dtype=torch.float32)
    counted: torch.Tensor = state[STEP]
    return counted


def _master(
    parameter: torch.Tensor,
    state: dict[str, Any],
    wanted: Wanted,
    held: list[tuple[str, torch.Tensor]],
    name: str,
) -> torch.Tensor | None:
    """What a bf16 parameter lacks of its master copy; zeros at first."""
    local = local_of(parameter)
    if wanted.master is None or local.dtype != torch.bfloat16:
        state.pop(MASTER, None)
        return None
    if not isinstance(state.get(MASTER), torch.Tensor):
        zeros = torch.zeros(local.shape, dtype=torch.int8, device=local.device)
        whole = Form(tuple(parameter.shape), torch.int8)
        state[MASTER] = spread_like(zeros, whole, parameter)
    form = Form(tuple(local.shape), torch.int8)
    _check_form(state[MASTER], form, f"{name}, state {MASTER}", "bf16+8")
    held.append((MASTER, state[MASTER]))
    return local_of(state[MASTER])
