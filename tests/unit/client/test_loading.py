"""From a saved description back into live objects."""

import copy
from typing import Any

import pytest
import torch
from torch import nn, optim

from everstep.client import scaling
from everstep.client.attachment import attachment, collect
from everstep.client.checking import check
from everstep.client.loading import Loading, _merge
from everstep.client.saved import Form, Saved
from everstep.client.terms import Terms
from everstep.proto.errors import StateMismatch
from everstep.proto.state_pb2 import Record, Value
from everstep.snapshot.capture_plan import dtype_name, value_bytes
from everstep.snapshot.layout import LeafSpec, pack

Objects = dict[str, Any]


def attached(objects: Objects) -> Any:
    return {n: attachment(n, thing, per_rank=False, guarded=False) for n, thing in objects.items()}


class Snapshot:
    """What a snapshot of these objects says, and its bytes."""

    def __init__(self, **objects: Any) -> None:
        parts = attached(objects)
        collected = collect(parts)
        self.tensors = {name: tensor.clone() for name, tensor in collected.tensors}
        specs = [
            LeafSpec(name, dtype_name(t.dtype), tuple(t.shape), 0, t.nbytes)
            for name, t in collected.tensors
        ]
        layout = pack(
            [part.part for part in parts.values()], specs, collected.aliases, collected.containers
        )
        record = Record(values=[Value(path=path, json=json) for path, json in collected.values])
        self.saved = Saved.of({0: layout}, {0: record}, 0)

    def plan(self, objects: Objects, **options: bool) -> Loading:
        return check(attached(objects), self.saved, Terms(**options), 0, 1)

    def load(self, objects: Objects, **options: bool) -> None:
        """As the client does, but for the reading."""
        plan = self.plan(objects, **options)
        for wanted in plan.prepare():
            name = self.saved.origin(wanted.name)
            wanted.tensor.copy_(self.tensors[name])
        plan.finish()


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def test_forms() -> None:
    form = Form("bfloat16", (2, 3))
    assert str(form) == "bfloat16[2, 3]"
    assert form.empty().dtype is torch.bfloat16
    assert form.fits(torch.ones(2, 3, dtype=torch.bfloat16))
    assert not form.fits(torch.ones(2, 3))
    assert not form.fits(torch.ones(3, 2, dtype=torch.bfloat16))


def test_parts_do_not_mix_by_prefix() -> None:
    """ "a" is no part of "ab"."""
    one, two = {"x": torch.ones(2)}, {"x": torch.zeros(3), "n": 1}
    snapshot = Snapshot(a=one, ab=two)
    assert set(snapshot.saved.forms_of("a")) == {"a/x"}
    live: Objects = {"a": {"x": torch.zeros(2)}, "ab": {"x": torch.ones(3), "n": 0}}
    snapshot.load(live)
    assert live["a"]["x"].tolist() == [1, 1]
    assert live["ab"] == {"x": live["ab"]["x"], "n": 1}


MERGES: list[tuple[Any, Any]] = [
    ({"a": 1, "gone": 2}, {"a": 3}),
    ({"a": 1}, {"a": {"b": 1}}),
    ({"a": {"b": 1}}, {"a": 1}),
    ({"a": [1, 2, 3]}, {"a": [4]}),
    ({"a": [1]}, {"a": [1, [2], {"c": 3}]}),
    ([1, 2, 3], []),
    ([], [{"a": None}]),
    ({}, {"none": None, "false": False, "zero": 0}),
    ({"a": (1, 2)}, {"a": (1, 3)}),
    ({"a": 1}, {"a": True}),
]


@pytest.mark.parametrize(("live", "saved"), MERGES)
def test_merging(live: Any, saved: Any) -> None:
    merged = copy.deepcopy(live)
    _merge(merged, copy.deepcopy(saved))
    assert repr(merged) == repr(saved)


def test_merging_keeps_containers_that_match() -> None:
    inner, items = {"x": 1}, [1]
    live: Objects = {"inner": inner, "items": items}
    _merge(live, {"inner": {"x": 2, "y": 3}, "items": [4, 5]})
    assert live["inner"] is inner
    assert live["items"] is items
    assert live == {"inner": {"x": 2, "y": 3}, "items": [4, 5]}


def test_two_names_that_were_two_tensors_become_two_again() -> None:
    snapshot = Snapshot(tree={"a": torch.zeros(3), "b": torch.ones(3)})
    shared = torch.full((3,), 7.0)
    live: Objects = {"a": shared, "b": shared}
    snapshot.load({"tree": live})
    assert live["a"] is shared
    assert (live["a"].tolist(), live["b"].tolist()) == ([0, 0, 0], [1, 1, 1])


def test_module_that_was_tied_then_or_is_tied_now() -> None:
    def make(tied: bool) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if tied:
            model[1].weight = model[0].weight
        return model

    model = make(tied=False)
    Snapshot(model=make(tied=True)).load({"model": model})
    assert torch.equal(model[0].weight, model[1].weight)
    with pytest.raises(StateMismatch, match=r"model/1\.weight.*model/0\.weight"):
        Snapshot(model=make(tied=False)).plan({"model": make(tied=True)})


def used_scaler(scale: float = 1024.0, tracker: int = 7) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=99)
    scaler.scale(torch.ones(1))
    assert scaler._growth_tracker is not None
    scaler._growth_tracker.fill_(tracker)
    return scaler


