"""Collecting again and again, when little has changed since the last time.

Owns what is remembered of one collecting for the next. Promises the same as
`client.attachment.collect`, in every field and in the same order, however the attached objects were
changed in between: what is remembered counts only while every module, dict, list and tensor that it
was made of is the same object with the same contents, and every tensor lies where it lay, in the
same shape (see `client/forms.py`). What cannot be checked so (custom `state_dict`s, stateful
objects, trees) is read each time. Promises too that no object's own `state_dict` is called twice
for one snapshot. Does not promise anything about an object whose `state_dict` changes another one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from everstep.client.attachment import (
    Attachment,
    Collected,
    Surroundings,
    combined,
    encoded_values,
    flat_part,
    place,
    surroundings,
)
from everstep.client.forms import Form, ModuleForm, OptimizerForm, Sources
from everstep.client.sharing import leaves_of
from everstep.snapshot.capture_plan import check_capturable
from everstep.snapshot.placement import Spread, local_of
from everstep.snapshot.tree import Flat


@dataclass(frozen=True, slots=True)
class Terms:
    """What `collect` was asked for."""

    attachments: dict[str, Attachment]
    ddp: frozenset[str]
    frozen_guarded: bool

    def are(self, other: "Terms") -> bool:
        """Whether these are the same; attached objects are not compared by value."""
        return (
            list(self.attachments) == list(other.attachments)
            and all(self.attachments[name] is other.attachments[name] for name in self.attachments)
            and self.ddp == other.ddp
            and self.frozen_guarded == other.frozen_guarded
        )

    def surroundings(self) -> Surroundings:
        """As they are now."""
        return surroundings(self.attachments, self.ddp, self.frozen_guarded)


@dataclass(frozen=True, slots=True)
class Known:
    """One collecting, and what it was made of.

    Attributes:
        forms: Of the parts that need not be read again.
        sources: The tensors of these.
        outlines: Of all other parts, what must be equal when they are read again.
        irregular: Whether a module or an optimizer is among those.
    """

    terms: Terms
    collected: Collected
    around: Surroundings
    forms: dict[str, Form]
    sources: Sources
    outlines: dict[str, object]
    irregular: bool

    def read(self) -> tuple[Surroundings, dict[str, Flat]]:
        """What must be read each time; before anything is compared, for it runs users' code."""
        around = self.terms.surroundings() if self.irregular else self.around
        attachments = self.terms.attachments
        return around, {name: flat_part(attachments[name], around.names) for name in self.outlines}

    def again(self, around: Surroundings, flats: Mapping[str, Flat]) -> Collected | None:
        """What there is to collect now; None if more than values may have changed."""
        for name, flat in flats.items():
            if outline(flat) != self.outlines[name]:
                return None
        # Three dicts of all tensors are not compared with themselves.
        if (around is not self.around and around != self.around) or not self.holds():
            return None
        before = self.collected
        return Collected(
            _replaced(before.tensors, flats.values()),
            self._values(flats),
            before.containers,
            before.aliases,
            before.guarded,
            before.groups,
            before.blocks,
            before.form,
        )

    def holds(self) -> bool:
        """Whether the parts that are not read again are as they were, but for plain values."""
        return self.sources.unchanged() and all(form.holds() for form in self.forms.values())

    def _values(self, flats: Mapping[str, Flat]) -> list[tuple[str, str]]:
        values: list[tuple[str, str]] = []
        for name in self.terms.attachments:
            values += encoded_values(flats[name]) if name in flats else self.forms[name].values()
        return values


class Recollecting:
    """Collects for one client."""

    def __init__(self) -> None:
        self._known: Known | None = None

    def collect(
        self,
        attachments: Mapping[str, Attachment],
        ddp: frozenset[str] = frozenset(),
        *,
        frozen_guarded: bool = False,
    ) -> Collected:
        """As `client.attachment.collect`; nothing of the result may be changed.

        Raises:
            NotCapturable: If something in it cannot be expressed; names path and type.
        """
        terms = Terms(dict(attachments), ddp, frozen_guarded)
        # Nothing is known any more if this fails.
        known, self._known = self._known, None
        flats: dict[str, Flat] = {}
        if known is not None and known.terms.are(terms):
            around, flats = known.read()
            collected = known.again(around, flats)
            if collected is not None:
                self._known = known
                return collected
        return self._collect_anew(terms, flats)

    def _collect_anew(self, terms: Terms, read: dict[str, Flat]) -> Collected:
        forms = _forms(terms.attachments)
        # Looked at before and after: what changes while it is collected is not remembered.
        tensors = [tensor for form in forms.values() for tensor in form.tensors]
        sources = Sources(tensors, gradients=terms.frozen_guarded)
        around = terms.surroundings()
        flats = dict(read)

        def flat(attached: Attachment) -> Flat:
            name = attached.part.name
            if name not in flats:
                flats[name] = flat_part(attached, around.names)
            return flats[name]

        collected = combined(terms.attachments, around, flat)
        for name, form in forms.items():
            form.take(flats[name], collected.values, around.names)
        others = [a for name, a in terms.attachments.items() if name not in forms]
        outlines: dict[str, object] = {a.part.name: outline(flats[a.part.name]) for a in others}
        irregular = any(attached.part.kind in ("module", "optimizer") for attached in others)
        known = Known(terms, collected, around, forms, sources, outlines, irregular)
        self._known = known if known.holds() else None
        return collected


def outline(flat: Flat) -> object:
    """Everything of a part but its values: equal if they are all that has changed.

    Raises:
        NotCapturable: If a tensor's bytes are not its whole value.
    """
    places: list[object] = []
    for name, tensor in flat.tensors:
        assert isinstance(tensor, torch.Tensor | Spread)
        check_capturable(name, local_of(tensor))
        places.append((name, place(tensor), tuple(tensor.shape)))
        if isinstance(tensor, Spread):
            places.append(tensor.boxes)
    return places, list(flat.containers.items())


def _forms(attachments: Mapping[str, Attachment]) -> dict[str, Form]:
    if any(attached.placement for attached in attachments.values()):
        return {}  # where things lie is asked for every time: experts move
    found = {name: _form(attached) for name, attached in attachments.items()}
    return {name: form for name, form in found.items() if form is not None}


def _form(attached: Attachment) -> Form | None:
    if attached.part.kind == "module":
        return ModuleForm.of(attached.target)
    return OptimizerForm.of(attached.target) if attached.part.kind == "optimizer" else None


def _replaced(
    tensors: list[tuple[str, torch.Tensor]], flats: Iterable[Flat]
) -> list[tuple[str, torch.Tensor]]:
    """The same leaves, with the tensors that were read just now."""
    now = {
        leaf.name: leaf.tensor
        for flat in flats
        for name, tensor in flat.tensors
        if isinstance(tensor, torch.Tensor | Spread)
        for leaf in leaves_of(name, tensor)
    }
    if not now:
        return tensors
    replaced = []
    for name, tensor in tensors:
        replaced.append((name, now.get(name, tensor)))
    return replaced
