"""Comparing what is attached with what a snapshot has, part by part, before anything is touched.

Owns which parts a restore takes, and that they are all there. Promises that everything that does
not fit is in one error. How a part of one kind is compared, and then filled, is said in
`client/loading.py` and `client/optimizer_loading.py`.
"""

from collections.abc import Mapping
from dataclasses import replace

from everstep.client import optimizer_loading
from everstep.client.attachment import Attachment, parameter_names
from everstep.client.loading import CHECKS, Check, Loading, Problems
from everstep.client.resizing import Resizing
from everstep.client.saved import Saved
from everstep.client.terms import Terms
from everstep.proto.errors import Refused, StateMismatch

_CHECKS: dict[str, Check] = {**CHECKS, "optimizer": optimizer_loading.check}


def check(
    attachments: Mapping[str, Attachment], saved: Saved, terms: Terms, rank: int, world: int
) -> Loading:
    """Compare all parts with the snapshot; touch nothing.

    Args:
        attachments: The live objects, by name.
        saved: What the snapshot has.
        terms: What is asked for.
        rank: This process.
        world: How many there are.

    Raises:
        StateMismatch: With everything that does not fit.
        Refused: If the terms name what is not there.
    """
    saved = replace(saved)  # it is renamed and cut down to what is asked for
    saved.rename(terms)
    terms.check([*saved.forms, *saved.classes, "rng"])
    chosen = _chosen(attachments, saved, terms)
    _check_optimizer_classes(chosen, saved, terms.force)
    loading = Loading(saved, Resizing(saved, terms, rank, world))
    problems = Problems(saved, terms)
    names = parameter_names(attachments)
    for attached in chosen.values():
        _CHECKS[attached.kind](attached, names, loading, problems)
    problems.contradictory += saved.holdings.check(need.name for need in loading.needs)
    problems.divergent += loading.resizing.divergent
    problems.raise_if_any()
    return loading


def _chosen(
    attachments: Mapping[str, Attachment], saved: Saved, terms: Terms
) -> dict[str, Attachment]:
    """What is attached and asked for."""
    in_part = [
        name
        for name, attached in attachments.items()
        if attached.kind != "module"
        and any("/" in p and p.partition("/")[0] == name for p in (*terms.only, *terms.exclude))
    ]
    if in_part:
        raise Refused(
            f"{', '.join(in_part)}: only modules can be loaded leaf by leaf. Name the whole part "
            "in only= or exclude=. Nothing was loaded."
        )
    chosen = {
        name: attached
        for name, attached in attachments.items()
        if (not terms.weights_only or attached.kind == "module")
        and terms.takes_some(name, saved.forms_of(name))
    }
    saved.without([n for n in saved.forms if n.partition("/")[0] in chosen and not terms.takes(n)])
    absent = [name for name in chosen if name not in saved.classes]
    if absent:
        hint = (
            "" if terms.weights_only else " To load the modules alone: restore(weights_only=True)."
        )
        what = ", ".join(absent)
        raise StateMismatch(f"the snapshot has no state of {what}.{hint}", missing=tuple(absent))
    dropped = [name for name in saved.classes if name not in attachments and terms.takes(name)]
    if dropped and not terms.weights_only:
        raise StateMismatch(
            f"the snapshot has state of {', '.join(dropped)}, which is not attached. Attach it "
            "before restore(), leave it out with exclude=, or load the modules alone with "
            "restore(weights_only=True).",
            unexpected=tuple(dropped),
        )
    return chosen


def _check_optimizer_classes(chosen: Mapping[str, Attachment], saved: Saved, force: bool) -> None:
    for name, attached in chosen.items():
        was, now = saved.classes[name], attached.part.class_name
        if attached.kind == "optimizer" and was != now and not force:
            raise StateMismatch(
                f"{name} was a {was} and is a {now} now: its state means something else there. "
                "Say restore(force=True) if that is what you want. Nothing was loaded."
            )
