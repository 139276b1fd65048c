"""State of another library's optimizer, into one of this package.

Owns what is done with each parameter. Promises that codes are taken over as they are where the
format is the same, that all else is decoded and encoded anew, and that what does not fit is refused
before the optimizer is touched.
"""

from collections.abc import Mapping
from typing import Any

import torch

from everstep.client.optim.codecs import Codec, Parts, Role
from everstep.client.optim.interchange import bitsandbytes, torchao
from everstep.client.optim.interchange.account import ANEW, PLAIN, SAME, Account, Conversion
from everstep.client.optim.interchange.blocks import Blocks
from everstep.client.optim.optimizer import Optimizer
from everstep.client.optim.slots import STEP, Wanted, chosen
from everstep.proto.errors import InvalidConfiguration
from everstep.snapshot.placement import is_distributed


def import_state_dict(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Account:
    """Load the state of another library's optimizer of the same method.

    Args:
        optimizer: Of this package, with as many groups and parameters.
        state_dict: Of bitsandbytes, torchao or torch; of each parameter it is found out.

    Returns:
        What was taken over as it is, and what was encoded anew.

    Raises:
        InvalidConfiguration: If it does not fit; the optimizer is as it was.
    """
    account = Account()
    ours = optimizer.state_dict()["param_groups"]
    groups = state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in ours]:
        raise InvalidConfiguration("param_groups", "other numbers of parameters than here")
    state: dict[int, dict[str, Any]] = {}
    for group, foreign, live in zip(ours, groups, optimizer.param_groups, strict=True):
        for index, other, parameter in zip(
            group["params"], foreign["params"], live["params"], strict=True
        ):
            if other in state_dict["state"]:
                entry = state_dict["state"][other]
                state[index] = _imported(optimizer, live, parameter, entry, index, account)
        group.update(_options(group, foreign))
    optimizer.load_state_dict({"state": state, "param_groups": ours})
    return account


def _options(ours: Mapping[str, Any], foreign: Mapping[str, Any]) -> dict[str, Any]:
    """What both optimizers have in their groups: learning rate, betas and so on."""
    found = {}
    foreign = bitsandbytes.options_here(foreign)
    for key in ours.keys() & foreign.keys() - {"params", "param_names"}:
        value = foreign[key]
        found[key] = value.item() if isinstance(value, torch.Tensor) else value
    return found


def wanted_of(group: Mapping[str, Any]) -> Wanted:
    """What a group asks for its states."""
    return Wanted(group["codec"], group["block"], group["min_elements"], group["master"])


def _imported(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: torch.Tensor,
    entry: Mapping[str, Any],
    index: int,
    account: Account,
) -> dict[str, Any]:
    name = f"parameter {index}"
    if is_distributed(parameter):
        problem = "it is distributed; import before it is, or into an optimizer of the whole model"
        raise InvalidConfiguration(name, problem)
    shape = tuple(parameter.shape)
    if bitsandbytes.is_one(entry):
        found = bitsandbytes.read(entry, optimizer.states, shape)
    else:
        found = torchao.read(entry, optimizer.states, shape)
    codec, block = chosen(parameter, wanted_of(group), name)
    # Optimizers that count no steps (SGD of torch) have taken one, or they had no state.
    made: dict[str, Any] = {STEP: torch.tensor(float(entry.get(STEP, 1)), dtype=torch.float32)}
    for state, role in optimizer.states:
        parts, outcome, reason = _converted(found[state], codec, role, block, shape)
        for part, tensor in parts.named().items():
            key = state if codec.plain else f"{state}.{part}"
            made[key] = tensor.to(parameter.device)
        account.conversions.append(Conversion(index, state, outcome, reason))
    return made


def _converted(
    value: torch.Tensor | Blocks, codec: Codec, role: Role, block: int, shape: tuple[int, ...]
) -> tuple[Parts, str, str]:
    """A state in a codec, and what became of it."""
    if isinstance(value, Blocks):
        reason = value.foreign_to(codec.name, role, block, shape)
        if reason is None:
            return value.parts(codec.name, shape), SAME, ""
        values = value.decoded(shape)
    else:
        reason, values = "it was not in codes", value.float()
    if codec.plain:
        return codec.encode(values, role, block), PLAIN, ""
    return codec.encode(values, role, block), ANEW, reason
