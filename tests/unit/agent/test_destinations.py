"""Where ranks shall be in memory again, by hand."""

from everstep.agent.destinations import Home, destinations, to_be_moved
from everstep.agent.inventory import NodeInventory
from everstep.agent.planning import SnapshotPlan, plan_snapshots

from .protected import even, holding

PLAN = even(4, 2, ranks=2)
"""n1 to n4, two ranks each."""


def planned(*inventories: NodeInventory) -> SnapshotPlan:
    (plan,) = plan_snapshots(inventories)
    assert plan.recoverable
    return plan


def nodes_of(homes: tuple[Home, ...]) -> list[str]:
    assert [home.rank for home in homes] == list(range(8))
    return [home.node_id for home in homes]


def test_ranks_stay_where_they_run() -> None:
    plan = planned(*(holding(PLAN, index) for index in range(4)))
    live = ["n1", "n2", "n3", "n4", "n5"]
    stay = ["n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4"]
    assert nodes_of(destinations(plan, {}, live, {})) == stay
    assert to_be_moved(plan, destinations(plan, {}, live, {})) == {}
    elsewhere = destinations(plan, {7: "n5"}, live, {})
    assert nodes_of(elsewhere) == [*stay[:7], "n5"]
    assert to_be_moved(plan, elsewhere) == {"n5": [7]}


def test_a_node_that_came_back_empty_gets_its_own_again() -> None:
    plan = planned(*(holding(PLAN, index) for index in range(3)))
    homes = destinations(plan, {}, ["n1", "n2", "n3", "n4"], {})
    assert nodes_of(homes)[6:] == ["n4", "n4"]
    assert to_be_moved(plan, homes) == {"n4": [6, 7]}


def test_who_replaces_a_lost_node_is_preferred_to_an_empty_one() -> None:
    plan = planned(*(holding(PLAN, index) for index in range(3)))
    replaced = {"n4": "n6", "n6": "n7"}
    homes = destinations(plan, {}, ["n1", "n2", "n3", "n5", "n7"], replaced)
    assert nodes_of(homes)[6:] == ["n7", "n7"]
    assert homes[6].reason == "n7 replaces n4"


def test_a_circle_of_replacements_ends() -> None:
    plan = planned(*(holding(PLAN, index) for index in range(3)))
    homes = destinations(plan, {}, ["n1", "n2", "n3"], {"n4": "n5", "n5": "n4"})
    assert nodes_of(homes)[6:] == ["n1", "n1"]


def test_lost_together_stay_together_and_the_emptiest_takes_them() -> None:
    plan = planned(holding(PLAN, 0), holding(PLAN, 1))
    homes = destinations(plan, {}, ["n1", "n2", "n5", "n6"], {})
    assert nodes_of(homes)[4:] == ["n5", "n5", "n6", "n6"]
    assert homes[4].reason == "n3 is gone, and n5 has nothing of this job"
    crowded = destinations(plan, {}, ["n1", "n2"], {})
    assert nodes_of(crowded)[4:] == ["n1", "n1", "n2", "n2"]
    assert "has the least" in crowded[4].reason


def test_what_is_only_on_disk_is_brought_into_memory() -> None:
    plan = planned(*(holding(PLAN, index, ["nvme"]) for index in range(4)))
    homes = destinations(plan, {}, ["n1", "n2", "n3", "n4"], {})
    assert to_be_moved(plan, homes) == {"n1": [0, 1], "n2": [2, 3], "n3": [4, 5], "n4": [6, 7]}


def test_with_nobody_alive_there_is_nowhere_to_go() -> None:
    plan = planned(*(holding(PLAN, index) for index in range(4)))
    assert destinations(plan, {}, [], {}) == ()
