"""Membership in seeded worlds: after storms and partitions, one view and one coordinator."""

import pytest

from .membership_world import World, check_converged, world


def storm(seed: int) -> World:
    """A bad half an hour, after which the network is whole for a while."""
    bad = world(seed, 4)
    draw = bad.random
    for i in range(1, 5):
        start_s = draw.choice([0, 0, draw.uniform(0, 40)])
        bad.later(start_s, lambda i=i: bad.start(f"n{i}", f"h{i}:1"))  # type: ignore[misc]
    bad.loss, bad.delay_s = draw.choice([0, 0.1, 0.4]), draw.choice([0.02, 0.3])
    for spare in range(5, 5 + draw.randint(1, 10)):
        bad.run(draw.uniform(0.1, 15))
        trouble(bad, spare)
    bad.side, bad.loss, bad.delay_s = {}, 0, 0.05
    for process in bad.at.values():
        process.stopped = False
    bad.run(150)
    return bad


def trouble(bad: World, spare: int) -> None:
    draw = bad.random
    kind = draw.choice(["part", "heal", "restart", "kill", "stop", "go", "twin", "replace"])
    if kind in {"part", "heal"}:
        bad.side = {address: draw.randint(0, 1) for address in bad.at} if kind == "part" else {}
    if not bad.alive():
        return
    process = draw.choice(bad.alive())
    own = process.members.rules
    if kind == "restart":
        bad.start(own.node_id, own.address)
    elif kind == "kill" and len(bad.alive()) > 2:
        del bad.at[own.address]
    elif kind == "stop":
        process.stopped = True
    elif kind == "go":
        for stopped in bad.at.values():
            stopped.stopped = False
    elif kind in {"twin", "replace"}:
        bad.list_also(f"h{spare}:1")
        if kind == "twin":
            bad.start(own.node_id, f"h{spare}:1")
        else:
            bad.start(f"n{spare}", f"h{spare}:1", replaces=own.node_id)


@pytest.mark.parametrize("seed", range(60))
def test_storms_end_in_one_view_and_one_coordinator(seed: int) -> None:
    after = storm(seed)
    for process in after.alive():
        members = process.members
        if not members.joined and not members.expelled:
            # A twin of one that lives, or one that shall replace a living or a replaced one.
            assert "alive" in members.refusal or "already" in members.refusal
            del after.at[members.rules.address]
    after.run(10)
    check_converged(after)


def test_a_quiet_cluster_forms_fast_and_loses_its_coordinator_for_a_moment_only() -> None:
    calm = world(7, 4)
    for i in range(1, 5):
        calm.start(f"n{i}", f"h{i}:1")
    calm.run(5)
    check_converged(calm)
    epoch = calm.at["h2:1"].members.epoch
    del calm.at["h1:1"]
    calm.run(8)
    heirs = {process.members.coordinator(calm.now_s) for process in calm.alive()}
    assert heirs == {"n2"}
    assert calm.at["h2:1"].members.ready(calm.now_s)
    assert calm.at["h3:1"].members.suspected(calm.now_s) == ("n1",)
    assert calm.at["h2:1"].members.epoch == epoch, "losing contact changes no entry"
    calm.start("n1", "h1:1")
    calm.run(4)
    check_converged(calm)


def test_a_partition_has_two_coordinators_and_heals_by_itself() -> None:
    calm = world(3, 4)
    for i in range(1, 5):
        calm.start(f"n{i}", f"h{i}:1")
    calm.run(5)
    view = calm.at["h1:1"].members.view
    calm.side = {"h3:1": 1, "h4:1": 1}
    calm.run(15)
    sides = [calm.at[f"h{i}:1"].members.coordinator(calm.now_s) for i in range(1, 5)]
    assert sides == ["n1", "n1", "n3", "n3"]
    assert calm.at["h1:1"].members.live(calm.now_s) == ("n1", "n2")
    assert calm.at["h4:1"].members.live(calm.now_s) == ("n3", "n4")
    calm.side = {}
    calm.run(10)
    check_converged(calm)
    assert calm.at["h4:1"].members.view == view
