"""Every update rule with every codec: kernels do what the reference does, and that is right."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from everstep.client import optim
from everstep.client.optim.codecs import CODECS
from everstep.client.optim.methods.muon import orthogonal

NAMES = ("fp32", "bf16", "bf16+8", "int8", "dynamic", "4bit", "fp8")
SHAPES = [(65, 127), (5000,), (3,), (), (17, 4, 5, 16), (1, 4100), (513, 17), (0, 64)]
MATRICES = [shape for shape in SHAPES if len(shape) > 1]
OPTIONS: dict[str, dict[str, Any]] = {
    "SPAM": {
        "grace_steps": 3,
        "reset_interval": 20,
        "warmup_steps": 5,
        "threshold": 5.0,
        "weight_decay": 0.01,
    },
    "SGD": {"nesterov": True, "weight_decay": 0.01},
    "AdEMAMix": {"alpha_warmup": 10, "beta3_warmup": 20, "weight_decay": 0.01},
    "AdamP": {"weight_decay": 0.1},
    "Adam": {"weight_decay": 0.1},
}
Optimizer = torch.optim.Optimizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait in busy loops for each other take minutes on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shapes_for(method: str) -> list[tuple[int, ...]]:
    return MATRICES if method == "Muon" else SHAPES


def parameters(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def one_step(optimizer: Optimizer, held: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in held:
        gradient = torch.randn(parameter.shape, generator=generator) * 10 ** (step % 4 - 2)
        parameter.grad = gradient.to(parameter.dtype)
    if isinstance(optimizer, optim.Sophia) and step % 5 == 0:
        optimizer.update_hessian()
    optimizer.step()


def trained(
    method: str, steps: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[torch.nn.Parameter], Optimizer]:
    held = parameters(shapes_for(method), dtype)
    optimizer: Optimizer = optim.METHODS[method](
        held, lr=1e-2, **OPTIONS.get(method, {}), **options
    )
    for step in range(steps):
        one_step(optimizer, held, step)
    return held, optimizer


def everything(held: list[torch.nn.Parameter], optimizer: Optimizer) -> dict[str, bytes]:
    """All bytes of parameters and state, NaN included."""
    found = {}
    for place, parameter in enumerate(held):
        found[f"{place}"] = raw(parameter)
        for key, value in optimizer.state[parameter].items():
            found[f"{place}.{key}"] = raw(value)
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("method", optim.METHODS)
def test_kernels_equal_the_reference_over_50_steps(method: str, codec: str) -> None:
    made = everything(*trained(method, 50, codec=codec))
    wanted = everything(*trained(method, 50, codec=codec, kernels="reference"))
    assert made == wanted


@pytest.mark.parametrize("options", [{"master": "bf16_int8"}, {"stochastic_rounding": True}, {}])
@pytest.mark.parametrize("method", ["AdamW", "Lion", "AdamP"])
def test_bf16_parameters_equal_the_reference(method: str, options: dict[str, Any]) -> None:
    made = everything(*trained(method, 12, torch.bfloat16, codec="int8", **options))
    wanted = everything(
        *trained(method, 12, torch.bfloat16, codec="int8", kernels="reference", **options)
    )
    assert made == wanted


@pytest.mark.parametrize("codec", ["int8", "4bit", "fp8", "dynamic"])
@pytest.mark.parametrize("method", ["AdamW", "Lion", "SGD", "Sophia", "SPAM", "EXAdam", "AdEMAMix"])
@pytest.mark.parametrize("value", [0.0, 1e-44, 1e30, float("inf"), float("nan")])
def test_strange_gradients_equal_the_reference(method: str, codec: str, value: float) -> None:
    def run(kernels: Any) -> dict[str, bytes]:
        held, optimizer = trained(method, 2, codec=codec, kernels=kernels)
        for parameter in held:
            parameter.grad = torch.randn_like(parameter)
            if parameter.numel() > 100:
                parameter.grad.reshape(-1)[:30] = value
        optimizer.step()
        one_step(optimizer, held, 9)
        return {key: canonical(text) for key, text in everything(held, optimizer).items()}

    torch.manual_seed(0)
    made = run("auto")
    torch.manual_seed(0)
    assert made == run("reference")


def canonical(text: bytes) -> bytes:
    """With one kind of NaN: which one comes of NaN and inf is the machine's choice."""
    if len(text) % 4:
        return text
    words = torch.frombuffer(bytearray(text), dtype=torch.int32) if text else torch.empty(0)
    if not text:
        return text
    nan = (words & 0x7F800000 == 0x7F800000) & (words & 0x7FFFFF != 0)
    return raw(torch.where(nan, torch.full_like(words, 0x7FC00000), words))


