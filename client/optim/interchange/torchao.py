"""State of torchao's low-bit optimizers: tensors of the classes OptimState8bit, 4bit and Fp8.

Owns the format, as of torchao 0.9 to 0.18: codes over 256 elements (4-bit: 128) of the flattened
tensor, the 8-bit table bitsandbytes', the 4-bit ones those of arXiv 2309.01507 with the first
element in the high half of a byte, FP8 a plain E4M3 of x / scale. Other tensors are plain. Objects
of the classes are read by their attributes; torchao is imported to make them, not to read them.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from everstep.client.optim.codecs import Role
from everstep.client.optim.interchange.blocks import Blocks
from everstep.proto.errors import InvalidConfiguration

KINDS = {"OptimState8bit": "dynamic", "OptimState4bit": "4bit", "OptimStateFp8": "fp8"}
"""The codec that a class is like."""

BLOCKS = {"dynamic": 256, "4bit": 128}


def is_one(entry: Mapping[str, Any]) -> bool:
    """Whether a parameter's state is of torchao, and not all plain."""
    return any(type(value).__name__ in KINDS for value in entry.values())


def read(
    entry: Mapping[str, Any], states: Sequence[tuple[str, Role]], shape: Sequence[int]
) -> dict[str, torch.Tensor | Blocks]:
    """A parameter's states by the names that they have here, which are the same.

    Raises:
        InvalidConfiguration: If one is missing, or not of the parameter's shape.
    """
    found: dict[str, torch.Tensor | Blocks] = {}
    for name, _ in states:
        value = entry.get(name)
        if not isinstance(value, torch.Tensor) and type(value).__name__ not in KINDS:
            raise InvalidConfiguration(name, "it is missing from the state that is imported")
        assert value is not None
        if tuple(value.shape) != tuple(shape):
            problem = f"its shape is {tuple(value.shape)}, the parameter's is {tuple(shape)}"
            raise InvalidConfiguration(name, problem)
        found[name] = _blocks(value) if type(value).__name__ in KINDS else value
    return found


def _blocks(value: Any) -> Blocks:
    codes = value.codes.reshape(-1)
    kind = KINDS[type(value).__name__]
    if kind == "4bit":
        codes = torch.stack([codes >> 4, codes & 15], -1).reshape(-1)
    table = None if kind == "fp8" else value.qmap
    block = codes.numel() // value.scale.numel()
    return Blocks(codes, value.scale, block, table)


def write(state: Blocks, codec: str, role: Role, shape: Sequence[int]) -> torch.Tensor:
    """An object of torchao's class for a codec.

    Raises:
        InvalidConfiguration: If torchao cannot be imported.
    """
    try:
        made: Any = import_module("torchao.optim.subclass_" + {"dynamic": "8bit"}.get(codec, codec))
    except ImportError as problem:
        raise InvalidConfiguration("to='torchao'", f"it cannot be imported: {problem}") from None
    signed = role == "signed"
    if codec == "4bit":
        codes = (state.codes[0::2] << 4) | state.codes[1::2]
        four: torch.Tensor = made.OptimState4bit(
            codes, state.scales, state.values, signed, tuple(shape), torch.float32
        )
        return four
    codes = state.codes.reshape(tuple(shape))
    eight: torch.Tensor = made.OptimState8bit(
        codes, state.scales, state.values, signed, torch.float32
    )
    return eight