@pytest.mark.parametrize("where", ["unused", "host", "device"])
@pytest.mark.parametrize("used", [False, True])
def test_gradient_scaler(where: str, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured before or after its first use, as numbers or tensors, and loaded the same."""
    saved = used_scaler()
    if where == "unused":
        saved = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=99)
        saved._init_growth_tracker = 7
    with monkeypatch.context() as patch:
        patch.setattr(scaling, "on_device", lambda _: where == "device")
        snapshot = Snapshot(scaler=saved)
    assert (set(snapshot.tensors) == {"scaler/scale", "scaler/_growth_tracker"}) == (
        where == "device"
    )
    live = used_scaler(2.0, 1) if used else torch.amp.GradScaler("cpu", init_scale=2.0)
    kept = live._scale
    snapshot.load({"scaler": live})
    assert live.state_dict() == saved.state_dict() == {
        "scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 99,
        "_growth_tracker": 7,
    }  # fmt: skip
    assert live._scale is kept
    assert isinstance(live._init_scale, float)


def test_gradient_scaler_that_is_disabled() -> None:
    live = torch.amp.GradScaler("cpu", enabled=False)
    Snapshot(scaler=torch.amp.GradScaler("cpu", enabled=False)).load({"scaler": live})
    assert live.state_dict() == {}


def test_moments_are_made_where_their_parameters_are() -> None:
    """Else load_state_dict would copy them there, unfilled as they are."""
    model = nn.Linear(3, 3)
    optimizer = optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    snapshot = Snapshot(model=model, optimizer=optimizer, tree={"x": torch.ones(1)})
    elsewhere = nn.Linear(3, 3).to("meta")
    fresh = optim.Adam(elsewhere.parameters())
    plan = check(
        attached({"optimizer": fresh, "model": elsewhere, "tree": {"x": torch.ones(1)}}),
        snapshot.saved,
        Terms(),
        0,
        1,
    )
    found = {need.name: need.device.type if need.device else "cpu" for need in plan.needs}
    state = "optimizer/state/model"
    assert {name: found[name] for name in found if name.startswith(f"{state}.bias")} == {
        f"{state}.bias/exp_avg": "meta",
        f"{state}.bias/exp_avg_sq": "meta",
        f"{state}.bias/step": "cpu",
    }
    assert (found["model/weight"], found["tree/x"]) == ("meta", "cpu")


def test_checking_touches_nothing() -> None:
    def make() -> Objects:
        model = nn.Linear(3, 3)
        optimizer = optim.SGD(model.parameters(), momentum=0.9)
        for parameter in model.parameters():
            optimizer.state[parameter] = {"momentum_buffer": torch.randn_like(parameter)}
        return {"model": model, "optimizer": optimizer, "tree": {"x": torch.randn(3)}}

    def looked(objects: Objects) -> list[object]:
        collected = collect(attached(objects))
        tensors = [(name, value_bytes(t).tolist()) for name, t in collected.tensors]
        return [tensors, collected.values]

    live = make()
    before = looked(live)
    Snapshot(**make()).plan(live)
    assert looked(live) == before


def test_state_keeps_the_dtype_it_was_saved_with() -> None:
    """load_state_dict casts to the parameter's dtype; and the live state may be of any."""

    def make() -> Objects:
        model = nn.Linear(3, 3).bfloat16()
        optimizer = optim.SGD(model.parameters(), momentum=0.9)
        for parameter in model.parameters():
            optimizer.state[parameter] = {"momentum_buffer": torch.randn(parameter.shape)}
        return {"model": model, "optimizer": optimizer}

    saved = make()
    snapshot = Snapshot(**saved)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        live = make()
        state = live["optimizer"].state[live["model"].weight]
        state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
        snapshot.load(live)
        restored = live["optimizer"].state[live["model"].weight]["momentum_buffer"]
        original = saved["optimizer"].state[saved["model"].weight]["momentum_buffer"]
        assert restored.dtype is torch.float32
        assert value_bytes(restored).tolist() == value_bytes(original).tolist()


def test_state_of_an_unknown_parameter_is_unexpected() -> None:
    model = nn.Linear(3, 3)
    optimizer = optim.SGD(model.parameters(), momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": torch.ones_like(parameter)}
    snapshot = Snapshot(model=model, optimizer=optimizer)
    with pytest.raises(StateMismatch) as raised:
        snapshot.plan({"model": model, "optimizer": optim.SGD([model.weight], momentum=0.9)})
    assert "optimizer/state/model.bias/momentum_buffer" in raised.value.unexpected


def test_the_state_goes_to_its_parameter_by_name() -> None:
    """Not by position: modules attached under the same names may list them otherwise."""

    class Reordered(nn.Module):
        def __init__(self, order: str) -> None:
            super().__init__()
            for name in order:
                setattr(self, name, nn.Parameter(torch.randn(3)))

    def make(order: str) -> Objects:
        model = Reordered(order)
        parameters = [model.a, model.b]
        optimizer = optim.SGD(parameters, momentum=0.9)
        for parameter in parameters:
            optimizer.state[parameter] = {"momentum_buffer": torch.randn(3)}
        return {"model": model, "optimizer": optimizer}

    saved, live = make("ab"), make("ba")
    Snapshot(**saved).load(live)
    for name in "ab":
        one, other = getattr(saved["model"], name), getattr(live["model"], name)
        assert torch.equal(one, other)
        moments = [
            objects["optimizer"].state[parameter]["momentum_buffer"]
            for objects, parameter in ((saved, one), (live, other))
        ]
        assert torch.equal(*moments)


def test_loaded_state_shares_no_memory_with_what_was_read() -> None:
    snapshot = Snapshot(tree={"new": torch.ones(3)})
    live: Objects = {}
    snapshot.load({"tree": live})
    live["new"].zero_()
    assert snapshot.tensors["tree/new"].tolist() == [1, 1, 1]
