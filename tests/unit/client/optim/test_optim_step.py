"""What a step takes besides gradients: clipping, scalers, threads; and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from everstep.client import optim
from everstep.client.optim import dispatch
from everstep.proto.errors import InvalidConfiguration

SHAPES = [(40, 130), (5000,), (3,), ()]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Threads that wait in busy loops for each other take minutes on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(dtype: torch.dtype = torch.float32, **options: Any) -> optim.AdamW:
    generator = torch.Generator().manual_seed(3)
    held = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    return optim.AdamW(held, **{"lr": 1e-2, **options})


def held_by(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give(optimizer: torch.optim.Optimizer, step: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in held_by(optimizer):
        gradient = torch.randn(parameter.shape, generator=generator) * factor
        parameter.grad = gradient.to(parameter.dtype)


def run(optimizer: optim.Optimizer, steps: int = 4, factor: float = 1.0) -> list[torch.Tensor]:
    for step in range(steps):
        give(optimizer, step, factor)
        optimizer.step()
    return [p.detach() for p in held_by(optimizer)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_maximize_is_the_other_way() -> None:
    assert same(run(made(maximize=True), factor=-1.0), run(made()))
    clipped = run(made(maximize=True, clip_norm=0.1), factor=-1.0)
    assert same(clipped, run(made(clip_norm=0.1)))


def test_a_tensor_rate_is_a_number() -> None:
    assert same(run(made(lr=torch.tensor(0.01, dtype=torch.float64))), run(made()))


@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e9])
def test_clipping_in_the_step_is_clip_grad_norm(clip: float) -> None:
    folded, before = made(codec="fp32", clip_norm=clip), made(codec="fp32")
    for step in range(4):
        give(folded, step)
        folded.step()
        give(before, step)
        torch.nn.utils.clip_grad_norm_(held_by(before), clip)
        before.step()
    for a, b in zip(held_by(folded), held_by(before), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    if clip == 1e9:
        assert same(held_by(folded), run(made(codec="fp32")))


def test_groups_with_one_norm_are_clipped_as_one() -> None:
    first = made(codec="fp32", clip_norm=0.5)
    second = made(codec="fp32", clip_norm=0.5)
    group = second.param_groups[0]
    late = group["params"][2:]
    del group["params"][2:]
    second.add_param_group({"params": late, "maximize": False})
    assert same(run(first), run(second))


def test_a_closure_computes_gradients_anew() -> None:
    optimizer = made()
    weight = held_by(optimizer)[0]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert held_by(optimizer)[1] not in optimizer.state


def test_threads_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_CHUNKS_AT_LEAST", 1)

    def big(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        held = [torch.nn.Parameter(torch.ones(300, 700)), torch.nn.Parameter(torch.ones(40_000))]
        optimizer = optim.AdamW(held, codec="int8", clip_norm=1.0)
        run(optimizer, 3)
        state = [t for p in held for t in optimizer.state[p].values()]
        return [*(p.detach() for p in held), *state]

    assert same(big(1), big(2))
    assert same(big(1), big(3))


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("a range")

    with pytest.raises(ValueError, match="a range"):
        dispatch._shared(fail, 3)


def test_a_grad_scaler_is_folded_in_and_skips() -> None:
    scaled, plain = made(), made()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        give(plain, step)
        give(scaled, step, 1024.0)
        if step == 2:
            held_by(scaled)[0].grad[0, 0] = float("inf")
        else:
            plain.step()
        scaler.scale(torch.ones(()))
        scale = scaler.get_scale()
        for parameter in held_by(scaled):
            parameter.grad *= scale / 1024.0
        scaler.step(scaled)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert same(held_by(scaled), held_by(plain))
    assert [float(scaled.state[p]["step"]) for p in held_by(scaled)] == [3.0] * 4


def test_a_grad_scaler_and_clipping_see_the_true_norm() -> None:
    scaled, plain = made(clip_norm=0.1), made(clip_norm=0.1)
    give(plain, 0)
    plain.step()
    give(scaled, 0, 256.0)
    scaled.grad_scale = torch.tensor(256.0)
    scaled.step()
    assert same(held_by(scaled), held_by(plain))


def test_stochastic_rounding_is_of_its_seed() -> None:
    def bits(seed: int) -> list[torch.Tensor]:
        return run(made(torch.bfloat16, stochastic_rounding=True, seed=seed))

    assert same(bits(1), bits(1))
    assert not same(bits(1), bits(2))


def test_small_steps_are_not_lost() -> None:
    """bf16 alone stays where it is; a master copy and random rounding get on."""

    def moved(**options: Any) -> float:
        weight = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        optimizer = optim.AdamW([weight], lr=1e-4, weight_decay=0.0, **options)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return 1.0 - weight.float().mean().item()

    assert moved() == 0
    assert moved(master="bf16_int8") == pytest.approx(0.01, rel=0.25)
    assert moved(stochastic_rounding=True) == pytest.approx(0.01, rel=0.1)


def test_gradients_are_not_held() -> None:
    optimizer = made()
    give(optimizer, 0)
    optimizer.step()
    assert all(slot.work.gradient is None for slot in optimizer._slots.values())


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("AdamW", {"lr": -1.0}, "lr: -1.0 is negative"),
    ("AdamW", {"lr": "fast"}, "lr: 'fast' is not a finite number"),
    ("AdamW", {"betas": (0.9, 1.0)}, r"betas\[1\]: 1.0 is not in \[0, 1\)"),
    ("AdamW", {"betas": 0.9}, "betas: 0.9 is not a sequence of 2"),
    ("AdamW", {"eps": float("nan")}, "eps: nan is not a finite number"),
    ("AdamW", {"codec": "int7"}, "codec: 'int7' is not one of"),
    ("AdamW", {"block": 100}, "block: 100 is not a divisor of 512"),
    ("AdamW", {"min_elements": -1}, "min_elements: -1 is not a whole number"),
    ("AdamW", {"maximize": 1}, "maximize: 1 is neither True nor False"),
    ("AdamW", {"clip_norm": 0.0}, "clip_norm: 0.0 is not positive"),
    ("AdamW", {"master": "fp16"}, "master: 'fp16' is neither None nor"),
    ("AdamW", {"master": "bf16_int8", "stochastic_rounding": True}, "stochastic_rounding: True"),
    ("AdamW", {"kernels": "cuda"}, "kernels: 'cuda' is not one of"),
    ("AdamW", {"amsgrad": True}, "amsgrad: True was given, and it is no option"),
    ("AdEMAMix", {"betas": (0.9, 0.99)}, r"betas: \(0.9, 0.99\) is not a sequence of 3"),
    ("AdEMAMix", {"alpha_warmup": 1.5}, "alpha_warmup: 1.5 is not a whole number"),
    ("SGD", {"momentum": 1.0}, r"momentum: 1.0 is not in"),
    ("SGD", {"nesterov": True, "momentum": 0.0}, "nesterov: True, with momentum 0.0"),
    ("Sophia", {"batch_tokens": 0}, "batch_tokens: 0 is not a whole number of at least 1"),
    ("Muon", {"adjust": "none"}, "adjust: 'none' is not one of"),
    ("AdamP", {"delta": -0.1}, "delta: -0.1 is negative"),
    ("SPAM", {"threshold": -5.0}, "threshold: -5.0 is negative"),
    ("SGDSaI", {"normalize": "yes"}, "normalize: 'yes' is neither True nor False"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD)
def test_bad_arguments_are_named_with_their_value(
    method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        optim.METHODS[method]([torch.nn.Parameter(torch.ones(4, 4))], **options)


def test_a_bad_group_is_not_added() -> None:
    optimizer = made()
    with pytest.raises(InvalidConfiguration, match="lr: -2 is negative"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": -2})
    assert len(optimizer.param_groups) == 1
    run(optimizer)


def test_muon_refuses_vectors() -> None:
    with pytest.raises(InvalidConfiguration, match=r"params\[1\]: its shape is \(5,\)"):
        optim.Muon([torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(5))])


def sparse() -> torch.Tensor:
    return torch.ones(4, 4).to_sparse()


REFUSED: list[tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor] | None, str]] = [
    (lambda: torch.ones(4, 4), sparse, r"parameter 'weight': its gradient is torch.sparse_coo"),
    (lambda: torch.ones(4, dtype=torch.complex64), None, "its dtype is torch.complex64"),
    (lambda: torch.ones(4, dtype=torch.float64), None, "its dtype is torch.float64"),
]


@pytest.mark.parametrize(("parameter", "gradient", "message"), REFUSED)
def test_what_cannot_be_stepped_is_refused(
    parameter: Callable[[], torch.Tensor],
    gradient: Callable[[], torch.Tensor] | None,
    message: str,
) -> None:
    held = torch.nn.Parameter(parameter())
    optimizer = optim.AdamW([("weight", held)])
    held.grad = gradient() if gradient else torch.ones_like(held)
    with pytest.raises(InvalidConfiguration, match=message):
        optimizer.step()


def test_everstep_optim_is_the_package() -> None:
    import everstep

    assert everstep.optim is optim
    assert set(optim.__all__) <= set(dir(optim))
