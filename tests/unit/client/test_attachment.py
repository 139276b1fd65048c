"""From live objects to named leaves and values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from everstep.client import scaling
from everstep.client.attachment import (
    INLINE_BYTES,
    Attachment,
    Collected,
    attachment,
    collect,
    decode_torch_value,
    dtype_named,
    encode_torch_value,
    grouping,
    optimizer_tree,
    parameter_names,
    parameters_by_index,
    place,
    unwrapped,
)
from everstep.proto.errors import NotCapturable, Refused
from everstep.snapshot import values
from everstep.snapshot.capture_plan import value_bytes


class Stateful:
    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class HalfStateful:
    def state_dict(self) -> Any:
        return {}


def attached(guarded: tuple[str, ...] = (), per_rank: tuple[str, ...] = (), **objects: Any) -> Any:
    return {
        name: attachment(name, thing, per_rank=name in per_rank, guarded=name in guarded)
        for name, thing in objects.items()
    }


def names(collected: Collected) -> list[str]:
    return [name for name, _ in collected.tensors]


def test_kinds() -> None:
    model = nn.Linear(2, 2)
    objects = {
        "module": model,
        "optimizer": optim.SGD(model.parameters()),
        "stateful": Stateful(),
        "tree": {},
    }
    for kind, thing in objects.items():
        found: Attachment = attachment("x", thing, per_rank=True, guarded=False)
        assert found.part.kind == kind
        assert found.part.per_rank
    assert attachment("x", [], per_rank=False, guarded=False).part.kind == "tree"
    class_name = attachment("x", model, per_rank=False, guarded=False).part.class_name
    assert class_name == "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize("thing", [object(), 3, None, torch.ones(2), HalfStateful(), (1, 2)])
def test_what_has_no_state(thing: Any) -> None:
    with pytest.raises(NotCapturable, match="state_dict/load_state_dict"):
        attachment("x", thing, per_rank=False, guarded=False)


@pytest.mark.parametrize("name", ["rng", "a.b", "a/b", "", "1"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(Refused, match="identifier"):
        attachment(name, {}, per_rank=False, guarded=False)


def test_wrappers_leave_no_trace() -> None:
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(compiled) is model
    plain = {"a": 1}
    assert unwrapped(plain) is plain


VALUES: dict[str, Any] = {
    "size": torch.Size([2, 3]),
    "dtype": torch.float8_e4m3fn,
    "device": torch.device("cpu"),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3, dtype=torch.int16),
    "bool": torch.tensor([True, False]),
    "strided": torch.arange(6.0).reshape(2, 3).t(),
    "conjugated": torch.tensor([1 + 2j]).conj(),
}


@pytest.mark.parametrize("name", VALUES)
def test_torch_values(name: str) -> None:
    value = VALUES[name]
    text = values.encode([value], "x", hook=encode_torch_value)
    (again,) = values.decode(text, hook=decode_torch_value)
    assert type(again) is type(value)
    if isinstance(value, torch.Tensor):
        assert (again.dtype, again.shape) == (value.dtype, value.shape)
        assert value_bytes(again).tolist() == value_bytes(value).tolist()
        again.fill_(0)  # its own memory, to be written to
    else:
        assert again == value


def test_values_that_are_not_torchs_own() -> None:
    assert encode_torch_value(object()) is NotImplemented
    assert decode_torch_value("torch.Other", []) is NotImplemented
    with pytest.raises(ValueError, match="no dtype"):
        dtype_named("nn")


def test_parameters_are_filed_under_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    loose = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD(
        [{"params": [model[1].weight, loose]}, {"params": [model[0].weight, model[0].bias]}],
        momentum=0.9,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    by_id = parameter_names(attached(model=model))
    assert [name for name, _ in parameters_by_index(optimizer, by_id)] == [
        "model.1.weight",
        "group0.1",
        "model.0.weight",
        "model.0.bias",
    ]
    tree = optimizer_tree(optimizer, by_id)
    assert list(tree["state"]) == ["model.1.weight", "group0.1", "model.0.weight", "model.0.bias"]
    for parameter, name in ((model[1].weight, "model.1.weight"), (loose, "group0.1")):
        moment = optimizer.state[parameter]["momentum_buffer"]
        assert tree["state"][name]["momentum_buffer"] is moment
    assert tree["param_groups"][0]["params"].startswith("2:")


def test_grouping_tells_which_parameters_and_in_which_order() -> None:
    model = nn.Linear(2, 2)
    by_id = parameter_names(attached(model=model))
    weight, bias = model.weight, model.bias
    seen = {
        tuple(grouping(optim.SGD(groups), by_id))
        for groups in (
            [weight, bias],
            [bias, weight],
            [weight],
            [{"params": [weight]}, {"params": [bias]}],
        )
    }
    assert len(seen) == 4
    again = grouping(optim.SGD([weight, bias]), by_id)
    assert again == grouping(optim.Adam([weight, bias]), by_id)


def test_the_first_module_names_a_shared_parameter() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    by_id = parameter_names(attached(first=first, second=second))
    assert by_id[id(first.weight)] == "first.weight"


def test_one_tensor_under_several_names_is_one_leaf() -> None:
    model = nn.Linear(4, 4, bias=False)
    flat = torch.ones(8)
    collected = collect(
        attached(
            model=model,
            tree={"again": model.weight, "part": model.weight[1:], "rows": model.weight.t()},
            more=[flat, flat, flat.view(2, 4), flat[:4]],
            empty=[torch.empty(0), torch.empty(0)],
        )
    )
    assert collected.aliases == {"tree/again": "model/weight", "more/~i1": "more/~i0"}
    assert set(names(collected)) == {
        "model/weight", "tree/part", "tree/rows", "more/~i0", "more/~i2", "more/~i3",
        "empty/~i0", "empty/~i1",
    }  # fmt: skip


def test_place_is_that_of_the_whole_tensor() -> None:
    tensor = torch.ones(4, 4)
    assert place(tensor) == place(tensor.detach())
    others = [tensor.t(), tensor[:2], tensor.view(16), tensor.view(torch.int32), torch.ones(4, 4)]
    assert len({place(other) for other in [tensor, *others]}) == 6


def test_guarded_are_the_optimizers_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = optim.Adam(model[0].parameters())
    for parameter in model[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.param_groups[0]["note"] = torch.ones(3)  # a scheduler may write to it
    collected = collect(
        attached(model=model, optimizer=optimizer, average={"w": torch.ones(4)},
                 mine={"w": torch.ones(4)}, guarded=("mine",))
    )  # fmt: skip
    moments = {
        f"optimizer/state/model.0.{parameter}/{moment}"
        for parameter in ("weight", "bias")
        for moment in ("exp_avg", "exp_avg_sq", "step")
    }
    assert collected.guarded == {"model/0.weight", "model/0.bias", "mine/w", *moments}


def test_more_memory_than_the_optimizers_is_not_guarded() -> None:
    flat = torch.ones(10)
    optimizer = optim.SGD([nn.Parameter(flat[:4])])
    collected = collect(
        attached(optimizer=optimizer, tree={"all": flat, "some": flat[:4], "few": flat[:2]})
    )
    assert collected.guarded == {"tree/some", "tree/few"}


def test_replicated_is_what_ddp_keeps_equal() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = optim.SGD(model.parameters(), momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    own = {"w": torch.ones(3)}
    parts = attached(model=model, optimizer=optimizer, own=own, per_rank=("own",))
    assert collect(parts).groups == {}
    groups = collect(parts, frozenset({"model"})).groups
    parameters = [name for name, _ in model.named_parameters()]
    assert set(groups.values()) == {()}
    assert set(groups) == {
        *(f"model/{name}" for name in parameters),
        *(f"optimizer/state/model.{name}/momentum_buffer" for name in parameters),
    }
    per_rank = attached(model=model, optimizer=optimizer, per_rank=("model", "optimizer"))
    assert collect(per_rank, frozenset({"model"})).groups == {}


def test_small_tensors_of_stateful_objects_are_values() -> None:
    limit = INLINE_BYTES // 4
    state = {"small": torch.ones(limit), "large": torch.ones(limit + 1)}
    copies = {name: tensor.clone() for name, tensor in state.items()}
    collected = collect(attached(s=Stateful(state), t=copies))
    assert names(collected) == ["s/large", "t/small", "t/large"]
    assert [path for path, _ in collected.values] == ["s/small"]


class Watch(TorchDispatchMode):
    """Fails when anything but `detach` is done with these tensors, as if they were on a device."""

    def __init__(self, *watched: torch.Tensor) -> None:
        super().__init__()
        self.places = {tensor.untyped_storage().data_ptr() for tensor in watched}

    def knows(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.places

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is not torch.ops.aten.detach.default:
            for thing in pytree.tree_leaves((args, kwargs)):
                if isinstance(thing, torch.Tensor):
                    assert not self.knows(thing), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_collecting_never_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = optim.Adam(model.parameters(), lr=torch.tensor(0.1), foreach=False)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    own = {"small": torch.ones(3), "list": [torch.ones(1), 2]}
    assert scaler._scale is not None
    assert scaler._growth_tracker is not None
    watch = Watch(
        *model.state_dict().values(),
        *(value for state in optimizer.state.values() for value in state.values()),
        optimizer.param_groups[0]["lr"], *scheduler.get_last_lr(), *scheduler.base_lrs,
        scaler._scale, scaler._growth_tracker, own["small"], own["list"][0],
    )  # fmt: skip
    parts = attached(
        model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, own=Stateful(own),
        tree=own, average=own, guarded=("average",),
    )  # fmt: skip
    with watch:
        with pytest.raises(AssertionError, match="waits for the device"):
            collect(parts)  # as on the CPU, where values are there to be looked at
        monkeypatch.setattr(scaling, "on_device", watch.knows)
        collected = collect(parts, frozenset({"model"}))
    leaves = {*names(collected), *collected.aliases}
    assert leaves > {"scaler/scale", "scaler/_growth_tracker", "own/small", "own/list/~i0"}
    assert leaves > {"scheduler/_last_lr/~i0", "scheduler/base_lrs/~i0"}
    assert not leaves & {path for path, _ in collected.values}


def test_a_set_has_no_names_for_tensors_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = attached(x={"a": {torch.ones(2)}})
    assert [path for path, _ in collect(parts).values] == ["x"]
    monkeypatch.setattr(scaling, "on_device", lambda _: True)
    with pytest.raises(NotCapturable, match="no dict, list or tuple"):
        collect(parts)


UNSTORABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "deep": (lambda: {"a": [1, {"b": (2, object())}]}, "x/a/1/b/1"),
    "beside a tensor": (lambda: {"a": object(), "b": torch.ones(1)}, "x/a"),
    "key": (lambda: {"a": {(1, 2): torch.ones(1)}}, "x/a"),
    "sparse": (lambda: [torch.eye(2).to_sparse()], "x/~i0"),
    "inline": (lambda: Stateful({"a": [torch.eye(2).to_sparse()]}), "x/a/0"),
    "set": (lambda: {"a": {object()}}, "x/a"),
}


@pytest.mark.parametrize("name", UNSTORABLE)
def test_what_cannot_be_stored_is_named_exactly(name: str) -> None:
    make, path = UNSTORABLE[name]
    with pytest.raises(NotCapturable) as raised:
        collect(attached(x=make()))
    assert raised.value.path == path


def test_frozen_parameters_are_guarded_where_that_is_wanted() -> None:
    base = nn.Linear(64, 64)
    base.requires_grad_(False)
    parts = attached(model=nn.Sequential(base, nn.Linear(64, 64)))
    assert collect(parts).guarded == set()
    assert collect(parts, frozen_guarded=True).guarded == {"model/0.weight", "model/0.bias"}
