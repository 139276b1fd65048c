"""Putting a restored snapshot back into the live objects.

Owns the way each kind of part takes its state; optimizers are in `client/optimizer_loading.py`, and
`client/checking.py` asks all of them. Promises that a mismatch is found before anything is touched;
that tensors are filled in place, so that references held elsewhere stay good and tied weights stay
tied; and that no live tensor ever shares memory with the arena. Does not choose or read copies.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from everstep.client import scaling
from everstep.client.attachment import Attachment, flat_part, place, within
from everstep.client.resizing import Resizing
from everstep.client.saved import Form, Saved, is_within
from everstep.client.sharing import pointer
from everstep.client.terms import Terms
from everstep.proto.errors import StateMismatch
from everstep.snapshot.capture_plan import dtype_name
from everstep.snapshot.placement import Placed, Portion, Spread, is_distributed, local_of, portions
from everstep.snapshot.restore import Need, Wanted
from everstep.snapshot.tree import join, split


@dataclass(slots=True)
class Loading:
    """A restore that has been checked and can go ahead.

    Attributes:
        saved: What the snapshot has.
        resizing: The rules for what ranks have for themselves.
        needs: What of the tensors will be wanted, and where.
        wanted: The memory to fill; available after `prepare`.
    """

    saved: Saved
    resizing: Resizing
    needs: list[Need] = field(default_factory=list)
    wanted: list[Wanted] = field(default_factory=list)
    _ranks: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    _portions: dict[str, tuple[Placed, list[Portion]]] = field(default_factory=dict)
    _prepare: list[Callable[[], Mapping[str, Placed]]] = field(default_factory=list)
    _added: list[Callable[[], object]] = field(default_factory=list)
    _finish: list[Callable[[], None]] = field(default_factory=list)

    def will_fill(
        self,
        tensors: Mapping[str, Placed],
        prepare: Callable[[], Mapping[str, Placed]] | None = None,
    ) -> None:
        """Announce tensors, by name.

        Args:
            tensors: Those to fill, or others that will be placed alike.
            prepare: Makes room in the live object, and returns those to fill.
        """
        for name, tensor in tensors.items():
            self._ranks[name] = ranks = self.resizing.ranks_of(name)
            source = self.saved.source(name)
            spread = is_distributed(tensor)
            for portion in self._portions_of(name, tensor):
                box = portion.box if spread else None
                device = None if portion.tensor.device.type == "cpu" else portion.tensor.device
                self.needs += [Need(source, box, device, rank) for rank in ranks]
        self._prepare.append(prepare or (lambda: tensors))

    def at_end(self, finish: Callable[[], None]) -> None:
        """Have something done once the tensors are filled."""
        self._finish.append(finish)

    def prepare(self) -> list[Wanted]:
        """Make room in the live objects; return all memory to fill."""
        for prepare in self._prepare:
            for name, tensor in prepare().items():
                spread = is_distributed(tensor)
                for portion in self._portions_of(name, tensor):
                    box = portion.box if spread else None
                    self._want(name, portion.tensor, box)
        return self.wanted

    def _portions_of(self, name: str, tensor: Placed) -> list[Portion]:
        """Asked for twice of most tensors: before and after there is room for all."""
        memory = tensor if isinstance(tensor, Spread) else local_of(tensor)
        known = self._portions.get(name)
        if known is None or known[0] is not memory:
            known = self._portions[name] = memory, portions(name, tensor)
        return known[1]

    def _want(self, name: str, tensor: torch.Tensor, box: Any) -> None:
        source, cast = self.saved.source(name), self.resizing.terms.cast
        ranks = self._ranks[name]
        if not ranks:
            self._added.append(tensor.detach().zero_)
        for index, rank in enumerate(ranks):
            target = torch.empty_like(tensor) if index else tensor
            self.wanted.append(Wanted(source, target, box, rank, cast))
            if index:
                self._added.append(partial(tensor.detach().add_, target))

    def finish(self) -> None:
        """After the tensors are filled: hand over values, and whole states where needed."""
        with torch.no_grad():
            for add in self._added:
                add()
        for finish in self._finish:
            finish()


@dataclass(slots=True)
class Problems:
    """Everything that does not fit, for one error."""

    saved: Saved
    terms: Terms
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    divergent: list[str] = field(default_factory=list)
    contradictory: list[str] = field(default_factory=list)
    places: dict[tuple[object, ...], str] = field(default_factory=dict)

    def compare(
        self, live: Mapping[str, Placed], forms: Mapping[str, Form], *, names_too: bool = True
    ) -> None:
        """Compare tensors with their saved forms; and which there are."""
        if names_too:
            self.missing += [name for name in live if name not in forms]
            self.unexpected += [n for n in forms if n not in live and self.expects(n)]
        for name, tensor in live.items():
            form = forms.get(name)
            if form is not None and not self.fits(form, tensor):
                now = Form(dtype_name(tensor.dtype), tuple(tensor.shape))
                self.reshaped.append(f"{name}: {form} -> {now}")

    def fits(self, form: Form, tensor: Placed) -> bool:
        """Whether a tensor can take what was saved: bit for bit, unless a cast was asked for."""
        return form.fits(tensor) or (self.terms.cast and form.shape == tuple(tensor.shape))

    def expects(self, name: str) -> bool:
        """Whether a saved leaf must have its place on this rank."""
        return name in self.saved.expected and not self.terms.partial

    def compare_ties(self, live: Mapping[str, Placed]) -> None:
        """What is one tensor now was one at the snapshot, or one of two values would be lost."""
        saved = self.saved
        for name, tensor in live.items():
            if name not in saved.forms or not local_of(tensor).numel():
                continue
            first = self.places.setdefault(place(tensor), name)
            if saved.origin(first) != saved.origin(name):
                self.reshaped.append(f"{name}: a tensor of its own -> the same as {first}")

    def compare_keys(self, attached: Attachment, live: Mapping[str, Placed]) -> None:
        """A module's extra state, and whatever else of it is no tensor."""
        if attached.placement:
            return  # names are those of global tensors, not of this module
        part = attached.part.name
        forms = self.saved.forms_of(part)
        then = set(self.saved.tree(part, dict.fromkeys(forms)))
        now = set(attached.target.state_dict())
        compared = {split(name)[1] for name in [*live, *forms] if not _is_extra_state(name)}
        taken = self.terms.takes
        self.missing += sorted(
            name for key in now - then - compared if taken(name := within(part, join(key)))
        )
        gone = sorted(within(part, join(key)) for key in then - now - compared)
        self.unexpected += [n for n in gone if taken(n) and not self.terms.partial]

    def raise_if_any(self) -> None:
        """Raise StateMismatch if anything does not fit."""
        found = (
            self.missing,
            self.unexpected,
            self.reshaped,
            self.divergent,
            self.contradictory,
        )
        if not any(found):
            return
        summary = "what is attached does not match the snapshot. Nothing was loaded."
        if self.saved.resized and self.unexpected and not self.missing:
            summary += " If other ranks hold what is not attached here (stages): partial=True."
        raise StateMismatch(summary, *map(tuple, found))


