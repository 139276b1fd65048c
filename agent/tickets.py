"""Tickets of the bulk plane: who may fetch what, once, for a while.

Owns the bookkeeping, pure: tokens and the clock are passed in. Promises that a token is honoured
at most once and only before it expires, that no more than so many are outstanding, that comparing
tokens takes as long for a near miss as for any other, and that every content that was put in comes
out exactly once: redeemed, expired or drained. Locks nothing, and does not know what a content is.
"""

import hmac
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

TOKEN_BYTES = 16

Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class IssuedTicket:
    """What the client needs to fetch one stream of units.

    Attributes:
        token: Random, single use; a secret until then.
        address: HOST:PORT of the bulk plane that honours it.
        units: How many will come.
        bytes: How many bytes they have together.
    """

    token: bytes
    address: str
    units: int
    bytes: int


class Verdict(Enum):
    """What a token that was shown is worth."""

    GRANTED = "granted"
    UNKNOWN = "unknown"
    USED = "used"
    EXPIRED = "expired"


@dataclass(slots=True)
class _Outstanding(Generic[Content]):
    content: Content
    expires_s: float


class Tickets(Generic[Content]):
    """All tickets of one server."""

    def __init__(self, max_tickets: int, timeout_s: float) -> None:
        """Start with none.

        Args:
            max_tickets: How many may be outstanding.
            timeout_s: How long each is good for.
        """
        assert max_tickets > 0
        assert timeout_s > 0
        self._max_tickets = max_tickets
        self._timeout_s = timeout_s
        # By age, which is by expiry too, as all are good for the same time.
        self._outstanding: OrderedDict[bytes, _Outstanding[Content]] = OrderedDict()
        # Only to say why a token is refused; what fell out of it is "unknown".
        self._gone: deque[tuple[bytes, Verdict]] = deque(maxlen=max_tickets)

    def __len__(self) -> int:
        """How many are outstanding."""
        return len(self._outstanding)

    @property
    def full(self) -> bool:
        """Whether another one would be too many."""
        return len(self._outstanding) >= self._max_tickets

    def issue(self, token: bytes, content: Content, now_s: float) -> None:
        """Honour this token from now on; `full` must have been asked, `expire` called."""
        assert len(token) == TOKEN_BYTES
        assert token not in self._outstanding
        assert not self.full
        self._outstanding[token] = _Outstanding(content, now_s + self._timeout_s)

    def redeem(self, token: bytes, now_s: float) -> tuple[Verdict, Content | None]:
        """Give the content for the token, if it is good, and never again.

        Args:
            token: As received, of any length.
            now_s: The clock.

        Returns:
            GRANTED with the content, or why not. The content of an expired ticket stays until
            `expire` hands it out.
        """
        found = None
        for known in self._outstanding:
            if hmac.compare_digest(known, token):
                found = known
        if found is None:
            return self._remembered(token), None
        if now_s >= self._outstanding[found].expires_s:
            return Verdict.EXPIRED, None
        self._gone.append((found, Verdict.USED))
        return Verdict.GRANTED, self._outstanding.pop(found).content

    def expire(self, now_s: float) -> list[Content]:
        """Take out all whose time is over; the caller releases their contents."""
        over = []
        while self._outstanding:
            token, oldest = next(iter(self._outstanding.items()))
            if now_s < oldest.expires_s:
                break
            del self._outstanding[token]
            self._gone.append((token, Verdict.EXPIRED))
            over.append(oldest.content)
        return over

    def drain(self) -> list[Content]:
        """Take out all."""
        contents = [ticket.content for ticket in self._outstanding.values()]
        self._outstanding.clear()
        return contents

    def _remembered(self, token: bytes) -> Verdict:
        verdict = Verdict.UNKNOWN
        for known, was in self._gone:
            if hmac.compare_digest(known, token):
                verdict = was
        return verdict
