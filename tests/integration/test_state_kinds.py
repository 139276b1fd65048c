"""Everything that a training state may hold comes back bit for bit."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torchdata.stateful_dataloader import StatefulDataLoader

import everstep
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import NotCapturable, Refused

from .runs import load, save
from .states import exact, states

Connect = Callable[..., everstep.Client]
Objects = dict[str, Any]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "cosine-restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rate_scheduler(connect: Connect, name: str) -> None:
    def make() -> Objects:
        model = nn.Linear(4, 4)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return {"model": model, "optimizer": optimizer, "scheduler": SCHEDULERS[name](optimizer)}

    def rates(objects: Objects, count: int) -> list[str]:
        seen = []
        for _ in range(count):
            objects["optimizer"].step()
            metric = [1.0] if name == "plateau" else []
            objects["scheduler"].step(*metric)
            group = objects["optimizer"].param_groups[0]
            seen.append(f"{float(group['lr']).hex()} {float(group['momentum']).hex()}")
        return seen

    original = make()
    rates(original, 4)
    before = save(connect, original)
    expected = rates(original, 6)
    assert len(set(expected)) > 1
    other = make()
    assert load(connect, other) == before
    assert rates(other, 6) == expected


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.randint(1 << 30, ()).item()])


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's affair
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_in_mid_epoch(connect: Connect, workers: int) -> None:
    def make(seed: int) -> tuple[StatefulDataLoader, Iterator[torch.Tensor]]:
        torch.manual_seed(seed)
        loader = StatefulDataLoader(Numbers(), 4, shuffle=True, num_workers=workers)
        return loader, iter(loader)

    loader, batches = make(1)
    for _ in range(3):
        next(batches)
    before = save(connect, {"loader": loader})
    left = list(batches)
    draw = torch.rand(3)
    assert len(left) == 7

    other, _ = make(2)
    assert load(connect, {"loader": other})["loader"] == before["loader"]
    resumed = list(other)
    if workers:
        # What a worker draws is the loader's affair; which samples come is in its state.
        assert [batch[:, 0].tolist() for batch in resumed] == [b[:, 0].tolist() for b in left]
    else:
        assert states({"batches": resumed}) == states({"batches": left})
    # Making the iterator again has not cost a draw.
    assert exact(torch.rand(3)) == exact(draw)


def test_plain_trees(connect: Connect) -> None:
    weights = torch.randn(70, 70)
    progress: Objects = {
        "step": 7,
        "loss": float("nan"),
        "signed zero": -0.0,
        "best": float("-inf"),
        "big": 1 << 200,
        "names": ["a/b", "~", "", "\ud800", "ünïcode"],
        "none": None,
        "flags": (True, False, {1, 2}, b"\x00\xff", 3 + 4j),
        "ordered": OrderedDict([("z", 1), ("a", torch.ones(3))]),
        "nested": {"list": [torch.randn(5), {"deep": [weights, 1, None]}], 3: "int key"},
        "numpy": numpy.arange(6, dtype=numpy.float16).reshape(2, 3),
        "scalar": numpy.float32(0.1),
        "a/b": torch.randn(2),
        "": torch.randn(1),
        "again": weights,
    }
    before = comparable(progress)
    client = connect()
    client.attach(progress=progress, history=[1, torch.randn(3)])
    assert client.snapshot(1).wait()
    client.close(timeout=0)

    live: Objects = {
        "nested": {"list": [torch.zeros(5), {"deep": [torch.zeros(70, 70), 0, 0]}], "gone": 1},
        "a/b": torch.zeros(2),
        "": torch.zeros(1),
        "again": None,
        "ordered": OrderedDict([("z", 0), ("a", torch.zeros(3))]),
        "step": 0,
        "left over": 1,
    }
    live["again"] = live["nested"]["list"][1]["deep"][0]
    kept, counter = live["nested"]["list"][1]["deep"][0], live["nested"]
    history: list[Any] = []
    client = connect()
    client.attach(progress=live, history=history)
    assert client.restore() == 1
    assert comparable(live) == before
    assert type(live["ordered"]) is OrderedDict
    assert history[0] == 1
    # In place: whoever holds a tensor or a dict of it sees the restored one.
    assert live["nested"]["list"][1]["deep"][0] is kept
    assert live["nested"] is counter
    assert live["again"] is kept
    assert exact(kept) == exact(weights)


def comparable(tree: Any) -> Any:
    """`exact` of it, for numpy too, with types told apart."""
    if isinstance(tree, dict):
        return {key: comparable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return (type(tree), [comparable(value) for value in tree])
    if isinstance(tree, numpy.ndarray | numpy.generic):
        return (type(tree), tree.dtype.str, tree.shape, tree.tobytes())
    return (type(tree), exact(tree))


def some_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits, those of NaNs included, so that no conversion goes unseen."""
    size = torch.empty(shape, dtype=dtype).numel() * torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype is torch.bool else 256
    bits = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