def live_tensors(attached: Attachment, names: Mapping[int, str]) -> dict[str, Placed]:
    """A part's tensors by name, as `state_dict` has them: distributed ones whole."""
    flat = flat_part(attached, names)
    return {n: tensor for n, tensor in flat.tensors if isinstance(tensor, torch.Tensor | Spread)}


def _is_extra_state(name: str) -> bool:
    """Whether a leaf belongs to what a module's `get_extra_state` returned.

    Its form is the module's own affair and may change; `set_extra_state` takes whatever it is.
    """
    key = split(name)[1]
    return isinstance(key, str) and key.rpartition(".")[2] == "_extra_state"


def _check_module(
    attached: Attachment, names: Mapping[int, str], loading: Loading, problems: Problems
) -> None:
    part, module, saved = attached.part.name, attached.target, loading.saved
    forms = saved.forms_of(part)
    own = saved.forms_of(part, own=True)
    extra = {name: form.empty() for name, form in own.items() if _is_extra_state(name)}
    live = {
        name: tensor
        for name, tensor in live_tensors(attached, names).items()
        if not _is_extra_state(name) and problems.terms.takes(name)
    }
    problems.compare(live, {n: form for n, form in forms.items() if not _is_extra_state(n)})
    problems.compare_ties(live)
    problems.compare_keys(attached, live)
    memory = {pointer(t) for t in [*module.parameters(), *module.buffers()] if t.numel()}
    # A leaf that state_dict() computes is not the module's memory: it goes in by load_state_dict.
    computed = {
        name: forms[name].empty()
        for name, tensor in live.items()
        if pointer(tensor) and pointer(tensor) not in memory and name in forms
    }
    filled = {n: t for n, t in live.items() if n in forms and n not in computed}
    loading.will_fill({**filled, **extra, **computed})
    values = loading.resizing.values_of(attached)

    def finish() -> None:
        has_values = any(is_within(path, part) for path in saved.values)
        if computed or extra or (has_values and values is not None):
            # All of it, since a module may look for one thing beside another; what is filled
            # already is copied onto itself. Expanded tensors cannot be written to.
            written = {
                name: tensor
                for name, tensor in filled.items()
                if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride()
            }
            tensors = {**written, **extra, **computed}
            tree = OrderedDict(saved.tree(part, tensors, values or {}))
            tree._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
            module.load_state_dict(tree, strict=False)

    loading.at_end(finish)


