"""Real ranks with FSDP2 and ZeRO: killed, and started again as many, fewer or more.

What a test asks of a run, see fsdp_ranks.py. Launches are slow, so those of the first tests are
shared: two ranks train, are killed, and three launches restore what they left.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import AgentProcess
from .launches import Launches, Seen

pytestmark = pytest.mark.timeout(600)  # all launches belong to the first test
KINDS = ("fsdp", "zero")


@pytest.fixture(scope="module")
def start_launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Launches]]:
    """Launches with an agent and a folder of their own."""
    agents, started = [], []

    def start() -> Launches:
        agent = AgentProcess(tmp_path_factory.mktemp("nvme"))
        agents.append(agent)
        agent.start()
        started.append(Launches(agent, tmp_path_factory.mktemp("ranks")))
        return started[-1]

    yield start
    for launches in started:
        launches.close()
    for agent in agents:
        agent.close()


@pytest.fixture(scope="module")
def launched(start_launches: Callable[[], Launches]) -> Path:
    """Two ranks that were killed; then two, one and three that went on."""
    launches = start_launches()
    launches.save_and_die(2, KINDS)
    for world in (2, 1, 3):
        launches.resume(world, KINDS)
    return launches.out


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_ranks_go_on_as_if_nothing_had_happened(launched: Path, kind: str) -> None:
    seen = Seen(launched, kind)
    seen.check_saved()
    seen.check_restored("two", same_end=True)
    assert seen["two"][0]["restored"]["generators"] != seen["two"][1]["restored"]["generators"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", ["one", "three"])
def test_fewer_and_more_ranks_go_on(launched: Path, kind: str, world: str) -> None:
    seen = Seen(launched, kind)
    seen.check_saved()
    seen.check_restored(world, same_end=False)
    assert all(rank.get("committed", world == "one") for rank in seen[world])


@pytest.mark.long
def test_fsdp_over_tensor_parallelism(start_launches: Callable[[], Launches]) -> None:
    """2 x 2 ranks; what tensor parallelism leaves alone is on all of them."""
    launches = start_launches()
    launches.save_and_die(4, ["tensors"])
    for world in (2, 1, 4):
        launches.resume(world, ["tensors"])
    seen = Seen(launches.out, "tensors")
    seen.check_saved()
    seen.check_restored("four", same_end=True)
    for name in ("two", "one"):
        seen.check_restored(name, same_end=False)


@pytest.mark.long
def test_a_restore_that_is_killed_is_repeated(start_launches: Callable[[], Launches]) -> None:
    """By other processes, of which there are as many, or not."""
    launches = start_launches()
    launches.save_and_die(2, ["fsdp"])
    launches.die_restoring(3, "fsdp")
    launches.resume(2, ["fsdp"])
    launches.die_restoring(2, "fsdp")
    launches.resume(3, ["fsdp"])
    seen = Seen(launches.out, "fsdp")
    seen.check_saved()
    seen.check_restored("two", same_end=True)
    seen.check_restored("three", same_end=False)
