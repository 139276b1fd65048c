"""State of an optimizer of this package, as another library's loads it.

Owns what is done with each parameter. Promises that codes go as they are where the format is the
same, and that the account says what does not.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch

from everstep.client.optim.codecs import Codec, Parts, Role
from everstep.client.optim.interchange import bitsandbytes, torchao
from everstep.client.optim.interchange.account import ANEW, PLAIN, SAME, Account, Conversion
from everstep.client.optim.interchange.blocks import Blocks, encoded, from_parts, straddling
from everstep.client.optim.interchange.importing import wanted_of
from everstep.client.optim.optimizer import Optimizer
from everstep.client.optim.slots import STEP, chosen, decoded
from everstep.proto.errors import InvalidConfiguration
from everstep.snapshot.placement import is_distributed

Format: TypeAlias = Literal["torch", "bitsandbytes", "torchao"]
FORMATS = ("torch", "bitsandbytes", "torchao")
_OWN_OPTIONS = {
    "block",
    "clip_norm",
    "codec",
    "master",
    "method",
    "min_elements",
    "role",
    "seed",
    "stochastic_rounding",
}


def export_state_dict(optimizer: Optimizer, to: Format = "torch") -> tuple[dict[str, Any], Account]:
    """The state as another library's optimizer of the same method loads it.

    To "torch" all is decoded to fp32. To "bitsandbytes" and "torchao", codes that have the same
    format go as they are; else states that these libraries would hold in codes are encoded in
    theirs (8 bits; for torchao 4 where they have 4 here, and plain fp32 where they have FP8).

    Args:
        optimizer: Of this package.
        to: The library.

    Returns:
        The state dict, and what became of each state.

    Raises:
        InvalidConfiguration: If the library is not one of these, or is not installed.
    """
    if to not in FORMATS:
        raise InvalidConfiguration("to", f"{to!r} is not one of {', '.join(FORMATS)}")
    account = Account()
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    for group, live in zip(groups, optimizer.param_groups, strict=True):
        for index, parameter in zip(group["params"], live["params"], strict=True):
            if optimizer.state.get(parameter):
                state[index] = _exported(optimizer, live, parameter, index, to, account)
    kept = [{k: v for k, v in group.items() if k not in _OWN_OPTIONS} for group in groups]
    if to == "bitsandbytes":
        kept = [bitsandbytes.options_there(group) for group in kept]
    if to == "torchao":
        kept = [{**group, "lr": torch.tensor(float(group["lr"]))} for group in kept]
    return {"state": state, "param_groups": kept}, account


def _exported(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: torch.Tensor,
    index: int,
    to: Format,
    account: Account,
) -> dict[str, Any]:
    if is_distributed(parameter):
        raise InvalidConfiguration(f"parameter {index}", "it is distributed: gather it first")
    state = optimizer.state[parameter]
    held_with = chosen(parameter, wanted_of(group), f"parameter {index}")
    states: dict[str, torch.Tensor | Blocks] = {}
    for name, role in optimizer.states:
        value, outcome, reason = _one(parameter, state, name, role, held_with, to)
        states[name] = value
        account.conversions.append(Conversion(index, name, outcome, reason))
    step = state[STEP]
    if to == "bitsandbytes":
        return bitsandbytes.write(states, optimizer.states, tuple(parameter.shape), int(step))
    roles = dict(optimizer.states)
    shape = tuple(parameter.shape)
    made: dict[str, Any] = {STEP: step.clone()}
    for name, value in states.items():
        if isinstance(value, Blocks):
            made[name] = torchao.write(value, _torchao_codec(held_with[0]), roles[name], shape)
        else:
            made[name] = value
    return made


def _torchao_codec(codec: Codec) -> str:
    return "4bit" if codec.name.startswith("4bit") else "dynamic"


def _one(
    parameter: torch.Tensor,
    state: Mapping[str, Any],
    name: str,
    role: Role,
    held_with: tuple[Codec, int],
    to: Format,
) -> tuple[torch.Tensor | Blocks, str, str]:
    """One state for a library, and what became of it."""
    codec, block = held_with
    shape = tuple(parameter.shape)
    values = decoded(parameter, dict(state), name, role, held_with)
    if values is None:
        raise InvalidConfiguration(f"state {name}", "it is missing")
    if (
        codec.plain
        or to == "torch"
        or (to == "torchao" and codec.name in ("fp8", "bf16", "bf16+8"))
    ):
        return values.clone(), PLAIN, ""
    target = "dynamic" if to == "bitsandbytes" else _torchao_codec(codec)
    size = torchao.BLOCKS[target]
    if codec.name != target:
        reason = f"{codec.name} is not known there"
    elif block != size:
        reason = f"blocks of {block}, there of {size}"
    else:
        reason = straddling(shape, size) or ""
    if to == "torchao" and values.numel() % size:
        return values.clone(), PLAIN, ""
    if reason:
        return encoded(values, target, role, size), ANEW, reason
    parts = Parts(state[f"{name}.codes"], state[f"{name}.scales"])
    return from_parts(parts, target, role, size, shape), SAME, ""