@pytest.mark.parametrize("codec", ["int8", "4bit", "fp8", "dynamic"])
def test_an_infinite_gradient_reaches_its_block_and_no_other(codec: str) -> None:
    held = [torch.nn.Parameter(torch.ones(4, 1024))]
    optimizer = optim.AdamW(held, codec=codec)
    held[0].grad = torch.ones(4, 1024)
    held[0].grad[1, 600] = float("inf")
    optimizer.step()
    held[0].grad = torch.ones(4, 1024)
    optimizer.step()
    block = CODECS[codec].block
    first = 600 // block * block
    nan = held[0].isnan()
    assert bool(nan[1, first : first + block].all())
    assert int(nan.sum()) == block


CLOSE: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.01),
}


@pytest.mark.parametrize("method", CLOSE)
def test_fp32_states_are_torchs(method: str) -> None:
    held, _ = trained(method, 50, codec="fp32")
    others = parameters(SHAPES)
    other = CLOSE[method](others)
    for step in range(50):
        one_step(other, others, step)
    for mine, theirs in zip(held, others, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=2e-6)


def test_lion_is_its_paper() -> None:
    held, _ = trained("Lion", 5, codec="fp32", weight_decay=0.1)
    p = parameters(SHAPES)
    m = [torch.zeros_like(x) for x in p]
    for step in range(5):
        generator = torch.Generator().manual_seed(1000 + step)
        for place, parameter in enumerate(p):
            g = torch.randn(parameter.shape, generator=generator) * 10 ** (step % 4 - 2)
            u = (0.9 * m[place] + 0.1 * g).sign()
            m[place] = 0.99 * m[place] + 0.01 * g
            p[place] = torch.nn.Parameter(parameter * (1 - 1e-2 * 0.1) - 1e-2 * u)
    for mine, theirs in zip(held, p, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", sorted(set(optim.METHODS) - {"Sophia"}))
@pytest.mark.parametrize("codec", ["int8", "fp8", "4bit"])
def test_a_quadratic_is_descended(method: str, codec: str) -> None:
    """The step points the right way, and its size is about right."""
    weight = torch.nn.Parameter(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)))
    rate = {"SGD": 0.1, "SGDSaI": 0.1, "Muon": 0.1}.get(method, 0.02)
    optimizer = optim.METHODS[method]([weight], lr=rate, codec=codec)
    before = weight.square().mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        (weight.square().sum() / 2).backward()
        optimizer.step()
    assert weight.square().mean().item() < 0.35 * before


def test_sophia_with_an_estimate_descends() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)))
    optimizer = optim.Sophia([weight], lr=0.02, batch_tokens=1)
    before = weight.square().mean().item()
    for step in range(80):
        optimizer.zero_grad()
        (weight.square().sum() / 2).backward()
        if step % 10 == 0:
            optimizer.update_hessian()
        codes = optimizer.state[weight]["hessian.codes"].clone()
        optimizer.step()
        assert torch.equal(codes, optimizer.state[weight]["hessian.codes"])  # read only
    assert weight.square().mean().item() < 0.5 * before


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_makes_matrices_orthogonal(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sizes = torch.linalg.svdvals(orthogonal(values, 5).float())
    assert 0.6 < sizes.min() < sizes.max() < 1.3


def test_adamp_takes_out_what_is_along_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 96, generator=generator))
    start = weight.detach().clone()
    optimizer = optim.AdamP([weight], lr=1e-3, codec="fp32", delta=1.0)
    gradient = torch.randn(64, 96, generator=generator)
    along = (gradient * start).sum(1, keepdim=True) / start.square().sum(1, keepdim=True)
    weight.grad = gradient - along * start
    optimizer.step()
    moved = weight.detach() - start
    assert ((moved * start).sum(1) / start.norm(dim=1)).abs().max() < 1e-6
    assert moved.abs().max() > 5e-4


