"""What happens when: the world's clock, and a network that is as bad as told.

Owns the queue of what is to happen and the links between nodes. Promises that the order follows
from the seed alone. A message may be lost, late, doubled, or overtaken by another one.
"""

import heapq
import random
from collections.abc import Callable
from typing import Any


class Clock:
    """Time, and all that waits for it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def later(self, delay_s: float, what: Callable[..., None], *arguments: Any) -> None:
        """Let something happen."""
        self._count += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._count, what, arguments))

    def run(self, until_s: float, look: Callable[[], None]) -> None:
        """Let happen what is due until then, and look after each event."""
        queue = self._queue
        while queue and queue[0][0] <= until_s:
            self.now_s, _, what, arguments = heapq.heappop(queue)
            self.events += 1
            what(*arguments)
            look()
        self.now_s = until_s


class Network:
    """Links between nodes, by their addresses."""

    def __init__(self, clock: Clock, chance: random.Random) -> None:
        self._clock = clock
        self._chance = chance
        self.loss = 0.0
        self.doubled = 0.0
        self.delay_s = 0.02
        self.blocked: set[tuple[str, str]] = set()
        self.sent = 0
        self.lost = 0

    def open(self, source: str, target: str) -> bool:
        """Whether anything can pass in this direction."""
        return (source, target) not in self.blocked

    def call(self, source: str, target: str) -> bool:
        """Whether a question and its answer get through at this time."""
        if source == target:
            return True
        there = self.open(source, target) and self.open(target, source)
        return there and self._chance.random() >= 2 * self.loss

    def send(self, source: str, target: str, what: Callable[..., None], *arguments: Any) -> None:
        """A message sets out."""
        chance = self._chance.random
        self.sent += 1
        for _ in range(2 if self.doubled and chance() < self.doubled else 1):
            if (source, target) in self.blocked or (self.loss and chance() < self.loss):
                self.lost += 1
                continue
            self._clock.later(2 * chance() * self.delay_s, what, *arguments)