def _check_stateful(
    attached: Attachment, names: Mapping[int, str], loading: Loading, problems: Problems
) -> None:
    part, target, saved = attached.part.name, attached.target, loading.saved
    resharded = loading.resizing.resharded(attached)
    values = saved.values if resharded is not None else loading.resizing.values_of(attached)
    if values is None:
        return
    # What a user's object returns is asked for only after loading: it may begin something then. On
    # which device it wants its tensors is its own affair.
    scheduler = isinstance(target, torch.optim.lr_scheduler.LRScheduler)
    live = live_tensors(attached, names) if scheduler else {}
    fresh = {
        name: form.empty(local_of(live[name]).device if name in live else None)
        for name, form in saved.forms_of(part, own=True).items()
    }
    loading.will_fill(fresh)

    def finish() -> None:
        if scaling.is_scaler(target):
            target.load_state_dict(scaling.loadable(saved.tree(part, fresh, values)))
            return
        state = saved.tree(part, fresh, values) if resharded is None else resharded
        target.load_state_dict(state)
        # What it makes lazily of that state (torchdata's loader its iterator, drawing a seed for
        # it) it makes now, before the random generators are set: later would cost a draw.
        target.state_dict()

    loading.at_end(finish)


def _check_tree(
    attached: Attachment, names: Mapping[int, str], loading: Loading, problems: Problems
) -> None:
    part, saved = attached.part.name, loading.saved
    live = live_tensors(attached, names)
    forms = {
        name: form
        for name, form in saved.forms_of(part).items()
        if name in live or (name in saved.own and not problems.terms.partial)
    }
    problems.compare(live, forms, names_too=False)
    problems.missing += [name for name in live if name not in forms]
    tensors: dict[str, Placed] = {n: f.empty() for n, f in forms.items() if n not in live}
    places: dict[tuple[object, ...], str] = {}
    for name, tensor in live.items():
        first = places.setdefault(place(tensor), name) if local_of(tensor).numel() else name
        # Two names of one tensor that were two at the snapshot become two again.
        if name in forms:
            tied = saved.origin(first) == saved.origin(name)
            tensors[name] = tensor if tied else forms[name].empty()
    tensors = {name: tensors[name] for name in forms}
    loading.will_fill(tensors)
    values = loading.resizing.values_of(attached)
    if not attached.placement:  # else its keys are not the tensors' names
        loading.at_end(lambda: _merge(attached.target, saved.tree(part, tensors, values or {})))


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


Check = Callable[[Attachment, Mapping[int, str], Loading, Problems], None]
CHECKS: dict[str, Check] = {
    "module": _check_module,
    "stateful": _check_stateful,
    "tree": _check_tree,
}
