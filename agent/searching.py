"""An agent without a place looks for the others: what it heard, and what follows from that.

Owns what was answered to its claims. Promises: it is to found a cluster only where nobody answers
that has a place; once fenced, only while others ask it that have none either, because a fenced
agent that is alone cannot tell a holder that is gone from one that is cut off; a refusal is the
last word only when it was repeated for so long that a holder who is gone no longer counts as alive.
Does not send anything, nor know the members: that is in agent/members.py. Pure: time is passed in.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

_NEVER_S = float("-inf")


@dataclass(slots=True)
class Search:
    """One search: from the start, or from when the place was lost, until there is one."""

    suspect_after_s: float
    join_timeout_s: float
    started_s: float | None = None
    fenced: bool = False
    """It had a place that another one has now."""
    _fellows: dict[str, float] = field(default_factory=dict)
    """Addresses of agents without a place that wait for this one, and when they said so."""
    _asked_s: float = _NEVER_S
    """When another one asked here that waits for this one."""
    _answered_s: float = _NEVER_S
    """When an agent answered that has a place, or that comes before this one."""
    _refused_since_s: float = _NEVER_S
    _refused_s: float = _NEVER_S

    def __post_init__(self) -> None:
        """Whoever has its place gets the time to be heard."""
        if self.fenced and self.started_s is not None:
            self._answered_s = self.started_s

    def anew(self, now_s: float, *, fenced: bool) -> "Search":
        """The next search, in which nothing counts that was heard in this one."""
        return Search(self.suspect_after_s, self.join_timeout_s, now_s, fenced)

    def asked(self, now_s: float) -> None:
        """Another agent that has no place either asked here, and waits for this one."""
        self._asked_s = now_s

    def waits(self, address: str, now_s: float) -> None:
        """Who answers there has no place either, and waits for this one: it may be itself."""
        self._fellows[address] = now_s

    def answered(self, address: str, now_s: float) -> None:
        """Who answers there has a place, or comes before this one."""
        self._fellows.pop(address, None)
        self._answered_s = now_s

    def refused(self, now_s: float) -> bool:
        """Its claim was refused; true if that is the last word."""
        # A holder that died lately still counts as alive for a while. After a silence another
        # agent may decide, which has to find out by itself: what was said before does not count.
        if now_s - self._refused_s > self.suspect_after_s:
            self._refused_since_s = now_s
        self._refused_s = now_s
        return self.fenced and now_s - self._refused_since_s >= 2 * self.suspect_after_s

    def in_vain(self, addresses: Iterable[str] | None, now_s: float) -> bool:
        """Whether a cluster is to be founded: all wait for that, or nobody is there for long.

        Args:
            addresses: Where others may be; None if that is not known yet.
            now_s: The time.
        """
        if self.started_s is None:
            self.started_s = now_s
        quiet_s = self.suspect_after_s if self._refused_s == _NEVER_S else self.join_timeout_s
        oldest_s = now_s - self.suspect_after_s
        if now_s - self._answered_s < quiet_s or (self.fenced and self._asked_s <= oldest_s):
            return False
        all_wait = addresses is not None and all(
            self._fellows.get(address, _NEVER_S) > oldest_s for address in addresses
        )
        return all_wait or now_s - self.started_s >= self.join_timeout_s
