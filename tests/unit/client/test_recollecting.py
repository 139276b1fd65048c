"""Collecting again gives what collecting anew gives, whatever has changed in between."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import nn, optim

from everstep.client.attachment import Attachment, Collected, attachment, collect, place
from everstep.client.recollecting import Recollecting
from everstep.proto.errors import NotCapturable


class Stateful:
    def __init__(self, state: Any) -> None:
        self.state = state
        self.asked = 0
        self.other: Any = None

    def state_dict(self) -> Any:
        self.asked += 1
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class OwnState(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"mine": self.weight.detach(), "number": 3}


class Extra(nn.Linear):
    number = 1

    def get_extra_state(self) -> Any:
        return self.number

    def set_extra_state(self, state: Any) -> None:
        self.number = state


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4, bias=False)
        self.register_buffer("kept", torch.ones(4, 4))
        self.register_buffer("temporary", torch.ones(4), persistent=False)
        self.register_parameter("none", None)


class Training:
    """What is attached, and ways to change it."""

    def __init__(self, kind: Callable[..., optim.Optimizer] = optim.AdamW) -> None:
        self.model = nn.Sequential(Block(), nn.ModuleDict({"a/b": Block()}), nn.Linear(4, 4))
        self.optimizer = kind(self.model.parameters(), lr=0.125)
        self.model.append(nn.Linear(4, 4))  # the optimizer does not know it
        self.loose = nn.Parameter(torch.ones(3))
        self.optimizer.add_param_group({"params": [self.loose], "names": ["loose"]})
        self.scheduler = optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.step()
        self.stateful = Stateful({"n": 1, "small": torch.ones(2)})
        self.tree: dict[str, Any] = {"average": torch.ones(4, 4), "n": 1}
        self.parts: dict[str, Attachment] = {}
        self.attach(
            model=self.model, optimizer=self.optimizer, scheduler=self.scheduler,
            stateful=self.stateful, tree=self.tree,
        )  # fmt: skip

    def attach(self, **objects: Any) -> None:
        for name, thing in objects.items():
            self.parts[name] = attachment(name, thing, per_rank=False, guarded=False)

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    @property
    def block(self) -> Any:
        return self.model[0]

    @property
    def entry(self) -> Any:
        return next(iter(self.optimizer.state.values()), {})

    @property
    def group(self) -> Any:
        return self.optimizer.param_groups[0]


def described(collected: Collected) -> object:
    """All of it, and the order; tensors by place and class."""
    return (
        [(name, place(tensor), type(tensor)) for name, tensor in collected.tensors],
        collected.values,
        list(collected.containers.items()),
        list(collected.aliases.items()),
        collected.guarded,
        collected.groups,
        collected.blocks,
    )


def outline(collected: Collected) -> object:
    """What must not have changed if the form has not."""
    return described(replace(collected, values=[]))


Change = Callable[[Training], Any]


def replace_data(training: Training) -> None:
    training.block.first.weight.data = torch.ones(4, 4)


def transpose_data(training: Training) -> None:
    training.block.second.weight.data = training.block.second.weight.data.t()


def reinterpret(training: Training) -> None:
    training.block.kept.data = training.block.kept.data.view(torch.int32)


def shrink(training: Training) -> None:
    training.block.kept.resize_(2, 2)


def swap(training: Training) -> None:
    block = training.block
    block.first.weight, block.second.weight = block.second.weight, block.first.weight


def swap_contents(training: Training) -> None:
    norm = training.block.norm
    swap_tensors: Any = torch.utils.swap_tensors
    swap_tensors(norm.running_mean, norm.running_var)


def reorder(training: Training) -> None:
    held = training.block._parameters
    held["none"] = held.pop("none", None)
    held = training.block.first._parameters
    held["weight"] = held.pop("weight")


def rename(training: Training) -> None:
    held = training.block._modules
    name = "first" if "first" in held else "renamed"
    held["renamed" if name == "first" else "first"] = held.pop(name)
    if name == "first":
        training.block.__dict__["first"] = held["renamed"]
    else:
        training.block.__dict__.pop("first", None)


def reload_optimizer(training: Training) -> None:
    training.optimizer.load_state_dict(training.optimizer.state_dict())


def set_option(key: str, *choices: Any) -> Change:
    def change(training: Training) -> None:
        now = training.group.get(key)
        index = next((i for i, choice in enumerate(choices) if choice is now), -1)
        training.group[key] = choices[(index + 1) % len(choices)]

    return change


def patch_method(training: Training) -> None:
    linear = training.model[2]
    if "_save_to_state_dict" in vars(linear):
        del linear._save_to_state_dict
    else:
        own = torch.ones(1)
        vars(linear)["_save_to_state_dict"] = lambda state, *_: state.update(own=own)


def change_class(training: Training) -> None:
    linear = training.model[2]
    linear.__class__ = Extra if type(linear) is nn.Linear else nn.Linear


def toggle_hook(training: Training) -> None:
    hooks = training.block._state_dict_hooks
    if hooks:
        hooks.clear()
    else:

        def hook(module: nn.Module, state: Any, prefix: str, _: Any) -> None:
            state.pop(prefix + "kept", None)

        training.block.register_state_dict_post_hook(hook)


def toggle_pre_hook(training: Training) -> None:
    hooks = training.optimizer._optimizer_state_dict_pre_hooks
    if hooks:
        hooks.clear()
    else:
        training.optimizer.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(x=1))


def toggle_post_hook(training: Training) -> None:
    hooks = training.optimizer._optimizer_state_dict_post_hooks
    if hooks:
        hooks.clear()
    else:
        training.optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 5})


def replace_vars(training: Training) -> None:
    block = training.block
    block.__dict__ = {**vars(block), "_buffers": {"kept": torch.zeros(4, 4)}}


class Subclass(torch.Tensor):
    pass


def change_tensor_class(training: Training) -> None:
    kept = training.block.kept
    kept.__class__ = Subclass if type(kept) is torch.Tensor else torch.Tensor


def make_sparse(training: Training) -> None:
    swap_tensors: Any = torch.utils.swap_tensors
    swap_tensors(training.block.kept, torch.eye(4).to_sparse())


def make_empty(training: Training) -> None:
    """On a device without memory, the second time: the address is 0 on all."""
    swap_tensors: Any = torch.utils.swap_tensors
    device = "cpu" if training.block.kept.numel() else "meta"
    swap_tensors(training.block.kept, torch.empty(0, device=device))


def rename_state(training: Training) -> None:
    if training.entry:
        key, value = training.entry.popitem()
        training.entry[f"{key}-"] = value


def move_member(training: Training) -> None:
    training.optimizer.param_groups[1]["params"].insert(0, training.group["params"].pop())


def change_deep_down(training: Training) -> None:
    training.entry.setdefault("deep", {})["x"] = torch.ones(1)


def patch_optimizer(training: Training) -> None:
    own = vars(training.optimizer)
    if "state_dict" in own:
        del own["state_dict"]
    else:
        own["state_dict"] = lambda: {"state": {}, "param_groups": [{}] * len(own["param_groups"])}


def toggle_kept(training: Training) -> None:
    training.block._non_persistent_buffers_set ^= {"kept"}


CHANGES: dict[str, Change] = {
    "nothing": lambda t: None,
    "step": Training.step,
    "scheduler": lambda t: t.scheduler.step(),
    "data": replace_data,
    "transposed": transpose_data,
    "reinterpreted": reinterpret,
    "resized": shrink,
    "narrowed": lambda t: setattr(t.block.kept, "data", t.block.kept.data[:-1]),
    "swapped": swap,
    "contents swapped": swap_contents,
    "reordered": reorder,
    "renamed": rename,
    "new parameter": lambda t: t.block.register_parameter("more", nn.Parameter(torch.ones(2))),
    "parameter gone": lambda t: t.block._parameters.pop("more", None),
    "parameter none": lambda t: t.block._parameters.update(more=None),
    "new buffer": lambda t: t.block.register_buffer("buffer", torch.zeros(2)),
    "buffer assigned": lambda t: setattr(t.block, "kept", torch.zeros(4, 4)),
    "temporary assigned": lambda t: setattr(t.block, "temporary", torch.zeros(4)),
    "buffer kept or not": toggle_kept,
    "tied": lambda t: setattr(t.model[2], "weight", t.block.second.weight),
    "untied": lambda t: setattr(t.model[2], "weight", nn.Parameter(torch.ones(4, 4))),
    "in place": lambda t: t.block.kept.add_(1),
    "module replaced": lambda t: setattr(t.block, "norm", nn.BatchNorm1d(4)),
    "module without state": lambda t: setattr(t.block, "norm", nn.Identity()),
    "module with own state": lambda t: t.model.__setitem__(2, OwnState(4, 4)),
    "module with extra state": lambda t: t.model.__setitem__(2, Extra(4, 4)),
    "extra state": lambda t: setattr(t.model[2], "number", 7),
    "plain module": lambda t: t.model.__setitem__(2, nn.Linear(4, 4)),
    "module shared": lambda t: t.model.__setitem__(2, t.block.second),
    "class": change_class,
    "method": patch_method,
    "hook": toggle_hook,
    "pre-hook": toggle_pre_hook,
    "post-hook": toggle_post_hook,
    "vars": replace_vars,
    "dict replaced": lambda t: vars(t.block).update(_buffers={"kept": torch.zeros(4, 4)}),
    "tensor class": change_tensor_class,
    "sparse": make_sparse,
    "empty": make_empty,
    "dict": lambda t: vars(t.block).update(_buffers=dict(t.block._buffers)),
    "requires_grad": lambda t: t.model[3].requires_grad_(not t.model[3].weight.requires_grad),
    "group": lambda t: t.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    "group gone": lambda t: len(t.optimizer.param_groups) > 2 and t.optimizer.param_groups.pop(),
    "group reversed": lambda t: t.group["params"].reverse(),
    "member replaced": lambda t: t.group["params"].__setitem__(0, nn.Parameter(torch.ones(1))),
    "list option": lambda t: t.optimizer.param_groups[1]["names"].append("another"),
    "reloaded": reload_optimizer,
    "state emptied": lambda t: t.optimizer.state.clear(),
    "state added": lambda t: t.entry.update(more=torch.ones(2)),
    "state gone": lambda t: t.entry.pop("more", None),
    "state replaced": lambda t: t.entry.update(exp_avg=torch.ones(4, 4)),
    "member moved": move_member,
    "state deep down": change_deep_down,
    "state not deep": lambda t: t.entry.pop("deep", None),
    "state renamed": rename_state,
    "state by another method": patch_optimizer,
    "state moved": lambda t: t.entry.get("exp_avg", torch.ones(1)).data.copy_(torch.ones(1)),
    "state scalar": lambda t: t.entry.update(number=t.entry.get("number", 0) + 1),
    "state scalar becomes a tensor": lambda t: t.entry.update(number=torch.ones(1)),
    "state scalar again": lambda t: t.entry.update(number=1),
    "state nested": lambda t: t.entry.update(nested=[torch.ones(1)]),
    "state not nested": lambda t: t.entry.pop("nested", None),
    "state called params": lambda t: t.entry.update(params={"x": torch.ones(1)}),
    "state not called params": lambda t: t.entry.pop("params", None),
    "lr": lambda t: t.group.update(lr=t.group["lr"] * 0.5),
    "lr tensor": lambda t: t.group.update(lr=torch.tensor(0.5)),
    "lr float": lambda t: t.group.update(lr=0.5),
    "equal options": set_option("weight_decay", 0.0, -0.0, False, 0, float("nan")),
    "tuple option": set_option("betas", (0.5, 0.9), (0.5, torch.tensor(0.9)), (1, 0.9), (True, 0)),
    "option gone": lambda t: t.group.pop("x", None),
    "stateful": lambda t: t.stateful.state.update(n=t.stateful.state["n"] + 1),
    "stateful inline": lambda t: t.stateful.state["small"].add_(1),
    "stateful anew": lambda t: setattr(t.stateful, "state", {"n": 1, "small": torch.ones(3)}),
    "tree": lambda t: t.tree.update(average=torch.ones(4, 4)),
    "tree view": lambda t: t.tree.update(average=t.tree["average"].view(4, 4)),
    "tree alias": lambda t: t.tree.update(weight=t.block.second.weight.detach()),
    "tree value": lambda t: t.tree.update(n=t.tree["n"] + 1),
    "tree order": lambda t: t.tree.update(n=t.tree.pop("n")),
    "attached": lambda t: t.attach(more={"x": torch.ones(1)}),
    "replaced": lambda t: t.attach(tree=OrderedDict(t.tree)),
    "detached": lambda t: t.parts.pop("more", None),
}  # fmt: skip

KINDS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": optim.AdamW,
    "sgd": optim.SGD,
    "momentum": lambda parameters, lr: optim.SGD(parameters, lr=lr, momentum=0.5),
    "rprop": lambda parameters, lr: optim.Rprop(parameters, lr=lr),
}


def outcome(collecting: Callable[..., Collected], training: Training, **terms: Any) -> object:
    """What is collected, or what cannot be."""
    try:
        return described(collecting(training.parts, frozenset({"model"}), **terms))
    except (NotCapturable, KeyError, RuntimeError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_seen(name: str, kind: str) -> None:
    training = Training(KINDS[kind])
    for frozen in (False, True):
        again = Recollecting()
        for _ in range(5):
            expected = outcome(collect, training, frozen_guarded=frozen)
            assert outcome(again.collect, training, frozen_guarded=frozen) == expected
            CHANGES[name](training)


@pytest.mark.parametrize("seed", range(40))
def test_any_changes_are_seen(seed: int) -> None:
    random = Random(seed)
    training = Training(KINDS[random.choice(list(KINDS))])
    again, done = Recollecting(), list[str]()
    found: dict[object, object] = {}
    for _ in range(40):
        frozen = random.random() < 0.1
        expected = outcome(collect, training, frozen_guarded=frozen)
        assert outcome(again.collect, training, frozen_guarded=frozen) == expected, done
        if again._known is not None:
            fresh = outline(collect(training.parts, frozenset({"model"}), frozen_guarded=frozen))
            assert found.setdefault(again._known.collected.form, fresh) == fresh, done
        for name in random.choices(list(CHANGES), k=random.choice([0, 1, 1, 2])):
            done.append(name)
            try:
                CHANGES[name](training)
            except (AttributeError, KeyError, RuntimeError, TypeError):
                continue  # not together with what was done before


SAME = ("nothing", "step", "scheduler", "lr", "in place", "temporary assigned", "stateful",
        "stateful inline", "tree value", "equal options")  # fmt: skip


@pytest.mark.parametrize("kind", ["adam", "momentum", "sgd"])
@pytest.mark.parametrize("name", SAME)
def test_the_form_is_the_same_if_only_values_change(name: str, kind: str) -> None:
    training, again = Training(KINDS[kind]), Recollecting()
    first = again.collect(training.parts)
    for _ in range(4):
        CHANGES[name](training)
        asked = training.stateful.asked
        assert again.collect(training.parts).form is first.form
        assert training.stateful.asked == asked + 1


def test_state_is_asked_for_once_although_the_form_changes() -> None:
    training, again = Training(), Recollecting()
    again.collect(training.parts)
    for change in (replace_data, CHANGES["stateful anew"], CHANGES["attached"]):
        asked = training.stateful.asked
        change(training)
        again.collect(training.parts)
        assert training.stateful.asked == asked + 1


def test_parts_that_are_read_each_time_do_not_keep_others_from_being_known() -> None:
    training, again = Training(), Recollecting()
    training.attach(other=OwnState(4, 4))
    first = again.collect(training.parts)
    assert again.collect(training.parts).form is first.form
    training.parts["other"].target.weight.data = torch.ones(4, 4)
    changed = again.collect(training.parts)
    assert changed.form is not first.form
    assert described(changed) == described(collect(training.parts))


def test_tensors_of_trees_are_the_newest() -> None:
    training, again = Training(), Recollecting()
    first = again.collect(training.parts)
    training.tree["average"] = training.tree["average"].view(4, 4)
    now = again.collect(training.parts)
    assert now.form is first.form
    assert dict(now.tensors)["tree/average"] is training.tree["average"]


def test_nothing_is_remembered_after_a_failure() -> None:
    training, again = Training(), Recollecting()
    first = again.collect(training.parts)
    training.tree["bad"] = object()
    with pytest.raises(NotCapturable, match="tree/bad"):
        again.collect(training.parts)
    del training.tree["bad"]
    assert again.collect(training.parts).form is not first.form


def test_what_is_replicated_is_asked_for_anew() -> None:
    training, again = Training(), Recollecting()
    for ddp in (frozenset[str](), frozenset({"model"}), frozenset[str]()):
        expected = described(collect(training.parts, ddp))
        assert described(again.collect(training.parts, ddp)) == expected


class Swapping(Stateful):
    """Exchanges the weights of another object whenever it is asked for its state."""

    def state_dict(self) -> Any:
        weight = self.state
        weight.data, self.other = self.other, weight.data
        return {}


def test_what_changes_while_it_is_collected_is_not_remembered() -> None:
    model, again = nn.Linear(4, 4), Recollecting()
    swapping = Swapping(model.weight)
    swapping.other = torch.ones(4, 4)
    parts = {
        name: attachment(name, thing, per_rank=False, guarded=False)
        for name, thing in (("model", model), ("swapping", swapping))
    }
    for _ in range(4):
        expected = model.weight.data_ptr()
        assert dict(again.collect(parts).tensors)["model/weight"].data_ptr() == expected
