"""Small things that the demo says in words."""

from collections.abc import Iterable


def listed(things: Iterable[object]) -> str:
    """ "a", "a and b", "a, b and c"; "none" if there is nothing."""
    words = [str(thing) for thing in things]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]])) or "none"
