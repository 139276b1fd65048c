"""Groups of nodes: every node in one, failure domains apart, like with like."""

import itertools
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.erasure.placement import Group, PlacedNode, Placement, place


def nodes_of(count: int, **labels: list[str]) -> list[PlacedNode]:
    """Nodes n0, n1, ... of one size; each label's values are dealt out in turn."""
    return [
        PlacedNode(f"n{i}", {key: values[i % len(values)] for key, values in labels.items()}, 100)
        for i in range(count)
    ]


def overfull(nodes: list[PlacedNode], placement: Placement) -> dict[tuple[str, str], set[str]]:
    """The domains of which a group has more members than parities, and those members."""
    labels = {node.node_id: node.labels for node in nodes}
    found: dict[tuple[str, str], set[str]] = {}
    for group in placement.groups:
        for domain in {d for name in group.members for d in labels[name].items()}:
            inside = {n for n in group.members if labels[n].get(domain[0]) == domain[1]}
            if len(inside) > group.parities:
                found.setdefault(domain, set()).update(inside)
    return found


@st.composite
def some_nodes(draw: st.DrawFn) -> list[PlacedNode]:
    labels = st.dictionaries(st.sampled_from(["rack", "power"]), st.sampled_from("abcde"))
    return [
        PlacedNode(f"n{i}", draw(labels), draw(st.integers(0, 5)))
        for i in range(draw(st.integers(0, 24)))
    ]


group_sizes = st.sampled_from([0, 0, 2, 3, 4, 5, 8, 12])


@given(some_nodes(), group_sizes, st.integers(0, 3))
def test_every_node_is_in_one_group_of_the_right_size(
    nodes: list[PlacedNode], group_size: int, parities: int
) -> None:
    parities = min(parities, group_size - 1) if group_size else parities
    groups = place(nodes, group_size, parities).groups
    if len(nodes) < 2:
        assert groups == ()
        return
    names = [name for group in groups for name in group.members]
    assert sorted(names) == sorted(node.node_id for node in nodes)
    lengths = [len(group.members) for group in groups]
    least = min(group_size or 8, len(nodes))
    assert min(lengths) >= least
    assert max(lengths) - min(lengths) <= 1
    assert len(groups) == len(nodes) // least
    for group in groups:
        wanted = parities or (2 if least >= 8 else 1)
        assert group.parities == min(wanted, len(group.members) - 1)


@given(some_nodes(), group_sizes, st.integers(0, 3))
def test_a_domain_that_is_too_full_is_named(
    nodes: list[PlacedNode], group_size: int, parities: int
) -> None:
    parities = min(parities, group_size - 1) if group_size else parities
    placement = place(nodes, group_size, parities)
    found = overfull(nodes, placement)
    named = [w for w in placement.warnings if w.startswith("the loss of")]
    assert len(named) == len(found)
    for (label, value), inside in found.items():
        (warning,) = [w for w in named if f"{label}={value} " in w]
        if " groups more" not in warning:
            assert set(re.findall(r"\bn\d+\b", warning)) == inside


@given(some_nodes(), group_sizes, st.randoms(use_true_random=False))
def test_the_order_of_the_nodes_does_not_matter(
    nodes: list[PlacedNode], group_size: int, source: random.Random
) -> None:
    shuffled = [
        PlacedNode(n.node_id, dict(reversed(n.labels.items())), n.stream_bytes) for n in nodes
    ]
    source.shuffle(shuffled)
    assert place(shuffled, group_size) == place(nodes, group_size)


@given(
    st.lists(st.sampled_from("abcdef"), min_size=2, max_size=40),
    st.sampled_from([2, 3, 4, 6, 8]),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_domains_of_one_label_are_kept_apart_wherever_that_can_be(
    racks: list[str], group_size: int, parities: int, source: random.Random
) -> None:
    parities = min(parities, group_size - 1, len(racks) - 1)
    nodes = [
        PlacedNode(f"n{i}", {"rack": rack}, source.randrange(9)) for i, rack in enumerate(racks)
    ]
    placement = place(nodes, group_size, parities)
    possible = max(Counter(racks).values()) <= parities * len(placement.groups)
    assert (overfull(nodes, placement) == {}) == possible


@pytest.mark.parametrize("seed", range(60))
def test_domains_of_three_labels_are_kept_apart_where_a_placement_is_known(seed: int) -> None:
    """Nodes are made group by group, so that one placement has no domain too full."""
    source = random.Random(seed)
    group_size, parities = source.choice([(4, 1), (6, 2), (8, 2)])
    made = []
    for _ in range(source.randrange(2, 9)):
        dealt = []
        for domains in (group_size // parities, group_size, group_size + 3):
            places = [value for value in range(domains) for _ in range(parities)]
            dealt.append(source.sample(places, group_size))
        made += zip(*dealt, strict=True)
    source.shuffle(made)
    nodes = [
        PlacedNode(
            f"n{i}", {"rack": f"r{r}", "power": f"p{p}", "row": f"z{z}"}, source.randrange(9)
        )
        for i, (r, p, z) in enumerate(made)
    ]
    placement = place(nodes, group_size, parities)
    assert overfull(nodes, placement) == {}
    assert placement.warnings == ()


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (2, [(2, 1)]),
        (3, [(3, 1)]),
        (4, [(4, 1)]),
        (7, [(7, 1)]),
        (8, [(8, 2)]),
        (9, [(9, 2)]),
        (15, [(15, 2)]),
        (16, [(8, 2)] * 2),
        (17, [(9, 2), (8, 2)]),
        (67, [(9, 2)] * 3 + [(8, 2)] * 5),
    ],
)
def test_defaults(count: int, expected: list[tuple[int, int]]) -> None:
    placement = place(nodes_of(count))
    got = [(len(group.members), group.parities) for group in placement.groups]
    assert sorted(got, reverse=True) == expected
    assert placement.warnings == ()


