"""State of bitsandbytes' optimizers: `state1`, `state2`, their `absmax` and `qmap`.

Owns the format, as version 0.50 writes it and older ones do: since 0.49 tensors are nested under
`__bnb_optimizer_quant_state__`. Codes are those of the dynamic map over 256 elements of the
flattened tensor; tensors of fewer than 4096 elements are fp32 under the same names. AdEMAMix stacks
its two averages in `state1`. Looks at names and shapes alone: the library is not imported.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from everstep.client.optim.codecs import Role
from everstep.client.optim.interchange.blocks import Blocks
from everstep.proto.errors import InvalidConfiguration

NESTED = "__bnb_optimizer_quant_state__"
BLOCK = 256
_NAMES = {"t_alpha": "alpha_warmup", "t_beta3": "beta3_warmup"}
_AT_MOST = 2
"""Tensors of state that the format has."""


def is_one(entry: Mapping[str, Any]) -> bool:
    """Whether a parameter's state is of bitsandbytes."""
    return NESTED in entry or "state1" in entry


def read(
    entry: Mapping[str, Any], states: Sequence[tuple[str, Role]], shape: Sequence[int]
) -> dict[str, torch.Tensor | Blocks]:
    """A parameter's states by the names that they have here.

    Args:
        entry: Of the state dict.
        states: What the optimizer here has, in its order.
        shape: The parameter's.

    Raises:
        InvalidConfiguration: If the tensors are not those of such an optimizer.
    """
    entry = {**entry, **entry.get(NESTED, {})}
    found: dict[str, torch.Tensor | Blocks] = {}
    for place, names in enumerate(_places(states), start=1):
        codes, absmax = entry.get(f"state{place}"), entry.get(f"absmax{place}")
        if not isinstance(codes, torch.Tensor):
            raise InvalidConfiguration(f"state{place}", f"it is missing: {names} would be in it")
        for index, name in enumerate(names):
            part = codes[index] if len(names) > 1 else codes
            scales = absmax[index] if absmax is not None and len(names) > 1 else absmax
            found[name] = _one(part, scales, entry.get(f"qmap{place}"), shape, f"state{place}")
    if isinstance(entry.get(f"state{len(found) + 1}"), torch.Tensor) and len(found) < _AT_MOST:
        raise InvalidConfiguration(
            f"state{len(found) + 1}", f"the optimizer here has only {', '.join(found)}"
        )
    return found


def _places(states: Sequence[tuple[str, Role]]) -> list[list[str]]:
    """Which states are in `state1` and which in `state2`."""
    if len(states) <= _AT_MOST:
        return [[name] for name, _ in states]
    return [[name for name, _ in states[:-1]], [states[-1][0]]]


def _one(
    codes: torch.Tensor, absmax: Any, table: Any, shape: Sequence[int], name: str
) -> torch.Tensor | Blocks:
    if codes.numel() != prod(shape):
        problem = f"its shape is {tuple(codes.shape)}, the parameter's is {tuple(shape)}"
        raise InvalidConfiguration(name, problem)
    if codes.dtype != torch.uint8:
        return codes.reshape(tuple(shape))
    if not isinstance(absmax, torch.Tensor) or not isinstance(table, torch.Tensor):
        raise InvalidConfiguration(name, "it has codes, but no absmax or no qmap of them")
    block = -(-codes.numel() // absmax.numel())
    if absmax.numel() != -(-codes.numel() // BLOCK):
        raise InvalidConfiguration(
            name, f"blocks of {block} elements; only those of {BLOCK} are known (0.41 and newer)"
        )
    return Blocks(codes.reshape(-1), absmax.reshape(-1), BLOCK, table)


def write(
    states: Mapping[str, torch.Tensor | Blocks],
    order: Sequence[tuple[str, Role]],
    shape: Sequence[int],
    step: int,
) -> dict[str, Any]:
    """A parameter's state as bitsandbytes' `state_dict()` gives it.

    Args:
        states: By the names that they have here: in codes of the dynamic map, or fp32.
        order: The states of the optimizer.
        shape: The parameter's.
        step: Steps taken.
    """
    tensors: dict[str, torch.Tensor] = {}
    for place, names in enumerate(_places(order), start=1):
        held = [states[name] for name in names]
        shaped = [_codes(one).reshape(tuple(shape)) for one in held]
        tensors[f"state{place}"] = torch.stack(shaped) if len(names) > 1 else shaped[0]
        coded = [one for one in held if isinstance(one, Blocks)]
        if coded and coded[0].values is not None:
            scales = [one.scales for one in coded]
            tensors[f"absmax{place}"] = torch.stack(scales) if len(names) > 1 else scales[0]
            tensors[f"qmap{place}"] = coded[0].values
    return {"step": step, NESTED: tensors}


def _codes(state: torch.Tensor | Blocks) -> torch.Tensor:
    return state.codes if isinstance(state, Blocks) else state


def options_here(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options by the names that they have here."""
    found = {here: group[there] for there, here in _NAMES.items() if there in group}
    if "betas" in group and "momentum" not in group:
        found["momentum"], found["dampening"] = group["betas"][:2]
    return {**group, **found}


def options_there(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options by bitsandbytes' names, with those that its step reads."""
    found: dict[str, Any] = {"eps": 0.0, "alpha": 0.0, "t_alpha": None, "t_beta3": None, **group}
    for there, here in _NAMES.items():
        if here in found:
            found[there] = found.pop(here)
    if "momentum" in found:
        found["betas"] = (found.pop("momentum"), found.pop("dampening", 0.0))
    return found
