"""Optimizer state in fp32, in place of the codes that it was stored as.

Owns the way from `exp_avg.codes` and `exp_avg.scales` to `exp_avg`, as `everstep.optim` names them.
Promises that a few rows are decoded at a time (one, if it is long), and that state which cannot be
told apart is refused, never guessed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch

from everstep.client.attachment import dtype_named
from everstep.client.exporting.placeholders import Placeholders
from everstep.client.optim.codecs import Codec, Parts, Role, codec_named, rows_of, valid_block
from everstep.client.optim.codecs.codec import CODES, PARTS
from everstep.client.optim.state_names import ROLE_OF_STATE
from everstep.proto.errors import InvalidConfiguration, Refused
from everstep.snapshot.reshard import Box, Tensor

_ELEMENTS_AT_A_TIME = 1 << 21
_MASTER = "master"


class Reader(Protocol):
    """What reads a box of a tensor into memory."""

    def read(self, tensor: Tensor, box: Box, address: int) -> None:
        """Copy it there."""


@dataclass(slots=True)
class Decoded:
    """A state tensor that is made while it is written.

    Attributes:
        codec: Of its codes.
        role: Of the state.
        block: Elements that share a scale.
        shape: Of the state, which is its parameter's.
        parts: Where the codes, scales and corrections are.
    """

    codec: Codec
    role: Role
    block: int
    shape: tuple[int, ...]
    parts: dict[str, Tensor]

    @property
    def dtype(self) -> str:
        """Torch's name of the type."""
        return "float32"

    @property
    def elements(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape)

    def pieces(self, reader: Reader) -> Iterator[memoryview]:
        """All bytes of it, in order; each piece is good until the next is asked for.

        Raises:
            ShardCorrupt: If a unit does not match its digest.
        """
        rows, row = rows_of(self.shape)
        at_a_time = max(1, _ELEMENTS_AT_A_TIME // max(1, row))
        for first in range(0, rows, at_a_time):
            count = min(at_a_time, rows - first)
            part = (count, *self.shape[1:]) if len(self.shape) > 1 else self.shape
            # Scales of a single row are [1, blocks]: rows are counted, not the shape's dimensions.
            read = {
                name: _read(reader, tensor, first, count) for name, tensor in self.parts.items()
            }
            values = self.codec.decode(Parts(**read), self.role, self.block, part)
            yield values.contiguous().reshape(-1).numpy().data.cast("B")


def decoded(
    tree: dict[str, Any],
    names: Mapping[Any, str],
    shapes: Mapping[str, tuple[int, ...]],
    placeholders: Placeholders,
) -> dict[str, Any]:
    """An optimizer's tree with fp32 states, and groups that say so.

    Args:
        tree: Under indices, or under names.
        names: Of the parameters, by the tree's keys.
        shapes: Of parameters, by their names.
        placeholders: Know what the tree's tensors stand for.

    Raises:
        Refused: If it is unknown how a state is to be decoded. Nothing was written.
    """
    state, groups = tree.get("state"), tree.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        return tree
    made = {}
    for owner, entry in state.items():
        is_coded = isinstance(entry, dict) and any(_split(key)[1] == CODES for key in entry)
        if is_coded:
            name = names.get(owner, str(owner))
            found = _Entry(name, _held_with(owner, name, groups), shapes.get(name))
            made[owner] = found.decoded(entry, placeholders)
        else:
            made[owner] = entry
    plain = [{**group, **_plain(group)} for group in groups]
    return {**tree, "state": made, "param_groups": plain}


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {"codec": "fp32", "block": 0} if "codec" in group else {}


@dataclass(slots=True)
class _Entry:
    """The state of one parameter."""

    name: str
    held_with: tuple[Codec, int]
    shape: tuple[int, ...] | None

    def decoded(self, entry: Mapping[str, Any], placeholders: Placeholders) -> dict[str, Any]:
        """The same with fp32 states."""
        found: dict[str, dict[str, Any]] = {}
        made: dict[str, Any] = {}
        for key, value in entry.items():
            name, part = _split(key)
            if part and name != _MASTER:
                found.setdefault(name, {})[part] = value
            else:
                made[key] = value
        for name, parts in found.items():
            made[name] = self._state(name, parts, placeholders)
        return made

    def _state(
        self, name: str, parts: Mapping[str, Any], placeholders: Placeholders
    ) -> torch.Tensor:
        codec, block = self.held_with
        role: Any = ROLE_OF_STATE.get(name)
        if role not in codec.kernel_names:
            raise self._refused(name, "it is unknown what kind of number it is")
        shape = self.shape
        if shape is None:
            shape = tuple(parts[CODES].shape)
            if codec.forms(shape, role, block)[CODES].shape != shape:
                raise self._refused(name, "the shape of its parameter is not in the snapshot")
        for part, form in codec.forms(shape, role, block).items():
            given = parts.get(part)
            if given is None or tuple(given.shape) != form.shape or given.dtype != form.dtype:
                raise self._refused(name, f"{part} are not as codec {codec.name!r} has them")
        sources = {part: placeholders.source(tensor) for part, tensor in parts.items()}
        known = {part: source for part, source in sources.items() if isinstance(source, Tensor)}
        return placeholders.stand_for(Decoded(codec, role, block, shape, known))

    def _refused(self, name: str, why: str) -> Refused:
        return Refused(
            f"the state {name} of {self.name} is not decoded: {why}. Nothing was written; export "
            "without --decode."
        )


def _held_with(owner: Any, called: str, groups: list[Any]) -> tuple[Codec, int]:
    """Codec and block of the group that a parameter is in; of all groups, if none says."""
    mine = [g for g in groups if isinstance(g.get("params"), list) and owner in g["params"]]
    asked = {(group.get("codec"), group.get("block")) for group in mine or groups}
    if len(asked) != 1:
        raise Refused(
            f"the state of {called} is not decoded: groups have different codecs, and it "
            "is unknown which one it is in. Nothing was written; export without --decode."
        )
    name, block = asked.pop()
    try:
        codec = codec_named(name)
        return codec, valid_block(codec, block)
    except InvalidConfiguration as error:
        raise Refused(
            f"the state of {called} is not decoded: {error} Nothing was written; export "
            "without --decode."
        ) from error


def _split(key: Any) -> tuple[str, str]:
    name, _, part = str(key).rpartition(".")
    return (name, part) if name and part in PARTS else (str(key), "")


def _read(reader: Reader, tensor: Tensor, first: int, count: int) -> torch.Tensor:
    """Some rows of a tensor; all of one that has a single row, such as scales of columns."""
    shape, offset = tensor.shape, (0,) * len(tensor.shape)
    if len(shape) > 1 and shape[0] > 1:
        shape, offset = (count, *shape[1:]), (first, *offset[1:])
    made = torch.empty(shape, dtype=dtype_named(tensor.dtype))
    reader.read(tensor, Box(offset, shape), made.data_ptr())
    return made
