"""Putting a restored snapshot back into the live objects.

Owns the comparison of what is attached with what was saved, and the way each kind of part takes
its state. Promises that a mismatch is found before anything is touched; that tensors are filled
in place, so that references held elsewhere stay good and tied weights stay tied; that optimizer
state keeps the dtype it was saved with, whatever load_state_dict casts; and that no live tensor
ever shares memory with the arena. Does not choose or read copies.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from everstep.client import scaling
from everstep.client.attachment import (
    Attachment,
    decode_torch_value,
    dtype_named,
    flat_part,
    grouping,
    parameter_names,
    parameters_by_index,
    place,
    within,
)
from everstep.proto.errors import StateMismatch
from everstep.proto.state_pb2 import Record
from everstep.snapshot import values
from everstep.snapshot.capture import dtype_name
from everstep.snapshot.layout import Layout
from everstep.snapshot.restore import Wanted
from everstep.snapshot.tree import join, split, unflatten


@dataclass(frozen=True, slots=True)
class Form:
    """What is known of a saved tensor before its bytes are read."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor can take the bytes."""
        return (dtype_name(tensor.dtype), tuple(tensor.shape)) == (self.dtype, self.shape)

    def empty(self, device: torch.device | None = None) -> torch.Tensor:
        """A tensor that can take them."""
        return torch.empty(self.shape, dtype=dtype_named(self.dtype), device=device)


@dataclass(slots=True)
class Saved:
    """What one rank's shard says of all parts."""

    forms: dict[str, Form]
    values: dict[str, str]
    containers: dict[str, str]
    classes: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Layout, record: Record) -> "Saved":
        """Read it from the shard's description."""
        forms = {leaf.name: Form(leaf.dtype, leaf.shape) for leaf in layout.leaves}
        forms |= {name: forms[of] for name, of in layout.aliases.items()}
        return cls(
            forms,
            {value.path: value.json for value in record.values},
            dict(layout.containers),
            {part.name: part.class_name for part in layout.parts},
            dict(layout.aliases),
        )

    def origin(self, name: str) -> str:
        """The one name of a tensor that was saved under several."""
        return self.aliases.get(name, name)

    def forms_of(self, part: str) -> dict[str, Form]:
        """The saved tensors of a part."""
        return {name: form for name, form in self.forms.items() if _within(name, part)}

    def tree(self, part: str, tensors: Mapping[str, object]) -> Any:
        """The part's saved tree, with the given tensors in their places."""
        decoded = {
            path[len(part) + 1 :]: values.decode(json, hook=decode_torch_value, where=path)
            for path, json in self.values.items()
            if _within(path, part)
        }
        containers = {
            path[len(part) + 1 :]: kind
            for path, kind in self.containers.items()
            if _within(path, part)
        }
        inner = {name[len(part) + 1 :]: tensor for name, tensor in tensors.items()}
        return unflatten(inner, decoded, containers)


def _within(path: str, part: str) -> bool:
    return path == part or path.startswith(part + "/")


@dataclass(slots=True)
class Loading:
    """A restore that has been checked and can go ahead.

    Attributes:
        wanted: The tensors to fill; available after `prepare`.
        devices: Where tensors will be wanted, by name, as far as that is certain before.
    """

    wanted: list[Wanted] = field(default_factory=list)
    devices: dict[str, torch.device] = field(default_factory=dict)
    _prepare: list[Callable[[], list[Wanted]]] = field(default_factory=list)
    _finish: list[Callable[[], None]] = field(default_factory=list)

    def prepare(self) -> list[Wanted]:
        """Make room in the live objects; return every tensor to fill."""
        for prepare in self._prepare:
            self.wanted += prepare()
        return self.wanted

    def finish(self) -> None:
        """After the tensors are filled: hand over values, and whole states where needed."""
        for finish in self._finish:
            finish()