DTYPES = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn_x2",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_in_several_shapes(connect: Connect) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (5, 7), (37, 1100)]

    def make(seed: int) -> Objects:
        return {
            name: [some_bytes(shape, getattr(torch, name), seed) for shape in shapes]
            for name in DTYPES
        }

    before = save(connect, {"leaves": make(1)})
    assert load(connect, {"leaves": make(2)}) == before


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_as_small_tensors_of_a_stateful_object(connect: Connect) -> None:
    def make(seed: int) -> Holder:
        shapes: list[tuple[int, ...]] = [(), (0, 2), (5, 3), (300, 300)]
        return Holder({n: [some_bytes(s, getattr(torch, n), seed) for s in shapes] for n in DTYPES})

    holder = make(1)
    holder.state["conjugated"] = torch.tensor([1 + 2j]).conj()
    holder.state["negated"] = torch.tensor([1 + 2j]).conj().imag
    holder.state["transposed"] = torch.arange(6.0).reshape(2, 3).t()
    holder.state["places"] = [torch.device("cpu"), torch.float16, torch.Size([2, 3])]
    before = save(connect, {"holder": holder})
    other = Holder({})
    assert load(connect, {"holder": other}) == before
    assert other.state["places"] == [torch.device("cpu"), torch.float16, torch.Size([2, 3])]


class Holder:
    """Anything with state_dict and load_state_dict."""

    def __init__(self, state: Objects) -> None:
        self.state = state

    def state_dict(self) -> Objects:
        return self.state

    def load_state_dict(self, state: Objects) -> None:
        self.state = state


