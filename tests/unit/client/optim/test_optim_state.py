"""State: its keys, saving at an odd moment, loading without a cast, groups that change."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.client import optim
from everstep.proto.errors import InvalidConfiguration
from tests.zygotes import Program

SHAPES = [(40, 130), (5000,), (3,), (), (9, 4, 130)]
CODECS = ("fp32", "bf16", "bf16+8", "int8", "dynamic", "4bit", "4bit-rank1", "fp8")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait in busy loops for each other take minutes on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last):
        for place, parameter in enumerate(held):
            generator = torch.Generator().manual_seed(100 * step + place)
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype) if parameter.requires_grad else None
        optimizer.step()


def everything(optimizer: torch.optim.Optimizer) -> list[bytes]:
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            tensors = [parameter, *optimizer.state[parameter].values()]
            for tensor in tensors:
                flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                found.append(bytes(flat.tolist()))
    return found


def test_keys_shapes_and_dtypes() -> None:
    weight, vector = torch.nn.Parameter(torch.ones(64, 100)), torch.nn.Parameter(torch.ones(9))
    optimizer = optim.AdamW([weight, vector], codec="int8")
    steps(optimizer, 0, 1)
    found = {k: (tuple(t.shape), t.dtype) for k, t in optimizer.state[weight].items()}
    assert found == {
        "step": ((), torch.float32),
        "exp_avg.codes": ((64, 100), torch.int8),
        "exp_avg.scales": ((64, 2), torch.float32),
        "exp_avg_sq.codes": ((64, 100), torch.uint8),
        "exp_avg_sq.scales": ((64, 2), torch.float32),
    }
    assert set(optimizer.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[vector]["exp_avg"].dtype == torch.float32
    assert optimizer.param_groups[0]["block"] == 64


def test_bytes_of_state_are_what_is_promised() -> None:
    for codec, most in {"int8": 2.15, "4bit": 1.1, "fp8": 2.15, "dynamic": 2.05}.items():
        weight = torch.nn.Parameter(torch.ones(512, 1024))
        optimizer = optim.AdamW([weight], codec=codec)
        optimizer.prepare()
        held = sum(t.nbytes for t in optimizer.state[weight].values())
        assert held / weight.numel() <= most, codec


RESUME = """
import sys, torch
from everstep.client import optim
sys.path.insert(0, sys.argv[1])
import test_optim_state as case
torch.set_num_threads(1)
saved = torch.load(sys.argv[2], weights_only=True)
dtype = saved["parameters"][0].dtype
held = case.parameters(dtype)
for parameter, value in zip(held, saved["parameters"]):
    parameter.data.copy_(value)