def check(
    attachments: Mapping[str, Attachment], saved: Saved, *, weights_only: bool, force: bool
) -> Loading:
    """Compare all parts with the snapshot; touch nothing.

    Args:
        attachments: The live objects, by name.
        saved: What the snapshot has.
        weights_only: Take modules only, and leave everything else as it is.
        force: Accept another optimizer class.

    Raises:
        StateMismatch: With everything that does not fit.
    """
    chosen = {
        name: attached
        for name, attached in attachments.items()
        if not weights_only or attached.part.kind == "module"
    }
    absent = [name for name in chosen if name not in saved.classes]
    if absent:
        hint = "" if weights_only else " To load the modules alone, say restore(weights_only=True)."
        what = ", ".join(absent)
        raise StateMismatch(f"the snapshot has no state of {what}.{hint}", missing=tuple(absent))
    dropped = [name for name in saved.classes if name not in attachments]
    if dropped and not weights_only:
        raise StateMismatch(
            f"the snapshot has state of {', '.join(dropped)}, which is not attached. Attach it "
            "before restore(), or say restore(weights_only=True) to load the modules alone.",
            unexpected=tuple(dropped),
        )
    _check_optimizer_classes(chosen, saved, force)
    names = parameter_names(attachments)
    loading = Loading()
    problems = _Problems()
    for attached in chosen.values():
        _CHECKS[attached.part.kind](attached, saved, names, loading, problems)
    problems.raise_if_any()
    return loading


def _check_optimizer_classes(chosen: Mapping[str, Attachment], saved: Saved, force: bool) -> None:
    for name, attached in chosen.items():
        was, now = saved.classes[name], attached.part.class_name
        if attached.part.kind == "optimizer" and was != now and not force:
            raise StateMismatch(
                f"{name} was a {was} and is a {now} now: its state means something else there. "
                "Say restore(force=True) if that is what you want. Nothing was loaded."
            )


@dataclass(slots=True)
class _Problems:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    places: dict[tuple[object, ...], str] = field(default_factory=dict)

    def compare(
        self, live: Mapping[str, torch.Tensor], forms: Mapping[str, Form], *, names_too: bool = True
    ) -> None:
        if names_too:
            self.missing += [name for name in live if name not in forms]
            self.unexpected += [name for name in forms if name not in live]
        for name, tensor in live.items():
            form = forms.get(name)
            if form is not None and not form.fits(tensor):
                now = Form(dtype_name(tensor.dtype), tuple(tensor.shape))
                self.reshaped.append(f"{name}: {form} -> {now}")

    def compare_ties(self, live: Mapping[str, torch.Tensor], saved: Saved) -> None:
        """What is one tensor now was one at the snapshot, or one of two values would be lost."""
        for name, tensor in live.items():
            if name not in saved.forms or not tensor.numel():
                continue
            first = self.places.setdefault(place(tensor), name)
            if saved.origin(first) != saved.origin(name):
                self.reshaped.append(f"{name}: a tensor of its own -> the same as {first}")

    def compare_keys(
        self, attached: Attachment, live: Mapping[str, torch.Tensor], saved: Saved
    ) -> None:
        """A module's extra state, and whatever else of it is no tensor."""
        part = attached.part.name
        forms = saved.forms_of(part)
        then = set(saved.tree(part, dict.fromkeys(forms)))
        now = set(attached.target.state_dict())
        compared = {split(name)[1] for name in [*live, *forms] if not _is_extra_state(name)}
        self.missing += sorted(within(part, join(key)) for key in now - then - compared)
        self.unexpected += sorted(within(part, join(key)) for key in then - now - compared)

    def raise_if_any(self) -> None:
        if self.missing or self.unexpected or self.reshaped:
            raise StateMismatch(
                "what is attached does not match the snapshot. Nothing was loaded.",
                tuple(self.missing),
                tuple(self.unexpected),
                tuple(self.reshaped),
            )


