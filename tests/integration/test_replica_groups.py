"""Ranks compare replicas with those that have the same ones, and wait for nobody else."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import pytest

import everstep
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import DeadlineExceeded, FormatInvalid

from .clusters import AgentCluster
from .conftest import AgentProcess

WORLD = 4
OPTIONS = "[limits]\ndeclare_timeout_s = 3.0\n"


class Ranks:
    """Four ranks of one job, and what they declare."""

    def __init__(self, addresses: list[str]) -> None:
        self._callers = ThreadPoolExecutor(2 * WORLD)
        self.addresses = addresses
        self.clients = [self.client(rank) for rank in range(WORLD)]

    def client(self, rank: int, *, live_join: bool = False) -> everstep.Client:
        """A process that holds a rank."""
        agent = self.addresses[rank % len(self.addresses)]
        return everstep.connect("groups", agent=agent, rank=rank, world=WORLD, live_join=live_join)

    def says(
        self, rank: int, digests: str, *group: int, step: int = 1, joining: bool = False
    ) -> "Future[wire.DeclareReply]":
        """A rank declares its replicas, in a thread of its own."""
        client = self.clients[rank]
        request = wire.DeclareRequest(
            session=client._session.identity,
            candidates=["a", "b", "c"],
            candidate_digests=b"".join(digest.encode() * 16 for digest in digests),
            round=step,
            participants=group,
            joining=joining,
        )
        return self._callers.submit(client._channel.call, "Declare", request, 30.0)

    def close(self) -> None:
        """End them."""
        for client in self.clients:
            client.close(timeout=0)
        self._callers.shutdown()


@pytest.fixture(params=["one agent", "two nodes"])
def ranks(
    request: pytest.FixtureRequest, start_agent: Callable[..., AgentProcess]
) -> Iterator[Ranks]:
    """With one agent for all, or two agents with every other rank each."""
    if request.param == "one agent":
        with closing(Ranks([start_agent(OPTIONS).address])) as found:
            yield found
        return
    with closing(AgentCluster(OPTIONS)) as cluster:
        cluster.start(2)
        with closing(Ranks([cluster[node].address for node in ("n1", "n2")])) as found:
            yield found


def agreed(answer: "Future[wire.DeclareReply]") -> list[int]:
    reply = answer.result(30.0)
    assert not reply.unknown
    return list(reply.agreed)


def test_a_group_waits_for_its_ranks_only_and_names_them(ranks: Ranks) -> None:
    left = [ranks.says(rank, "xyz", 0, 1) for rank in (0, 1)]
    right = [ranks.says(2, "pqr", 2, 3), ranks.says(3, "pqx", 2, 3)]
    assert [agreed(one) for one in left] == [[0, 1, 2]] * 2
    assert [agreed(one) for one in right] == [[0, 1]] * 2
    # Rank 0 of another group, which is at another step; a round of all ranks lacks the others.
    across = [ranks.says(0, "xyz", 0, 2, 3, step=9), ranks.says(3, "xy-", 0, 2, 3, step=9)]
    everybody = ranks.says(1, "xyz", step=4)
    for answer in across:
        with pytest.raises(DeadlineExceeded) as caught:
            answer.result(30.0)
        assert caught.value.late == ("rank 2",)
    with pytest.raises(DeadlineExceeded) as caught:
        everybody.result(30.0)
    assert caught.value.late == ("rank 0", "rank 2", "rank 3")


def test_one_that_joins_hears_of_its_groups_only(ranks: Ranks) -> None:
    for answer in [ranks.says(rank, "xyz" if rank else "xy-", 0, 1) for rank in (0, 1)]:
        assert agreed(answer) == [0, 1]
    # All ranks, by their names and without.
    everybody = [ranks.says(rank, "xyz", *range(WORLD if rank % 2 else 0)) for rank in range(WORLD)]
    assert [agreed(answer) for answer in everybody] == [[0, 1, 2]] * WORLD
    ranks.clients[1].close(timeout=0)
    ranks.clients[1] = ranks.client(1, live_join=True)
    assert agreed(ranks.says(1, "---", 0, 1, joining=True)) == [0, 1]
    assert agreed(ranks.says(1, "---", joining=True)) == [0, 1, 2]
    assert ranks.says(1, "---", 1, 2, joining=True).result(30.0).unknown


def test_a_group_without_its_rank_is_no_group(ranks: Ranks) -> None:
    for group in ((0, 1), (2, 1), (2, WORLD)):
        with pytest.raises(FormatInvalid, match=r"participants|world"):
            ranks.says(2, "xyz", *group).result(30.0)
