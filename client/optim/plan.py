"""Which parameter gets which method and codec, what that costs, and the groups that say so.

Owns the defaults by role and the table. Promises that a plan changes nothing: it reads names,
shapes and types; and that its bytes are those of the state that the optimizers will make, but for
the step (four bytes a parameter tensor). Of a distributed parameter it counts this rank's part.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch

from everstep.client.optim.codecs import codec_named, left_plain, valid_block
from everstep.client.optim.methods import method_named
from everstep.client.optim.roles import ROLES, Assigned, roles_of
from everstep.proto.errors import InvalidConfiguration
from everstep.snapshot.placement import local_of

_BYTES_OF_ADAMW = 8
_FOR_HIDDEN = ("4bit", "4bit-rank1")
_OF_OTHERS = "int8"
"""What embeddings, heads and vectors have in place of 4-bit codes."""

_FOR_MATRICES = ("Muon",)
_OTHERWISE = "AdamW"


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter's line.

    Attributes:
        parameter: Its name.
        shape: As the optimizer sees it here.
        role: One of `roles.ROLES`.
        method: The optimizer; "" for a frozen parameter.
        codec: Of its states, "fp32" where they stay as they are.
        state_bytes: Of all of its states.
        reason: Why this role, and why not the codec that was asked for.
    """

    parameter: str
    shape: tuple[int, ...]
    role: str
    method: str
    codec: str
    state_bytes: int
    reason: str