optimizer = optim.METHODS[sys.argv[3]](held, lr=7.0)
optimizer.load_state_dict(saved["optimizer"])
case.steps(optimizer, 3, 7)
torch.save(case.everything(optimizer), sys.argv[4])
"""


@pytest.mark.parametrize(
    ("method", "options", "dtype"),
    [
        ("AdamW", {"codec": "int8"}, torch.float32),
        ("AdEMAMix", {"codec": "4bit", "alpha_warmup": 5}, torch.float32),
        ("SGDSaI", {"codec": "int8"}, torch.float32),
        ("SPAM", {"codec": "int8", "reset_interval": 5}, torch.float32),
        ("AdamW", {"codec": "int8", "master": "bf16_int8"}, torch.bfloat16),
        ("AdamW", {"codec": "bf16+8", "stochastic_rounding": True, "seed": 5}, torch.bfloat16),
    ],
    ids=lambda value: str(value),
)
def test_a_fresh_process_goes_on_bit_for_bit(
    tmp_path: Path, method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    held = parameters(dtype)
    optimizer = optim.METHODS[method](held, lr=1e-2, **options)
    steps(optimizer, 0, 3)
    saved = {"parameters": [p.detach() for p in held], "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    steps(optimizer, 3, 7)
    script, log = tmp_path / "resume.py", tmp_path / "log"
    script.write_text(RESUME)
    files = str(tmp_path / "saved.pt"), method, str(tmp_path / "made.pt")
    resumed = Program(
        "trainer", str(script), str(Path(__file__).parent), *files, environ={}, log=log
    )
    assert resumed.wait(100) == 0, log.read_text()
    made = torch.load(tmp_path / "made.pt", weights_only=True)
    assert made == everything(optimizer)


@pytest.mark.parametrize("codec", CODECS)
def test_loading_casts_nothing(codec: str) -> None:
    """torch would make bf16 of scales, and fp32 of codes."""
    first = optim.AdamW(parameters(torch.bfloat16), codec=codec, master="bf16_int8")
    steps(first, 0, 2)
    second = optim.AdamW(parameters(torch.bfloat16))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    before, after = first.state_dict()["state"], second.state_dict()["state"]
    for index, state in before.items():
        for key, tensor in state.items():
            assert after[index][key].dtype == tensor.dtype
            assert torch.equal(after[index][key], tensor)
    assert second.param_groups[0]["codec"] == codec


def test_a_copy_goes_on_alike() -> None:
    optimizer = optim.AdamW(parameters(), codec="int8")
    steps(optimizer, 0, 2)
    other = copy.deepcopy(optimizer)
    steps(optimizer, 2, 4)
    steps(other, 2, 4)
    assert everything(optimizer) == everything(other)


def test_torchs_own_state_is_taken_and_coded_at_the_next_step() -> None:
    theirs = torch.optim.AdamW(parameters(), lr=1e-2)
    steps(theirs, 0, 3)
    held = [p for group in theirs.param_groups for p in group["params"]]
    mine = optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in held], codec="int8")
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert "exp_avg" in mine.state[mine.param_groups[0]["params"][0]]
    steps(theirs, 3, 6)
    steps(mine, 3, 6)
    state = mine.state[mine.param_groups[0]["params"][0]]
    assert "exp_avg.codes" in state
    assert "exp_avg" not in state
    assert float(state["step"]) == 6
    for a, b in zip(mine.param_groups[0]["params"], held, strict=True):
        assert torch.allclose(a, b, atol=2e-3)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_torchs_state_of_bf16_parameters_is_taken(codec: str) -> None:
    theirs = torch.optim.AdamW(parameters(torch.bfloat16))
    steps(theirs, 0, 2)
    mine = optim.AdamW(parameters(torch.bfloat16), codec=codec)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    mine.prepare()
    weight = mine.param_groups[0]["params"][0]
    saved = theirs.state_dict()["state"][0]["exp_avg"]
    if codec == "fp32":
        assert torch.equal(mine.state[weight]["exp_avg"], saved.float())
    steps(mine, 2, 3)
    broken = copy.deepcopy(theirs.state_dict())
    broken["state"][0]["exp_avg"] = torch.zeros(3)
    mine.load_state_dict(broken)
    with pytest.raises(InvalidConfiguration, match=r"state exp_avg: it is .*\(3,\)"):
        mine.prepare()


@pytest.mark.parametrize("to", CODECS)
def test_a_group_may_change_its_codec(to: str) -> None:
    optimizer, exact = (optim.AdamW(parameters(), lr=1e-3, codec=c) for c in ("int8", "fp32"))
    for one in (optimizer, exact):
        steps(one, 0, 3)
    optimizer.param_groups[0]["codec"] = to
    for one in (optimizer, exact):
        steps(one, 3, 5)
    weight = optimizer.param_groups[0]["params"][0]
    assert ("exp_avg" in optimizer.state[weight]) == (to == "fp32")
    assert "exp_avg.correction" not in optimizer.state[weight] or to == "bf16+8"
    for a, b in zip(
        optimizer.param_groups[0]["params"], exact.param_groups[0]["params"], strict=True
    ):
        assert torch.allclose(a, b, atol=2e-3)


def test_changed_rates_and_schedulers_take_effect() -> None:
    optimizer = optim.AdamW(parameters(), lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    steps(optimizer, 0, 1)
    once = optimizer.param_groups[0]["params"][0].detach().clone()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    steps(optimizer, 1, 2)
    twice = optimizer.param_groups[0]["params"][0].detach()
    assert (once - before).abs().max() == pytest.approx(1.0, rel=1e-3)
    assert 0.02 < (twice - once).abs().max() < 0.3
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    still = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    steps(optimizer, 2, 3)
    for a, b in zip(still, optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


def test_frozen_and_late_parameters() -> None:
    held = parameters()
    held[0].requires_grad_(False)
    optimizer = optim.AdamW(held, codec="int8")
    frozen = held[0].detach().clone()
    steps(optimizer, 0, 2)
    assert torch.equal(held[0], frozen)
    assert held[0] not in optimizer.state
    held[0].requires_grad_(True)
    late = torch.nn.Parameter(torch.ones(64, 100))
    optimizer.add_param_group({"params": [late], "codec": "4bit", "lr": 0.5})
    steps(optimizer, 2, 4)
    assert not torch.equal(held[0], frozen)
    assert float(optimizer.state[held[0]]["step"]) == 2
    assert float(optimizer.state[held[1]]["step"]) == 4
    assert optimizer.state[late]["exp_avg.codes"].shape == (64, 50)
    assert optimizer.param_groups[1]["block"] == 128
    other = optim.AdamW(parameters())
    other.add_param_group({"params": [torch.nn.Parameter(torch.ones(64, 100))]})
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(held, other.param_groups[0]["params"], strict=True):
        b.data.copy_(a)
    other.param_groups[1]["params"][0].data.copy_(late)
    steps(optimizer, 4, 6)
    steps(other, 4, 6)
    assert everything(optimizer) == everything(other)


def test_replaced_memory_is_seen() -> None:
    """Parameters, and state that a restore put in place, are where they are at each step."""
    first, second = (optim.AdamW(parameters(), codec="int8") for _ in range(2))
    steps(first, 0, 4)
    steps(second, 0, 2)
    weight = second.param_groups[0]["params"][0]
    weight.data = weight.data.clone()
    for key, tensor in list(second.state[weight].items()):
        second.state[weight][key] = tensor.clone()
    vector, last = (second.param_groups[0]["params"][place] for place in (1, 4))
    for tensor in second.state[vector].values():
        tensor.data = tensor.data.clone()
    for key, tensor in list(second.state[last].items()):
        second.state[last][key] = tensor.clone()
    steps(second, 2, 4)
    assert everything(first) == everything(second)


def test_state_that_does_not_fit_is_refused_by_its_key() -> None:
    optimizer = optim.AdamW(parameters(), codec="int8")
    steps(optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg.scales"] = torch.zeros(2, 2)
    optimizer.load_state_dict(saved)
    with pytest.raises(InvalidConfiguration, match=r"state exp_avg.scales: it is .*\(2, 2\)"):
        steps(optimizer, 1, 2)
    saved["state"][0].pop("exp_avg.scales")
    optimizer.load_state_dict(saved)
    with pytest.raises(InvalidConfiguration, match=r"exp_avg.scales: codec 'int8' wants it"):
        steps(optimizer, 1, 2)


def test_non_contiguous_parameters_and_gradients() -> None:
    plain = torch.nn.Parameter(torch.randn(96, 70, generator=torch.Generator().manual_seed(0)))
    turned = torch.nn.Parameter(plain.detach().T.contiguous().T)
    last = torch.nn.Parameter(torch.randn(8, 8, 9, 9).contiguous(memory_format=torch.channels_last))
    assert not turned.is_contiguous()
    optimizers = [optim.AdamW([p], codec="int8") for p in (plain, turned)]
    more = optim.Lion([last], codec="4bit")
    for step in range(3):
        gradient = torch.randn(96, 70, generator=torch.Generator().manual_seed(step))
        plain.grad, turned.grad = gradient, gradient.T.contiguous().T
        last.grad = torch.randn(8, 8, 9, 9).contiguous(memory_format=torch.channels_last)
        for one in (*optimizers, more):
            one.step()
    assert torch.equal(plain, turned)
    assert not turned.is_contiguous()
    assert torch.equal(
        optimizers[0].state[plain]["exp_avg.codes"], optimizers[1].state[turned]["exp_avg.codes"]
    )


def test_versions_tell_of_every_step() -> None:
    """Autograd and captures go by them."""
    held = parameters()
    optimizer = optim.AdamW(held, codec="int8")
    steps(optimizer, 0, 1)
    tensors = [held[0], *optimizer.state[held[0]].values()]
    before = [tensor._version for tensor in tensors]
    steps(optimizer, 1, 2)
    assert all(t._version > b for t, b in zip(tensors, before, strict=True))


def test_prepare_makes_what_the_first_step_would() -> None:
    first, second = (optim.AdamW(parameters(), codec="int8") for _ in range(2))
    first.prepare()
    made = {k: t.shape for k, t in first.state[first.param_groups[0]["params"][0]].items()}
    steps(first, 0, 2)
    steps(second, 0, 2)
    assert made["exp_avg.codes"] == (40, 130)
    assert everything(first) == everything(second)