def _live_tensors(attached: Attachment, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    flat = flat_part(attached, names)
    return {name: tensor for name, tensor in flat.tensors if isinstance(tensor, torch.Tensor)}


def _is_extra_state(name: str) -> bool:
    """Whether a leaf belongs to what a module's `get_extra_state` returned.

    Its form is the module's own affair and may change; `set_extra_state` takes whatever it is.
    """
    key = split(name)[1]
    return isinstance(key, str) and key.rpartition(".")[2] == "_extra_state"


def _check_module(
    attached: Attachment,
    saved: Saved,
    names: Mapping[int, str],
    loading: Loading,
    problems: _Problems,
) -> None:
    part, module = attached.part.name, attached.target
    forms = saved.forms_of(part)
    extra = {name: form.empty() for name, form in forms.items() if _is_extra_state(name)}
    live = {
        name: tensor
        for name, tensor in _live_tensors(attached, names).items()
        if not _is_extra_state(name)
    }
    problems.compare(live, {name: form for name, form in forms.items() if name not in extra})
    problems.compare_ties(live, saved)
    problems.compare_keys(attached, live, saved)
    own = {t.data_ptr() for t in [*module.parameters(), *module.buffers()] if t.numel()}
    # A leaf that state_dict() computes is not the module's memory: it goes in by load_state_dict.
    computed = {
        name: forms[name].empty()
        for name, tensor in live.items()
        if tensor.numel() and tensor.data_ptr() not in own and name in forms
    }
    loading.devices |= {n: t.device for n, t in live.items() if n not in computed}

    def prepare() -> list[Wanted]:
        return [Wanted(name, tensor) for name, tensor in {**live, **extra, **computed}.items()]

    def finish() -> None:
        has_values = any(_within(path, part) for path in saved.values)
        if computed or extra or has_values:
            # All of it, since a module may look for one thing beside another; what is filled
            # already is copied onto itself. Expanded tensors cannot be written to.
            filled = {name: tensor for name, tensor in live.items() if 0 not in tensor.stride()}
            tree = OrderedDict(saved.tree(part, {**filled, **extra, **computed}))
            tree._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
            module.load_state_dict(tree, strict=False)

    loading._prepare.append(prepare)
    loading._finish.append(finish)


def _check_optimizer(
    attached: Attachment,
    saved: Saved,
    names: Mapping[int, str],
    loading: Loading,
    problems: _Problems,
) -> None:
    part, optimizer = attached.part.name, attached.target
    forms = saved.forms_of(part)
    live = _live_tensors(attached, names)
    known = dict(parameters_by_index(optimizer, names))
    for name in forms:
        path = split(name)
        if path[1] == "state" and isinstance(path[2], str) and path[2] not in known:
            problems.unexpected.append(name)
    fitting = {n: t for n, t in live.items() if n in forms and forms[n].fits(t)}
    tensors = {
        name: fitting[name] if name in fitting else form.empty(_state_device(name, known))
        for name, form in forms.items()
    }
    loading.devices |= {name: tensor.device for name, tensor in tensors.items()}
    tree = saved.tree(part, tensors)
    present = grouping(optimizer, names)
    if [group.get("params") for group in tree["param_groups"]] != present:
        problems.reshaped.append(
            f"{part}/param_groups: its groups hold other parameters than at the snapshot"
        )

    def prepare() -> list[Wanted]:
        _load_optimizer(optimizer, tree, names)
        return [Wanted(n, t) for n, t in _adopted(attached, names, forms, tensors).items()]

    loading._prepare.append(prepare)


def _state_device(name: str, parameters: Mapping[str, torch.Tensor]) -> torch.device | None:
    """Where load_state_dict will want a tensor, which would otherwise be copied there unfilled.

    It leaves a step where it is unless the group says otherwise.
    """
    path = split(name)
    of_parameter = path[1] == "state" and len(path) > 3 and path[-1] != "step"
    owner = parameters.get(str(path[2])) if of_parameter else None
    return None if owner is None else owner.device


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tree: dict[str, Any], names: Mapping[int, str]
) -> None:
    """Hand the saved tree to the optimizer in its own form, with indices."""
    index_of = {name: i for i, (name, _) in enumerate(parameters_by_index(optimizer, names))}
    present = optimizer.state_dict()
    state = dict(tree)
    state["state"] = {index_of.get(key, key): value for key, value in tree["state"].items()}
    state["param_groups"] = [
        {**group, "params": now["params"]}
        for group, now in zip(tree["param_groups"], present["param_groups"], strict=True)
    ]
    optimizer.load_state_dict(state)