def test_a_node_alone_has_no_group() -> None:
    assert place([]) == Placement((), ())
    assert place(nodes_of(1)) == Placement((), ())
    (warning,) = place(nodes_of(1), parities=1).warnings
    assert warning.startswith("n0 is the only node")


def test_parities_that_few_nodes_cannot_have_are_warned_of() -> None:
    placement = place(nodes_of(2), parities=2)
    assert placement.groups == (Group(("n0", "n1"), 1),)
    (warning,) = placement.warnings
    assert "n0, n1" in warning
    assert "1, not of 2" in warning


def test_a_rack_that_holds_too_many_is_named() -> None:
    placement = place(nodes_of(6, rack=list("abacad")))
    assert placement.groups == (Group(("n0", "n1", "n2", "n3", "n4", "n5"), 1),)
    (warning,) = placement.warnings
    assert "the loss of rack=a would" in warning
    assert "n0, n2, n4 (3 nodes, 1 may be lost)" in warning


def test_nodes_without_labels_are_domains_of_their_own() -> None:
    nodes = [*nodes_of(4), PlacedNode("n9", {"rack": "a"}, 1), PlacedNode("n8", {"rack": "b"}, 1)]
    assert place(nodes, 3, 1).warnings == ()


def test_one_value_of_two_labels_is_two_domains() -> None:
    nodes = [PlacedNode("n0", {"rack": "a"}, 1), PlacedNode("n1", {"power": "a"}, 1)]
    assert place(nodes).warnings == ()


def test_racks_and_power_at_once() -> None:
    """Sixteen nodes on a grid: each group of four takes every rack and every feed once."""
    nodes = [
        PlacedNode(f"n{rack}{feed}", {"rack": str(rack), "power": str(feed)}, 1)
        for rack, feed in itertools.product(range(4), repeat=2)
    ]
    placement = place(nodes, 4, 1)
    assert placement.warnings == ()
    for group in placement.groups:
        assert sorted(name[1] for name in group.members) == list("0123")
        assert sorted(name[2] for name in group.members) == list("0123")


def test_nodes_of_like_size_are_together() -> None:
    nodes = [PlacedNode(f"n{i:02}", {}, i * 7 % 32) for i in range(32)]
    size = {node.node_id: node.stream_bytes for node in nodes}
    spans = sorted(
        (min(size[n] for n in group.members), max(size[n] for n in group.members))
        for group in place(nodes).groups
    )
    assert spans == [(0, 7), (8, 15), (16, 23), (24, 31)]


def test_nodes_of_like_size_are_together_inside_the_domains() -> None:
    nodes = [
        PlacedNode(f"{rack}{i}", {"rack": rack}, (1 + i) * 1000 + ord(rack))
        for rack in "abcd"
        for i in range(4)
    ]
    placement = place(nodes, 4, 1)
    assert placement.groups == tuple(
        Group((f"a{i}", f"b{i}", f"c{i}", f"d{i}"), 1) for i in range(4)
    )


def test_long_warnings_are_cut() -> None:
    placement = place(nodes_of(400, rack=["a"]), 40, 2)
    (warning,) = placement.warnings
    assert "and 24 more" in warning
    assert "and 6 groups more" in warning
    assert len(warning) < 1000


@pytest.mark.parametrize(
    ("group_size", "parities"),
    [(1, 0), (-1, 0), (256, 0), (4, 4), (2, 3), (0, -1), (0, 255)],
)
def test_impossible_numbers_are_refused(group_size: int, parities: int) -> None:
    with pytest.raises(ValueError, match=r"no group|parities need"):
        place(nodes_of(9), group_size, parities)


def test_a_node_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        place([*nodes_of(3), *nodes_of(1)])


def test_no_group_is_larger_than_the_code_allows() -> None:
    groups = place(nodes_of(400), 250, 2).groups
    assert [len(group.members) for group in groups] == [200, 200]


def test_many_parities_make_larger_groups() -> None:
    groups = place(nodes_of(40), parities=5).groups
    assert [(len(group.members), group.parities) for group in groups] == [(10, 5)] * 4


def test_large_clusters_are_placed_at_once() -> None:
    nodes = nodes_of(4096, rack=[str(i) for i in range(127)], power=list("abcdefg"))
    placement = place(nodes)
    assert len(placement.groups) == 512
    assert placement.warnings == ()


def test_racks_of_like_nodes_are_spread_over_the_groups() -> None:
    """Far more nodes are alike by rack than could be exchanged afterwards."""
    nodes = [PlacedNode(f"n{i}", {"rack": str(i // 32)}, i // 32) for i in range(4096)]
    assert place(nodes).warnings == ()


def test_a_large_rack_of_small_nodes_is_not_left_to_the_last_groups() -> None:
    """Rack a has just as many nodes as all groups may take, and they come last by size."""
    nodes = [
        PlacedNode(f"n{i}", {"rack": "a" if i < 1024 else f"b{i % 100}"}, i) for i in range(4096)
    ]
    placement = place(nodes)
    assert placement.warnings == ()
    for group in placement.groups:
        assert sum(int(name[1:]) < 1024 for name in group.members) == 2
