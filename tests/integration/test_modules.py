"""Modules of every kind come back bit for bit: strides, ties, extra state, wrappers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import everstep

from .conftest import AgentProcess
from .runs import load, save
from .states import exact, states

Connect = Callable[..., everstep.Client]
Objects = dict[str, Any]


class Strided(nn.Module):
    """Parameters and buffers in every order that memory can have."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        images = torch.randn(8, 16, 12, 12).to(memory_format=torch.channels_last)
        self.conv = nn.Parameter(images)
        self.transposed = nn.Parameter(torch.randn(90, 70).t())
        self.sliced = nn.Parameter(torch.randn(100, 100)[::2, 1:90:3])
        self.register_buffer("expanded", torch.randn(50, 1).expand(50, 30))
        self.register_buffer("expanded_whole", torch.randn(1).expand(9))
        self.register_buffer("shifted", torch.randn(101)[1:])
        self.register_buffer("conjugated", torch.randn(40, dtype=torch.complex64).conj())
        self.register_buffer("negated", torch.randn(40, dtype=torch.complex64).conj().imag)
        self.register_buffer("permuted", torch.randn(3, 4, 5, dtype=torch.float64).permute(2, 0, 1))
        window = torch.randn(10).as_strided((4, 4), (2, 1))  # rows overlap
        self.register_buffer("windows", window)


def test_tensors_that_are_not_contiguous(connect: Connect) -> None:
    def make(seed: int) -> Objects:
        model = Strided(seed)
        optimizer = optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    before = save(connect, make(1))
    other = make(2)
    strides = {name: leaf.stride() for name, leaf in other["model"].state_dict().items()}
    assert load(connect, other) == before
    assert strides == {name: leaf.stride() for name, leaf in other["model"].state_dict().items()}


def test_strides_may_have_changed(connect: Connect) -> None:
    """What is stored is the value; how it lies in memory is the live tensor's affair."""
    before = save(connect, {"tree": {"w": torch.randn(60, 40).t()}})
    assert load(connect, {"tree": {"w": torch.zeros(40, 60)}}) == before


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 50)
        self.head = nn.Linear(50, 100, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_weights_stay_tied_and_are_stored_once(
    connect: Connect, shared_agent: AgentProcess, job: str
) -> None:
    model = Tied()
    before = save(connect, {"model": model, "optimizer": optim.SGD(model.parameters())})
    (held,) = shared_agent.memory.records(job)
    assert 20_000 <= held.record.image_bytes <= 30_000  # once 20 kB, beside the header

    other = Tied()
    weight = other.embed.weight
    assert load(connect, {"model": other, "optimizer": optim.SGD(other.parameters())}) == before
    assert other.head.weight is other.embed.weight is weight


def test_weights_that_are_tied_no_more_each_get_the_saved_ones(connect: Connect) -> None:
    before = save(connect, {"model": Tied()})
    assert load(connect, {"model": Tied(tied=False)}) == before


def test_weights_that_were_not_tied_cannot_go_into_tied_ones(connect: Connect) -> None:
    save(connect, {"model": Tied(tied=False)})
    other = Tied()
    before = states({"model": other})
    client = connect()
    client.attach(model=other)
    with pytest.raises(everstep.errors.StateMismatch, match=r"model/head\.weight") as raised:
        client.restore()
    assert "model/embed.weight" in str(raised.value)
    assert states({"model": other}) == before


def test_tensors_that_share_a_part_of_their_storage(connect: Connect) -> None:
    def make(seed: int) -> Objects:
        flat = torch.randn(3000, generator=torch.Generator().manual_seed(seed))
        model = nn.Module()
        model.a = nn.Parameter(flat[:1000].view(10, 100))
        model.b = nn.Parameter(flat[500:2500])
        return {"model": model, "flat": {"flat": flat}, "optimizer": optim.SGD([model.a, model.b])}

    before = save(connect, make(1))
    other = make(2)
    assert load(connect, other) == before
    flat, model = other["flat"]["flat"], other["model"]
    assert model.a.data_ptr() == flat.data_ptr()
    assert model.b.data_ptr() == flat[500:].data_ptr()


class Extra(nn.Module):
    """Extra state that may grow, and a leaf that state_dict() computes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(80, 80))
        self.history: list[Any] = []
        self.log_scale = torch.randn(70, 80)

    def get_extra_state(self) -> Any:
        return {"history": self.history, "calls": len(self.history)}

    def set_extra_state(self, state: Any) -> None:
        self.history = state["history"]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = self.log_scale * 2

    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        scale = state.pop(prefix + "scale", None)
        if scale is not None:
            self.log_scale = scale / 2
        super()._load_from_state_dict(state, prefix, *others)


def test_extra_state_and_computed_leaves(connect: Connect) -> None:
    original = nn.Sequential(Extra(1), nn.BatchNorm1d(80))
    original[0].history = ["one", torch.randn(70, 70), {"two": torch.randn(3)}]
    original[1](torch.randn(4, 80))
    before = save(connect, {"model": original})
    other = nn.Sequential(Extra(2), nn.BatchNorm1d(80))
    weight = other[0].weight
    assert load(connect, {"model": other}) == before
    assert other[0].weight is weight
    assert exact(other[0].log_scale) == exact(original[0].log_scale)
    assert exact(other[0].history) == exact(original[0].history)


def test_buffers_of_batch_norm(connect: Connect) -> None:
    model = nn.BatchNorm2d(5)
    for _ in range(3):
        model(torch.randn(2, 5, 3, 3))
    before = save(connect, {"model": model})
    other = nn.BatchNorm2d(5)
    assert load(connect, {"model": other}) == before
    assert other.num_batches_tracked.item() == 3


def test_compiled_modules_keep_their_own_names(connect: Connect) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 80))

    model = make(1)
    compiled = torch.compile(model, backend="eager")
    optimizer = optim.AdamW(compiled.parameters())
    compiled(torch.randn(2, 80)).sum().backward()
    optimizer.step()
    save(connect, {"model": compiled, "optimizer": optimizer})
    plain = make(2)
    plain_optimizer = optim.AdamW(plain.parameters())
    restored = load(connect, {"model": plain, "optimizer": plain_optimizer})
    assert restored == states({"model": model, "optimizer": optimizer})


def test_a_world_of_one_under_ddp(connect: Connect) -> None:
    """The wrapper leaves no trace in the names; rank and world are torch.distributed's."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(nn.Linear(80, 80))
        optimizer = optim.AdamW(parallel.parameters())
        parallel(torch.randn(2, 80)).sum().backward()
        optimizer.step()
        client = connect(rank=None, world=None)
        client.attach(model=parallel, optimizer=optimizer)
        assert client.snapshot(1).wait()
        expected = states({"model": parallel.module, "optimizer": optimizer})
        client.close(timeout=0)
    finally:
        distributed.destroy_process_group()
    plain = nn.Linear(80, 80)
    objects = {"model": plain, "optimizer": optim.AdamW(plain.parameters())}
    assert load(connect, objects) == expected