def test_grad_scaler(connect: Connect) -> None:
    def make(scale: float) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)

    scaler = make(1024.0)
    weight = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([weight])
    scaler.scale(weight.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    before = save(connect, {"scaler": scaler})
    other = make(3.0)
    assert load(connect, {"scaler": other}) == before
    assert other.get_scale() == 512.0
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert disabled.state_dict() == {}


def test_part_without_any_state(connect: Connect) -> None:
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    save(connect, {"scaler": disabled, "empty": {}, "model": nn.ReLU(), "step": [3]})
    live: Objects = {"scaler": disabled, "empty": {"x": 1}, "model": nn.ReLU(), "step": []}
    load(connect, live)
    assert live["empty"] == {}
    assert live["step"] == [3]


class Sampler:
    """A user's own generator, as part of a stateful object."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> Objects:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Objects) -> None:
        self.generator.set_state(state["generator"])


def test_a_generator_of_the_users_own(connect: Connect) -> None:
    sampler = Sampler(1)
    torch.rand(3, generator=sampler.generator)
    save(connect, {"sampler": sampler})
    expected = torch.rand(5, generator=sampler.generator)
    other = Sampler(2)
    load(connect, {"sampler": other})
    assert exact(torch.rand(5, generator=other.generator)) == exact(expected)


def test_global_random_generators(connect: Connect) -> None:
    def draws() -> list[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            numpy.random.standard_normal(3).tobytes(),
            exact(torch.randn(5)),
        ]

    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    draws()  # leaves a second gaussian waiting in each generator
    numpy.random.standard_normal()
    client = connect()
    client.attach(progress={"step": 1})
    assert client.snapshot(1).wait()
    expected = draws()
    client.close(timeout=0)
    random.seed(2)
    numpy.random.seed(2)
    torch.manual_seed(2)
    client = connect()
    client.attach(progress={"step": 0})
    assert client.restore() == 1
    assert draws() == expected


def test_an_object_without_state_is_refused_at_attach(connect: Connect) -> None:
    client = connect()
    with pytest.raises(NotCapturable, match=r"'thing'.*object") as raised:
        client.attach(thing=object())
    assert (raised.value.path, raised.value.type_name) == ("thing", "object")
    client.attach(thing=[1])
    with pytest.raises(Refused, match="attached already"):
        client.attach(thing=[2])
    with pytest.raises(Refused, match="rng"):
        client.attach(rng=[2])


class Unknown:
    pass


UNSTORABLE: dict[str, tuple[Any, str, str]] = {
    "object": ({"a": [1, {"b": Unknown()}]}, "tree/a/1/b", "Unknown"),
    "beside a tensor": ({"b": Unknown(), "c": torch.ones(2)}, "tree/b", "Unknown"),
    "function": ({"f": len}, "tree/f", "builtin_function_or_method"),
    "sparse": ({"s": torch.eye(3).to_sparse()}, "tree/s", "sparse"),
    "meta": ({"m": torch.ones(3, device="meta")}, "tree/m", "meta"),
    "stateful": (Holder({"x": [Unknown()]}), "tree/x/0", "Unknown"),
    "sparse in stateful": (Holder({"s": torch.eye(3).to_sparse()}), "tree/s", "sparse"),
    "meta in stateful": (Holder({"m": torch.ones(3, device="meta")}), "tree/m", "meta"),
    "four bits": ({"u": torch.empty(4, dtype=torch.uint4)}, "tree/u", "uint4"),
    "lazy module": (nn.LazyLinear(3), "tree/weight", "Uninitialized"),
}


@pytest.mark.parametrize("name", UNSTORABLE)
def test_what_cannot_be_stored_is_named(connect: Connect, name: str) -> None:
    thing, path, type_name = UNSTORABLE[name]
    client = connect()
    client.attach(tree=thing)
    with pytest.raises(NotCapturable) as raised:
        client.snapshot(1)
    assert raised.value.path == path
    assert type_name in str(raised.value)
    assert "pickle" in str(raised.value)


def test_a_list_inside_itself_is_refused(connect: Connect) -> None:
    loop: list[Any] = []
    loop.append(loop)
    client = connect()
    client.attach(tree=loop)
    with pytest.raises(NotCapturable, match="inside itself") as raised:
        client.snapshot(1)
    assert raised.value.path.startswith("tree")


def test_a_snapshot_that_is_refused_leaves_no_step_open(connect: Connect) -> None:
    """The slot is asked for before the state is looked at."""
    client = connect()
    tree: Objects = {"good": torch.ones(2)}
    client.attach(tree=tree)
    assert client.snapshot(1).wait()
    tree["bad"] = Unknown()
    with pytest.raises(NotCapturable):
        client.snapshot(2)
    reply = client._channel.call("Status", wire.StatusRequest(job=client.job), 5.0)
    (job,) = reply.jobs
    assert [(one.step, one.committed) for one in job.snapshots] == [(1, True)]
    assert job.counters["dropped"] == 1
    del tree["bad"]
    assert client.snapshot(3).wait()


def test_a_state_that_can_be_stored_again_is(connect: Connect) -> None:
    client = connect()
    tree: Objects = {"good": torch.ones(2), "bad": Unknown()}
    client.attach(tree=tree)
    with pytest.raises(NotCapturable):
        client.snapshot(1)
    del tree["bad"]
    assert client.snapshot(2).wait()