@dataclass(slots=True)
class Plan:
    """What `plan` gives: `str()` is the table.

    Attributes:
        method: What hidden matrices have.
        entries: One for each parameter, in the model's order.
        groups: Parameter groups for the optimizer, or optimizers, of the plan; each has its
            "params", "method", "role" and "codec", and what was given for its role.
    """

    method: str
    entries: list[Entry]
    groups: list[dict[str, Any]] = field(default_factory=list)

    @property
    def state_bytes(self) -> int:
        """Of all states."""
        return sum(entry.state_bytes for entry in self.entries)

    @property
    def elements(self) -> int:
        """Of all parameters that are trained."""
        return sum(prod(entry.shape) for entry in self.entries if entry.method)

    @property
    def adamw_bytes(self) -> int:
        """What AdamW in fp32 would have."""
        return _BYTES_OF_ADAMW * self.elements

    def optimizers(self, **options: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
        """One optimizer for each method, that of hidden matrices first.

        Args:
            options: For each method its arguments, e.g. ``Muon={"lr": 0.02}, AdamW={"lr": 3e-4}``.

        Raises:
            InvalidConfiguration: If options are for a method that the plan does not have.
        """
        methods = list(dict.fromkeys(group["method"] for group in self.groups))
        methods.sort(key=lambda name: name != self.method)
        for name in options:
            if name not in methods:
                raise InvalidConfiguration(name, f"the plan has {', '.join(methods)}")
        made: list[torch.optim.Optimizer] = []
        for name in methods:
            groups = [dict(group) for group in self.groups if group["method"] == name]
            made.append(method_named(name)(groups, **options.get(name, {})))
        return made

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        names = Entry.__slots__
        return {
            "parameters": [
                {name: getattr(entry, name) for name in names} for entry in self.entries
            ],
            "elements": self.elements,
            "state_bytes": self.state_bytes,
            "adamw_fp32_bytes": self.adamw_bytes,
        }

    def __str__(self) -> str:
        heads = ("parameter", "shape", "role", "method", "codec", "state", "")
        lines = [heads, *(_line(entry) for entry in self.entries)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        table = ["  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) for line in lines]
        share = self.state_bytes / self.adamw_bytes if self.adamw_bytes else 0.0
        each = self.state_bytes / self.elements if self.elements else 0.0
        table.append(
            f"{self.elements:,} elements, {_size(self.state_bytes)} of state: {each:.3f} bytes "
            f"each, {share:.1%} of the {_size(self.adamw_bytes)} of AdamW in fp32"
        )
        return "\n".join(line.rstrip() for line in table)


def plan(
    model: torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]],
    method: str = "AdamW",
    codec: str = "int8",
    *,
    block: int | None = None,
    roles: Mapping[str, str] | None = None,
    codecs: Mapping[str, str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """Decide on a method and a codec for each parameter.

    By default hidden matrices get what is asked for. Embeddings, heads and vectors get AdamW where
    the method is for matrices (Muon), and int8 where the codec has 4 bits.

    Args:
        model: A module, or what `named_parameters()` gives.
        method: The optimizer's name, e.g. "AdamW", "Lion", "Muon".
        codec: Of its states.
        block: Elements that share a scale; None: the codec's own.
        roles: Role by pattern of parameters' names, where the guess is wrong.
        codecs: Codec by role, or by pattern of names, which counts more.
        options: By role, what its groups have besides, e.g. ``{"vector": {"weight_decay": 0.0}}``.

    Raises:
        InvalidConfiguration: If a name is unknown, or a pattern matches nothing.
    """
    named = list(model.named_parameters() if isinstance(model, torch.nn.Module) else model)
    assigned = roles_of(model if isinstance(model, torch.nn.Module) else named, roles)
    method_named(method)
    valid_block(codec_named(codec), block)
    asked = _Codecs(codec, codecs or {}, [name for name, _ in named])
    for role in options or {}:
        if role not in ROLES:
            raise InvalidConfiguration(f"options[{role!r}]", f"it is not one of {ROLES}")
    found = Plan(method, [])
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, parameter in named:
        role = assigned[name].role
        shape = tuple(local_of(parameter).shape)
        if not parameter.requires_grad:
            found.entries.append(Entry(name, shape, role, "", "fp32", 0, "frozen: no state"))
            continue
        # Muon would flatten a stack of experts' matrices into one.
        is_matrix = role == "hidden" and len(shape) != 3
        own = _OTHERWISE if method in _FOR_MATRICES and not is_matrix else method
        chosen, why = asked.of(name, role)
        plain = left_plain(codec_named(chosen), tuple(parameter.shape))
        held = ("fp32", plain, None) if plain else (chosen, why, block)
        entry = _entry(name, shape, assigned[name], own, held)
        found.entries.append(entry)
        key = (own, role, chosen)
        group = groups.setdefault(key, {"params": [], "method": own, "role": role, "codec": chosen})
        group["params"].append(parameter)
        if block is not None and codec_named(chosen).block:
            group["block"] = block
        group.update((options or {}).get(role, {}))
    found.groups = list(groups.values())
    return found


class _Codecs:
    """Which codec a parameter gets, by role and by name."""

    def __init__(self, codec: str, codecs: Mapping[str, str], names: Sequence[str]) -> None:
        codec_named(codec)
        self._codec, self._codecs = codec, codecs
        for key, chosen in codecs.items():
            codec_named(chosen)
            if key not in ROLES and not any(fnmatchcase(name, key) for name in names):
                raise InvalidConfiguration(f"codecs[{key!r}]", "no role and no parameter's name")

    def of(self, name: str, role: str) -> tuple[str, str]:
        """A codec, and why it is not the plan's."""
        for pattern in reversed(list(self._codecs)):
            if pattern not in ROLES and fnmatchcase(name, pattern):
                return self._codecs[pattern], f"as said for {pattern}"
        if role in self._codecs:
            return self._codecs[role], f"as said for {role}"
        if self._codec in _FOR_HIDDEN and role != "hidden":
            return _OF_OTHERS, f"{self._codec} is for hidden matrices"
        return self._codec, ""


def _entry(
    name: str,
    shape: tuple[int, ...],
    assigned: Assigned,
    method: str,
    held: tuple[str, str, int | None],
) -> Entry:
    chosen, why, block = held
    codec = codec_named(chosen)
    size = sum(
        codec.bytes_of(shape, role, valid_block(codec, block))
        for _, role in method_named(method).states
    )
    reason = f"{assigned.reason}; {why}" if why else assigned.reason
    return Entry(name, shape, assigned.role, method, codec.name, size, reason)


def _line(entry: Entry) -> tuple[str, ...]:
    shape = "x".join(map(str, entry.shape)) or "scalar"
    size = _size(entry.state_bytes)
    return (
        entry.parameter,
        shape,
        entry.role,
        entry.method or "-",
        entry.codec,
        size,
        entry.reason,
    )


def _size(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"
