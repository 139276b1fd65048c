"""What became of each state on its way from or to another library.

Owns the record. Promises that nothing is lost without its being said here.
"""

from dataclasses import dataclass, field

SAME, ANEW, PLAIN = "same codes", "encoded anew", "plain"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of one state.

    Attributes:
        parameter: Its index in the state dict.
        state: Its name here.
        outcome: "same codes" and "plain" lose nothing, "encoded anew" does.
        reason: Why it was encoded anew.
    """

    parameter: int
    state: str
    outcome: str
    reason: str = ""


@dataclass(slots=True)
class Account:
    """What became of all states; `str()` counts them.

    Attributes:
        conversions: One for each state.
    """

    conversions: list[Conversion] = field(default_factory=list)

    @property
    def is_lossless(self) -> bool:
        """Whether every state decodes to what it was."""
        return all(one.outcome != ANEW for one in self.conversions)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for one in self.conversions:
            key = f"{one.outcome}: {one.reason}" if one.reason else one.outcome
            counts[key] = counts.get(key, 0) + 1
        return "; ".join(f"{count} states {key}" for key, count in counts.items())