def test_spam_forgets_and_warms_up() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 96))
    optimizer = optim.SPAM([weight], lr=1.0, reset_interval=4, warmup_steps=2, grace_steps=2)
    sizes = []
    for _ in range(8):
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        sizes.append((weight.detach() - before).abs().max().item())
    assert sizes[:3] == pytest.approx([1.0, 1.0, 1.0], rel=1e-2)
    assert sizes[3] < 0.03  # the fourth step has a hundredth of the rate


def test_spam_begins_with_new_moments() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 96))
    optimizer = optim.SPAM([weight], reset_interval=4, codec="int8")
    for step in range(4):
        weight.grad = torch.full_like(weight, -1.0 if step < 3 else 3.0)
        optimizer.step()
    optimizer.param_groups[0]["codec"] = "fp32"
    optimizer.prepare()
    average = optimizer.state[weight]["exp_avg"]
    assert torch.allclose(average, torch.full_like(average, 0.3), rtol=1e-5)


def test_spam_clips_spikes() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 96))
    optimizer = optim.SPAM([weight], lr=1e-3, codec="fp32", grace_steps=3, threshold=100.0)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    before = optimizer.state[weight]["exp_avg_sq"][0, 0].item()
    weight.grad[0, 0] = 1e6
    optimizer.step()
    after = optimizer.state[weight]["exp_avg_sq"][0, 0].item()
    assert after == pytest.approx(before * 0.999 + before * 100 * 0.001, rel=1e-4)


def test_sgdsai_sets_each_tensors_rate_once() -> None:
    held = [torch.nn.Parameter(torch.zeros(64, 96)), torch.nn.Parameter(torch.zeros(80, 64))]
    optimizer = optim.SGDSaI(held, lr=0.1, weight_decay=0.0, codec="fp32")
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(p.shape, generator=generator) for p in held]
    for parameter, gradient in zip(held, first, strict=True):
        parameter.grad = gradient
    optimizer.step()
    ratios = [g.norm() / (g.std() + 1e-8) for g in first]
    for parameter, gradient, ratio in zip(held, first, ratios, strict=True):
        assert float(optimizer.state[parameter]["gsnr"]) == pytest.approx(ratio.item(), rel=1e-5)
        wanted = -0.1 * gradient * (ratio / max(ratios))
        assert torch.allclose(parameter, wanted, rtol=1e-5)
    for parameter in held:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert float(optimizer.state[held[0]]["gsnr"]) == pytest.approx(ratios[0].item(), rel=1e-5)


def test_ademamix_grows_its_slow_average() -> None:
    optimizer = optim.AdEMAMix(parameters([(4, 4)]), alpha=8.0, alpha_warmup=10, beta3_warmup=100)
    group = optimizer.param_groups[0]
    names = ("b3", "alpha")
    places = {"b3": 7, "alpha": 10}
    early, late = optimizer.scalars(group, 1, {}), optimizer.scalars(group, 200, {})
    assert [early[places[n]] for n in names] < [late[places[n]] for n in names]
    assert late[places["alpha"]] == 8.0
    assert late[places["b3"]] == pytest.approx(0.9999, rel=1e-6)


# The divergence of notes 3.3: codes of a second moment that hold zero blow the update up.


@pytest.mark.parametrize("codec", ["int8", "4bit", "fp8", "dynamic"])
def test_elements_far_below_their_blocks_largest_do_not_blow_up(codec: str) -> None:
    """One element's gradient is a million times its neighbours'. With a second moment that rounds
    to zero where the average does not, these would move by lr m / eps."""
    weight = torch.nn.Parameter(torch.zeros(16, 512))
    optimizer = optim.AdamW([weight], lr=1e-3, weight_decay=0.0, codec=codec)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        gradient = torch.randn(16, 512, generator=generator) * 1e-4
        gradient[:, ::64] *= 1e6
        weight.grad = gradient
        optimizer.step()
    assert bool(weight.isfinite().all())
    assert weight.abs().max() < 50 * 2e-3
