"""How long a training thread waits for a slot: at the agent's socket for offers, and by gRPC.

``python -m benchmarks.offer [--rounds N]``. One agent, both ways in turns, some milliseconds apart.
The question is one that the agent refuses, so that no state decides how long it takes: what is
measured is the way there and back, and the training thread's own part of it, which it has to spend
even if it does something else until the answer is there.
"""

import argparse
import contextlib
import time
from collections.abc import Callable

from benchmarks.report import Report
from benchmarks.workload import agent
from everstep.client.channel import Channel
from everstep.client.offers import Asked, OfferLine
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import StaleIncarnation

TIMEOUT_S = 1.0
PAUSE_S = 0.003
SESSION = wire.Session(job="nobody", rank=0, world=1, process_id="x" * 32, incarnation=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    report = Report("offer")
    with agent() as address:
        channel = Channel(address)
        line = OfferLine(channel)
        ways: dict[str, Callable[[wire.OfferRequest], Asked]] = {
            "socket": lambda request: line.ask(request, TIMEOUT_S),
            "gRPC": lambda request: channel.start("Offer", request, TIMEOUT_S),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for step in range(rounds + 1):
            for name, ask in ways.items():
                found[name].append(once(ask, step))
        line.hang_up()
        channel.close()
    medians = {}
    for name, times in found.items():
        own, whole = zip(*times[1:], strict=True)  # the first connects
        medians[name] = report.seconds(f"{name}: question and answer", whole, f"{name}_whole")
        report.seconds(f"  {name}: asking alone", own, f"{name}_asking")
    report.target("socket over gRPC", medians["socket"] / medians["gRPC"], 0.5)
    report.print()


def once(ask: Callable[[wire.OfferRequest], Asked], step: int) -> tuple[float, float]:
    """Seconds until it is asked, and until it is answered."""
    time.sleep(PAUSE_S)
    request = wire.OfferRequest(session=SESSION, step=step)
    begun = time.perf_counter()
    asked = ask(request)
    own_s = time.perf_counter() - begun
    with contextlib.suppress(StaleIncarnation):
        asked.result()
    return own_s, time.perf_counter() - begun


if __name__ == "__main__":
    main()