def _adopted(
    attached: Attachment,
    names: Mapping[int, str],
    forms: Mapping[str, Form],
    made: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The optimizer's tensors after load_state_dict, with the dtypes that were saved.

    torch casts floating state to the parameter's dtype (fp32 moments of bf16 weights would lose
    half their bits), so such tensors are replaced where they are kept.
    """
    live = _live_tensors(attached, names)
    by_name = dict(parameters_by_index(attached.target, names))
    for name, tensor in live.items():
        form = forms.get(name)
        if form is None or form.fits(tensor):
            continue
        _, _, owner, *path = split(name)
        holder: Any = attached.target.state[by_name[str(owner)]]
        for element in path[:-1]:
            holder = holder[element]
        own = made[name]
        fits = own.device == tensor.device
        holder[path[-1]] = live[name] = own if fits else form.empty(tensor.device)
    return {name: tensor for name, tensor in live.items() if name in forms}


def _check_stateful(
    attached: Attachment,
    saved: Saved,
    names: Mapping[int, str],
    loading: Loading,
    problems: _Problems,
) -> None:
    part = attached.part.name
    # What a user's object returns is asked for only after loading: it may begin something then. On
    # which device it wants its tensors is its own affair.
    scheduler = isinstance(attached.target, torch.optim.lr_scheduler.LRScheduler)
    live = _live_tensors(attached, names) if scheduler else {}
    fresh = {
        name: form.empty(live[name].device if name in live else None)
        for name, form in saved.forms_of(part).items()
    }
    loading.devices |= {name: tensor.device for name, tensor in fresh.items()}
    loading._prepare.append(lambda: [Wanted(name, tensor) for name, tensor in fresh.items()])

    def finish() -> None:
        if scaling.is_scaler(attached.target):
            attached.target.load_state_dict(scaling.loadable(saved.tree(part, fresh)))
            return
        attached.target.load_state_dict(saved.tree(part, fresh))
        # What it makes lazily of that state (torchdata's loader its iterator, drawing a seed for
        # it) it makes now, before the random generators are set: later would cost a draw.
        attached.target.state_dict()

    loading._finish.append(finish)


def _check_tree(
    attached: Attachment,
    saved: Saved,
    names: Mapping[int, str],
    loading: Loading,
    problems: _Problems,
) -> None:
    part = attached.part.name
    forms = saved.forms_of(part)
    live = _live_tensors(attached, names)
    problems.compare(live, forms, names_too=False)
    problems.missing += [name for name in live if name not in forms]
    tensors = {name: form.empty() for name, form in forms.items()}
    places: dict[tuple[object, ...], str] = {}
    for name, tensor in live.items():
        first = places.setdefault(place(tensor), name) if tensor.numel() else name
        # Two names of one tensor that were two at the snapshot become two again.
        if name in forms and saved.origin(first) == saved.origin(name):
            tensors[name] = tensor
    loading.devices |= {name: tensor.device for name, tensor in tensors.items()}
    loading._prepare.append(lambda: [Wanted(name, tensor) for name, tensor in tensors.items()])
    loading._finish.append(lambda: _merge(attached.target, saved.tree(part, tensors)))


_ABSENT = object()


def _merge(live: Any, saved: Any) -> None:
    """Make a live dict or list equal to the saved one, keeping containers that match."""
    if isinstance(live, dict):
        for key in [key for key in live if key not in saved]:
            del live[key]
        pairs: Iterable[tuple[Any, Any]] = saved.items()
    else:
        del live[len(saved) :]
        live.extend([None] * (len(saved) - len(live)))
        pairs = enumerate(saved)
    for key, value in pairs:
        now = live[key] if isinstance(live, list) else live.get(key, _ABSENT)
        if type(now) is type(value) and isinstance(value, dict | list):
            _merge(now, value)
        elif now is not value:
            live[key] = value


_Check = Callable[[Attachment, Saved, Mapping[int, str], Loading, _Problems], None]
_CHECKS: dict[str, _Check] = {
    "module": _check_module,
    "optimizer": _check_optimizer,
    "stateful": _check_stateful,
    "tree": _check_tree,
}
