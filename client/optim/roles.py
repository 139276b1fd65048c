"""What a parameter is for: hidden matrix, embedding, head or vector.

Owns the rules: the module's type where a module is given, then shape, then the names that Hugging
Face, torchtitan, timm and nanoGPT give. Promises that every parameter has one role and the reason
for it; that a weight shared by embedding and head is an embedding; and that a matrix which is named
as neither is hidden. A guess all the same: `plan(roles={"pattern": role})` overrules it.
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from everstep.proto.errors import InvalidConfiguration

ROLES = ("hidden", "embedding", "head", "vector")

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_EMBEDDING = re.compile(r"(^|_)(wte|wpe|emb|embed|embeds|embedding|embeddings|embedder)(_|$)")
_EMBEDDING_NAMES = {
    "register_tokens",
    "relative_attention_bias",
}
_HEAD_NAMES = {
    "classifier",
    "embed_out",
    "fc",
    "head",
    "heads",
    "lm_head",
    "lm_heads",
    "mlm_head",
    "output",
    "qa_outputs",
    "score",
    "unembed",
    "unembedding",
}
_WITHIN_HEADS = {"decoder", "dense", "linear", "out_proj", "proj"}
_VECTOR_NAMES = {"A_log", "dt_bias"}
"""Matrices by shape, but a value for each element of a state space: nothing multiplies by them."""


class Assigned(NamedTuple):
    """A parameter's role and why it has it."""

    role: str
    reason: str


def roles_of(
    model: torch.nn.Module | Iterable[tuple[str, torch.Tensor]],
    overrides: Mapping[str, str] | None = None,
) -> dict[str, Assigned]:
    """The role of each parameter, by its name.

    Args:
        model: A module, or what `named_parameters()` gives, where types of modules are not known.
        overrides: Role by pattern of names (`fnmatch`); the last that matches counts.

    Raises:
        InvalidConfiguration: If an override names no role, or matches no parameter.
    """
    module = model if isinstance(model, torch.nn.Module) else None
    named = list(module.named_parameters() if module is not None else model)  # type: ignore[arg-type]
    kinds = {} if module is None else _by_type(module)
    found = {}
    for name, parameter in named:
        shape = tuple(parameter.shape)
        found[name] = kinds.get(name) if _matrix(name, shape) else None
        found[name] = found[name] or _by_name(name, shape)
    return _overruled({n: a for n, a in found.items() if a is not None}, overrides or {})


def _by_type(model: torch.nn.Module) -> dict[str, Assigned]:
    """What types of modules, and weights that several modules share, tell."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    also: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name != names[id(parameter)]:
            also.setdefault(id(parameter), []).append(name)
    kinds: dict[int, Assigned] = {}
    widest = 0
    for module in filter(_is_embedding, model.modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and id(weight) in names:
            shared = also.get(id(weight), [])[:2]
            reason = f"{type(module).__name__}{', also ' if shared else ''}{', '.join(shared)}"
            kinds[id(weight)] = Assigned("embedding", reason)
            widest = max(widest, weight.shape[0])
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Linear) or id(weight) in kinds or _numbered(path):
            continue
        if id(weight) in names and module.out_features == widest:
            kinds[id(weight)] = Assigned(
                "head", "Linear with an output for each row of an embedding"
            )
    return {names[key]: assigned for key, assigned in kinds.items()}


def _is_embedding(module: torch.nn.Module) -> bool:
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return isinstance(module, kinds) or type(module).__name__.endswith("Embedding")


def _numbered(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _matrix(name: str, shape: tuple[int, ...]) -> bool:
    return _not_a_matrix(name, shape) is None


def _not_a_matrix(name: str, shape: tuple[int, ...]) -> str | None:
    if name.rpartition(".")[2] in _VECTOR_NAMES:
        return f"{name.rpartition('.')[2]} is no matrix"
    if len(shape) < 2:
        return f"{len(shape)}-dimensional"
    if sum(size > 1 for size in shape) < 2:
        return "one row or column"
    if len(shape) > 2 and shape[1] == 1:
        return "a convolution of single channels"
    return None


def _parts(name: str) -> list[str]:
    return [part for part in name.split(".") if part not in _WRAPPERS]


def _named_embedding(parts: list[str]) -> str | None:
    if parts[:-1] == ["shared"]:
        return "shared"
    for part in parts:
        if part in _EMBEDDING_NAMES or (_EMBEDDING.search(part) and part not in _HEAD_NAMES):
            return part
    return None


def _named_head(parts: list[str]) -> str | None:
    """The part of a name that says head: outside of numbered layers, and near the end."""
    for place, part in enumerate(parts):
        if part.isdigit():
            return None
        rest = parts[place + 1 :]
        if rest and rest[-1] in ("weight", "bias"):
            rest = rest[:-1]
        if part == "predictions" and rest == ["decoder"]:
            return part
        if part in _HEAD_NAMES and all(r.isdigit() or r in _WITHIN_HEADS for r in rest):
            return part
    return None


def _by_name(name: str, shape: tuple[int, ...]) -> Assigned:
    reason = _not_a_matrix(name, shape)
    if reason is not None:
        return Assigned("vector", reason)
    parts = _parts(name)
    head = _named_head(parts)
    if head is not None:
        return Assigned("head", f"named {head}")
    embedding = _named_embedding(parts)
    if embedding is not None:
        return Assigned("embedding", f"named {embedding}")
    return Assigned("hidden", "a matrix" if len(shape) == 2 else "a stack or kernel of matrices")


def _overruled(found: dict[str, Assigned], overrides: Mapping[str, str]) -> dict[str, Assigned]:
    for pattern, role in overrides.items():
        if role not in ROLES:
            raise InvalidConfiguration(f"roles[{pattern!r}]", f"{role!r} is not one of {ROLES}")
        matching = [name for name in found if fnmatchcase(name, pattern)]
        if not matching:
            raise InvalidConfiguration(f"roles[{pattern!r}]", "it matches no parameter")
        for name in matching:
            found[name] = Assigned(role, f"as said for {pattern}")
    return found
