"""What a restore was asked for, besides the step: which part of the state, and how it may change.

Owns the patterns, the renaming and the rules for state that ranks have for themselves. Promises
that a pattern or a rule that matches nothing is refused, since it is a misspelled one. Looks at
names alone.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from everstep.proto.errors import Refused

RULES = ("refuse", "keep", "rank0", "sum", "drop")
Rename = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Terms:
    """See `everstep.client.client.Client.restore`, whose arguments these are.

    Raises:
        Refused: If a rule is not one of `RULES`.
    """

    weights_only: bool = False
    force: bool = False
    partial: bool = False
    cast: bool = False
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: Rename = field(default_factory=dict)
    on_resize: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, rule in self.on_resize.items():
            if rule not in RULES:
                known = ", ".join(RULES)
                raise Refused(f"on_resize of {pattern!r}: {rule!r} is not one of {known}.")

    def takes(self, name: str) -> bool:
        """Whether a leaf or a part of this name is wanted."""
        if _match(self.exclude, name):
            return False
        return not self.only or _match(self.only, name)

    def takes_some(self, part: str, names: Iterable[str]) -> bool:
        """Whether anything of a part is wanted."""
        if any(fnmatchcase(part, pattern) for pattern in self.exclude):
            return False
        return self.takes(part) or any(map(self.takes, names))

    def rule(self, name: str) -> str:
        """What becomes of state that every rank has for itself, when the ranks are others."""
        for pattern, rule in self.on_resize.items():
            if _match((pattern,), name):
                return rule
        return "refuse"

    def renamed(self, name: str) -> str:
        """The name that a saved leaf has now: by the longest prefix that matches."""
        if callable(self.rename):
            return self.rename(name)
        prefix = max((p for p in self.rename if name.startswith(p)), key=len, default=None)
        return name if prefix is None else self.rename[prefix] + name[len(prefix) :]

    def check(self, names: Collection[str]) -> None:
        """Return only if each pattern matches one of the names at least.

        Raises:
            Refused: With those that match nothing. Nothing was loaded.
        """
        patterns = (*self.only, *self.exclude, *self.on_resize)
        unknown = [pattern for pattern in patterns if not any(_match((pattern,), n) for n in names)]
        if unknown:
            raise Refused(
                f"nothing in the snapshot is called {', '.join(map(repr, unknown))}. Name parts "
                "('optimizer') or leaves by pattern ('model/head.*'); `everstep inspect` lists "
                "them. Nothing was loaded."
            )


def _match(patterns: Iterable[str], name: str) -> bool:
    """Whether a pattern fits the name itself, or a part that it is in."""
    part = name.partition("/")[0]
    return any(fnmatchcase(name, p) or fnmatchcase(part, p) for p in patterns)
