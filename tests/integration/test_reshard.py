"""State of any mesh comes back in any other, from memory: global tensors equal as bytes."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

import everstep
from everstep.proto.errors import Misplaced, Refused, StateMismatch

from .conftest import AgentProcess
from .meshes import WORLD_LIMIT, Job, Plan, Reference, digest, update

SAVED = [Plan(2, 2, 1), Plan(4, 1, 1), Plan(1, 2, 2), Plan(2, 1, 1, 2)]
OTHERS = [Plan(1), Plan(3), Plan(8), Plan(2, 2, 2), Plan(1, 4, 1), Plan(2, 2, 1, 2)]


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_LIMIT)
    yield
    torch.distributed.destroy_process_group()


def options(agent: AgentProcess) -> dict[str, str]:
    return {"agent": agent.address}


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_every_mesh_restores_what_another_has_saved(
    agent_process: AgentProcess, saved: Plan
) -> None:
    with Job(saved, "job", **options(agent_process)) as first:
        first.train(2)
        assert first.whole() == Reference(2).state
        first.snapshot(2)
    for plan in [saved, *(p for p in [*SAVED, *OTHERS] if p != saved)]:
        with Job(plan, "job", zeros=True, **options(agent_process)) as job:
            partial = plan.stages > 1
            assert job.restore(partial=partial) == [2] * plan.world, plan
            assert job.whole() == Reference(2).state, plan
            job.train(1)
            assert job.whole() == Reference(3).state, plan


class Experts(torch.nn.Module):
    """Some of the experts: their weights one over the other, their biases each by itself."""

    def __init__(self, mine: list[int], *, zeros: bool = False) -> None:
        super().__init__()
        self.mine = mine
        weight = torch.stack([expert_weight(index) for index in mine])
        self.weight = torch.nn.Parameter(weight * (not zeros))
        self.bias = torch.nn.ParameterList(
            [expert_weight(index)[0] * (not zeros) for index in mine]
        )

    def placed(self, name: str, tensor: torch.Tensor) -> list[everstep.Extent] | None:
        if name == "model/weight":
            return [
                everstep.Extent(name, (EXPERTS, 3, 5), (expert, 0, 0), (at, 0, 0), (1, 3, 5))
                for at, expert in enumerate(self.mine)
            ]
        expert = self.mine[int(name.rpartition(".")[2])]
        return [everstep.Extent(f"model/bias.{expert}", tuple(tensor.shape), (0,))]


EXPERTS = 6


def expert_weight(index: int) -> torch.Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(index))


def run_experts(
    agent: AgentProcess, maps: list[list[int]], *, restore: bool, moved: list[list[int]] | None
) -> list[Experts]:
    """A job whose ranks have these experts; after a step and a snapshot others, and one more."""
    models = [Experts(mine, zeros=restore) for mine in maps]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    clients = [
        everstep.connect(job="experts", rank=rank, world=len(maps), agent=agent.address)
        for rank in range(len(maps))
    ]
    for client, model, optimizer in zip(clients, models, optimizers, strict=True):
        placement = {"model": model.placed}
        client.attach(model=model, optimizer=optimizer, placement=placement)
    with ThreadPoolExecutor(len(maps)) as pool:
        if restore:
            assert set(pool.map(lambda client: client.restore(partial=True), clients)) == {2}
        else:
            for step in (1, 2):
                for optimizer in optimizers:
                    update(optimizer)
                if step == 2 and moved is not None:
                    trade(models, optimizers, moved)
                handles = list(pool.map(lambda c, at=step: c.snapshot(at, force=True), clients))
                assert all(handle.wait() for handle in handles), handles
        list(pool.map(lambda client: client.close(timeout=0), clients))
    for model, optimizer in zip(models, optimizers, strict=True):
        update(optimizer) if restore else None
        assert len(model.mine) == len(model.weight)
    return models


def trade(
    models: list[Experts], optimizers: list[torch.optim.AdamW], moved: list[list[int]]
) -> None:
    """Experts move to other ranks, with all that belongs to them, in the memory that is there."""
    old = {
        e: (m, o, i) for m, o in zip(models, optimizers, strict=True) for i, e in enumerate(m.mine)
    }
    values = {}
    for expert, (model, optimizer, at) in old.items():
        bias = model.bias[at]
        state, own = optimizer.state[model.weight], optimizer.state[bias]
        values[expert] = [
            (key, tensor[at].clone(), other.clone())
            for key, tensor, other in [
                ("", model.weight.data, bias.data),
                *((k, state[k], own[k]) for k in ("exp_avg", "exp_avg_sq")),
            ]
        ]
    for model, optimizer, mine in zip(models, optimizers, moved, strict=True):
        model.mine = mine
        for at, expert in enumerate(mine):
            for key, row, other in values[expert]:
                state, own = optimizer.state[model.weight], optimizer.state[model.bias[at]]
                (state[key] if key else model.weight.data)[at] = row
                (own[key] if key else model.bias[at].data).copy_(other)


def experts_of(models: list[Experts]) -> dict[int, bytes]:
    return {
        expert: digest(torch.cat([model.weight[at].flatten(), model.bias[at]]))
        for model in models
        for at, expert in enumerate(model.mine)
    }


@pytest.mark.parametrize(
    "maps", [[[0, 1, 2, 3, 4, 5]], [[5, 0], [1, 2], [3, 4]], [[4], [0, 5, 3, 1, 2]]], ids=str
)
def test_experts_go_where_the_map_says(agent_process: AgentProcess, maps: list[list[int]]) -> None:
    """Also where they moved between two snapshots."""
    run_experts(agent_process, [[0, 1, 2], [3, 4, 5]], restore=False, moved=[[3, 1, 5], [0, 4, 2]])
    alone = Experts(list(range(EXPERTS)))
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.1)
    for _ in range(3):
        update(optimizer)
    models = run_experts(agent_process, maps, restore=True, moved=None)
    assert experts_of(models) == experts_of([alone])


def plain_job(
    agent: AgentProcess, world: int, build: Callable[[int], dict[str, Any]], **kinds: Any
) -> list[tuple[everstep.Client, dict[str, Any]]]:
    """Ranks with objects of their own."""
    found = []
    for rank in range(world):
        client = everstep.connect(job="job", rank=rank, world=world, agent=agent.address)
        objects = build(rank)
        client.attach(**objects, **{kind: make(rank) for kind, make in kinds.items()})
        found.append((client, objects))
    return found


def on_all(ranks: list[tuple[everstep.Client, Any]], work: Callable[[everstep.Client], Any]) -> Any:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: work(rank[0]), ranks))


def saved_by(agent: AgentProcess, world: int, build: Callable[[int], dict[str, Any]]) -> None:
    ranks = plain_job(agent, world, build)
    handles = on_all(ranks, lambda client: client.snapshot(1, force=True))
    assert all(handle.wait() for handle in handles), handles
    on_all(ranks, lambda client: client.close(timeout=0))


def test_what_ranks_have_for_themselves_is_refused_or_follows_a_rule(
    agent_process: AgentProcess,
) -> None:
    def build(rank: int, *, zeros: bool = False) -> dict[str, Any]:
        value = 0.0 if zeros else 2.0**rank
        return {"feedback": {"error": torch.full((4000,), value), "count": 0 if zeros else rank}}

    saved_by(agent_process, 3, build)
    ranks = plain_job(agent_process, 2, lambda rank: build(rank, zeros=True))
    for client, objects in ranks:
        with pytest.raises(StateMismatch) as raised:
            client.restore()
        assert set(raised.value.divergent) == {"feedback/error", "feedback/count"}
        assert not objects["feedback"]["error"].any()
    for rule, expected in [
        ({"feedback/error": "sum", "feedback": "keep"}, [1.0 + 4.0, 2.0]),
        ({"feedback/error": "drop", "feedback": "rank0"}, [0.0, 0.0]),
        ({"feedback": "keep"}, [1.0, 2.0]),
        ({"feedback": "rank0"}, [1.0, 1.0]),
    ]:
        on_all(ranks, lambda client, rule=rule: client.restore(on_resize=rule))
        assert [o["feedback"]["error"].unique().tolist() for _, o in ranks] == [
            [e] for e in expected
        ]
        assert all("feedback/error" in " ".join(client.restored_notes) for client, _ in ranks)
    on_all(ranks, lambda client: client.close(timeout=0))
    more = plain_job(agent_process, 5, lambda rank: build(rank, zeros=True))
    on_all(more, lambda client: client.restore(on_resize={"feedback/error": "sum", "*": "keep"}))
    sums = [objects["feedback"]["error"][0].item() for _, objects in more]
    assert sums == [1.0, 2.0, 4.0, 0.0, 0.0]
    assert [objects["feedback"]["count"] for _, objects in more] == [0, 1, 2, 0, 1]
    on_all(more, lambda client: client.close(timeout=0))


class Loader:
    """Reads its own part of the data; knows how its position is dealt anew."""

    def __init__(self, seen: int) -> None:
        self.seen = seen

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class ReshardingLoader(Loader):
    def reshard_state_dict(
        self, states: list[dict[str, int]], rank: int, world: int
    ) -> dict[str, int]:
        whole, rest = divmod(sum(state["seen"] for state in states), world)
        return {"seen": whole + (rank < rest)}


def test_a_loader_is_resharded_by_itself_or_refused(agent_process: AgentProcess) -> None:
    saved_by(agent_process, 3, lambda rank: {"loader": Loader(10 + rank)})
    ranks = plain_job(agent_process, 2, lambda rank: {"loader": Loader(0)})
    for client, _ in ranks:
        with pytest.raises(StateMismatch, match="on_resize"):
            client.restore()
    on_all(ranks, lambda client: client.close(timeout=0))
    ranks = plain_job(agent_process, 2, lambda rank: {"loader": ReshardingLoader(0)})
    on_all(ranks, lambda client: client.restore())
    assert [objects["loader"].seen for _, objects in ranks] == [17, 16]
    on_all(ranks, lambda client: client.close(timeout=0))


def test_generators_of_new_ranks_are_seeded_and_told(agent_process: AgentProcess) -> None:
    saved_by(agent_process, 1, lambda rank: {"tree": {"x": torch.ones(3)}})
    ranks = plain_job(agent_process, 2, lambda rank: {"tree": {"x": torch.zeros(3)}})
    drawn = []
    for client, _ in ranks:
        client.restore()
        drawn.append(torch.rand(1).item())
    assert ranks[0][0].restored_notes == ()
    assert "rank 1 is new" in ranks[1][0].restored_notes[0]
    assert drawn[0] != drawn[1]
    on_all(ranks, lambda client: client.close(timeout=0))


def test_parts_leaves_names_and_types(agent_process: AgentProcess) -> None:
    def build(zeros: bool, names: tuple[str, str] = ("a", "b")) -> dict[str, Any]:
        module = torch.nn.ModuleDict({n: torch.nn.Linear(3, 2) for n in names})
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        if not zeros:
            torch.manual_seed(1)
            torch.nn.init.normal_(module[names[0]].weight)
            update(optimizer)
        return {"model": module, "optimizer": optimizer, "note": ["kept"]}

    first = build(zeros=False)
    saved_by(agent_process, 1, lambda rank: first)
    weights = {name: digest(t) for name, t in first["model"].state_dict().items()}

    def restored(objects: dict[str, Any], **options: Any) -> dict[str, bytes]:
        ((client, _),) = plain_job(agent_process, 1, lambda rank: objects)
        try:
            client.restore(**options)
        finally:
            client.close(timeout=0)
        return {name: digest(t) for name, t in objects["model"].state_dict().items()}

    live = build(zeros=True)
    before = {name: digest(t) for name, t in live["model"].state_dict().items()}
    found = restored(live, only=["model/a.*"])
    assert found == {n: (weights if n.startswith("a.") else before)[n] for n in weights}
    assert not live["optimizer"].state
    found = restored(live, exclude=["optimizer", "rng"])
    assert found == weights
    assert not live["optimizer"].state
    with pytest.raises(Refused, match=r"nothing in the snapshot is called 'model/c\.\*'"):
        restored(live, exclude=["model/c.*"])
    with pytest.raises(Refused, match="leaf by leaf"):
        restored(live, only=["optimizer/state/model.a.*"])

    other = build(zeros=True, names=("first", "b"))
    with pytest.raises(StateMismatch):
        restored(other)
    with pytest.raises(Refused, match=r"several leaves the name model/b\.bias, model/b\.weight"):
        restored(other, rename={"model/a.": "model/b."})
    found = restored(other, rename={"model/a.": "model/first."})
    assert found["first.weight"] == weights["a.weight"]
    moment = other["optimizer"].state[other["model"]["first"].weight]["exp_avg"]
    saved = first["optimizer"].state[first["model"]["a"].weight]["exp_avg"]
    assert digest(moment) == digest(saved)

    half = build(zeros=True)
    half["model"].bfloat16()
    with pytest.raises(StateMismatch, match="float32"):
        restored(half, only=["model"])
    restored(half, only=["model"], cast=True)
    assert torch.equal(half["model"]["a"].weight, first["model"]["a"].weight.bfloat16())


def test_contradictions_are_listed_and_nothing_is_loaded(agent_process: AgentProcess) -> None:
    """What the ranks say against each other, all of it in one error."""

    def build(rank: int, world: int) -> dict[str, Any]:
        return {"tree": {"over": torch.ones(6), "form": torch.ones(4 + rank), "gap": torch.ones(3)}}

    def placed(name: str, tensor: torch.Tensor, rank: int) -> list[everstep.Extent]:
        at = {"tree/over": 4 * rank, "tree/form": 0, "tree/gap": 5 * rank}[name]
        shape = {"tree/over": 10, "tree/form": 4 + rank, "tree/gap": 8}[name]
        return [everstep.Extent(name, (shape,), (at,))]

    ranks = []
    for rank in range(2):
        client = everstep.connect(job="job", rank=rank, world=2, agent=agent_process.address)
        objects = build(rank, 2)
        client.attach(**objects, placement={"tree": partial(placed, rank=rank)})
        ranks.append((client, objects))
    handles = on_all(ranks, lambda client: client.snapshot(1, force=True))
    assert all(handle.wait() for handle in handles)
    on_all(ranks, lambda client: client.close(timeout=0))
    live = {"tree": {"over": torch.zeros(10), "form": torch.zeros(4), "gap": torch.zeros(8)}}
    ((client, _),) = plain_job(agent_process, 1, lambda rank: live)
    with pytest.raises(StateMismatch) as raised:
        client.restore()
    problems = " ".join(raised.value.contradictory)
    assert "tree/over: blocks [0:6] and [4:10] overlap" in problems
    assert "tree/form: ranks have it as float32[4] and float32[5]" in problems
    assert "tree/gap" in problems
    assert not any(tensor.any() for tensor in live["tree"].values())
    client.close(timeout=0)


def test_names_that_are_given_twice_are_all_listed(agent_process: AgentProcess) -> None:
    tree = {name: torch.ones(2) for name in "abcd"}

    def placed(name: str, tensor: torch.Tensor) -> list[everstep.Extent]:
        return [everstep.Extent(f"tree/{'x' if name < 'tree/c' else 'y'}", (2,), (0,))]

    client = everstep.connect(job="job", rank=0, world=1, agent=agent_process.address)
    client.attach(tree=tree, placement={"tree": placed})
    with pytest.raises(Misplaced) as raised:
        client.snapshot(1, force=True)
    assert raised.value.problems == (
        "tree/x: 2 tensors are called that",
        "tree/y: 2 tensors are called that",
    )
    client.close(timeout=0)


FLAT = (7, 5)


def flat_job(agent: AgentProcess, cuts: list[int], *, zeros: bool) -> list[torch.Tensor]:
    """Each rank has a range of the flattened weight, as ZeRO deals it, and its moments."""
    whole = torch.randn(FLAT, generator=torch.Generator().manual_seed(3)).flatten()
    pieces, ranks = [], []
    for rank, (start, stop) in enumerate(itertools.pairwise([0, *cuts, whole.numel()])):
        module = torch.nn.Module()
        module.register_parameter("w", torch.nn.Parameter(whole[start:stop].clone()))
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        if zeros:
            torch.nn.init.zeros_(module.w)
        else:
            update(optimizer)

        def placed(name: str, _: torch.Tensor, start: int = start) -> list[everstep.FlatExtent]:
            return [everstep.FlatExtent(name, FLAT, start)]

        client = everstep.connect(job="job", rank=rank, world=len(cuts) + 1, agent=agent.address)
        client.attach(model=module, optimizer=optimizer, placement={"model": placed})
        ranks.append((client, None))
        pieces.append((module.w, optimizer))
    if zeros:
        assert set(on_all(ranks, lambda client: client.restore())) == {1}
    else:
        handles = on_all(ranks, lambda client: client.snapshot(1, force=True))
        assert all(handle.wait() for handle in handles), handles
    on_all(ranks, lambda client: client.close(timeout=0))
    moments = [optimizer.state[w]["exp_avg"] for w, optimizer in pieces]
    return [torch.cat([w.detach() for w, _ in pieces]), torch.cat(moments)]


@pytest.mark.parametrize("cuts", [[], [12], [3, 4, 30]], ids=str)
def test_flat_partitions_are_cut_anywhere(agent_process: AgentProcess, cuts: list[int]) -> None:
    saved = flat_job(agent_process, [9, 23], zeros=False)
    restored = flat_job(agent_process, cuts, zeros=True)
    assert [digest(tensor) for tensor in restored] == [digest(tensor) for tensor in saved]


def test_ranks_have_states_of_unlike_size(agent_process: AgentProcess) -> None:
    """Restored by as many ranks as before; with others, a rule does not make them alike."""

    def build(rank: int, *, zeros: bool = False) -> dict[str, Any]:
        return {"own": {"bytes": torch.full((1000 * (rank + 1),), 0.0 if zeros else rank + 1.0)}}

    saved_by(agent_process, 2, build)
    ranks = plain_job(agent_process, 2, lambda rank: build(rank, zeros=True))
    on_all(ranks, lambda client: client.restore())
    for rank, (_, objects) in enumerate(ranks):
        assert digest(objects["own"]["bytes"]) == digest(build(rank)["own"]["bytes"])
    on_all(ranks, lambda client: client.close(timeout=0))
    ranks = plain_job(agent_process, 3, lambda rank: build(rank, zeros=True))
    for client, objects in ranks:
        with pytest.raises(StateMismatch):
            client.restore(on_resize={"own": "keep"} if client.launch.rank == 2 else {})
        assert not objects["own"]["bytes"].any()
    on_all(ranks, lambda client: client.close(timeout=0))
