"""Torch's optimizers with their state in codes between steps."""

import io
import logging
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from everstep.client.optim.codecs import CODECS
from everstep.client.optim.compress import Compressed, compress
from everstep.client.optim.methods import method_named
from everstep.proto.errors import InvalidConfiguration, NotCompressible

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)


def train(optimizer: torch.optim.Optimizer, trained: nn.Module, steps: int, seed: int = 0) -> float:
    generator = torch.Generator().manual_seed(seed)
    kind = next(trained.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(16, 96, generator=generator).to(kind)
        optimizer.zero_grad()
        loss = (trained(x) - x[:, :64].sin()).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def weights(trained: nn.Module) -> bytes:
    flat = torch.cat([p.detach().flatten() for p in trained.parameters()])
    return flat.view(torch.uint8).numpy().tobytes()


def adamw(**options: Any) -> Make:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, **options)


ELEMENTWISE: dict[str, Make] = {
    "AdamW": adamw(),
    "AdamW fused": adamw(fused=True),
    "AdamW foreach": adamw(foreach=True),
    "AdamW amsgrad": adamw(amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_with_states_as_they_are_nothing_changes(name: str) -> None:
    alone, wrapped = model(), model()
    train(ELEMENTWISE[name](alone.parameters()), alone, 5)
    train(compress(ELEMENTWISE[name](wrapped.parameters()), "fp32"), wrapped, 5)
    if name == "ASGD":  # its `ax` is a weight, which is held as bf16 and a correction
        return
    assert weights(alone) == weights(wrapped)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_codes_train_nearly_as_well(name: str) -> None:
    alone, wrapped = model(), model()
    exact = train(ELEMENTWISE[name](alone.parameters()), alone, 20)
    coded = train(compress(ELEMENTWISE[name](wrapped.parameters())), wrapped, 20)
    assert coded == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("codec", sorted(set(CODECS) - {"fp32"}))
def test_between_steps_there_are_codes_alone(codec: str) -> None:
    trained = model()
    optimizer = compress(torch.optim.AdamW(trained.parameters()), codec)
    train(optimizer, trained, 3)
    weight, bias = trained[0].weight, trained[0].bias
    assert not optimizer.engine.state
    assert "exp_avg" not in optimizer.state[weight]
    codes, block = CODECS[codec], CODECS[codec].block
    held = [v for k, v in optimizer.state[weight].items() if k.startswith("exp_avg.")]
    size = codes.bytes_of(weight.shape, "signed", block)
    assert sum(t.numel() * t.element_size() for t in held) == size
    assert optimizer.state[bias]["exp_avg"].dtype == torch.float32  # too small for codes


def test_a_step_is_that_of_the_decoded_state() -> None:
    """The one invariant: decode, the optimizer's own step, encode."""
    wrapped, reference = model(), model()
    optimizer = compress(torch.optim.AdamW(wrapped.parameters(), lr=1e-2), "int8")
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    codec = CODECS["int8"]
    for seed in range(4):
        train(optimizer, wrapped, 1, seed)
        train(plain, reference, 1, seed)
        for parameter in (reference[0].weight, reference[2].weight):
            for name, role in (("exp_avg", "signed"), ("exp_avg_sq", "second")):
                state = plain.state[parameter]
                parts = codec.encode(state[name], role, 64)  # type: ignore[arg-type]
                state[name].copy_(codec.decode(parts, role, 64, parameter.shape))  # type: ignore[arg-type]
    assert weights(wrapped) == weights(reference)


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "SGD", "RMSprop", "ASGD"])
def test_saved_and_loaded_it_goes_on_bit_for_bit(name: str) -> None:
    trained = model()
    optimizer = compress(ELEMENTWISE[name](trained.parameters()))
    train(optimizer, trained, 3)
    buffer = io.BytesIO()
    torch.save([trained.state_dict(), optimizer.state_dict()], buffer)
    train(optimizer, trained, 3, seed=1)

    buffer.seek(0)
    again = model()
    fresh = compress(ELEMENTWISE[name](again.parameters()))
    saved = torch.load(buffer, weights_only=True)
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    train(fresh, again, 3, seed=1)
    assert weights(trained) == weights(again)


def test_bf16_states_keep_their_dtype_and_scales_theirs() -> None:
    trained = model(torch.bfloat16)
    optimizer = compress(torch.optim.AdamW(trained.parameters()), "int8")
    train(optimizer, trained, 2)
    saved = optimizer.state_dict()
    again = model(torch.bfloat16)
    again.load_state_dict(trained.state_dict())
    fresh = compress(torch.optim.AdamW(again.parameters()), "int8")
    fresh.load_state_dict(saved)
    assert fresh.state[again[0].weight]["exp_avg.scales"].dtype == torch.float32
    train(optimizer, trained, 2, seed=1)
    train(fresh, again, 2, seed=1)
    bits = [[p.detach().view(torch.int16) for p in m.parameters()] for m in (trained, again)]
    assert all(torch.equal(one, other) for one, other in zip(*bits, strict=True))


def test_state_from_before_is_encoded_and_uncompressed_state_is_loaded() -> None:
    trained = model()
    plain = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    train(plain, trained, 3)
    saved = plain.state_dict()
    codes = CODECS["int8"].encode(plain.state[trained[0].weight]["exp_avg"], "signed", 64).codes
    optimizer = compress(plain)
    assert torch.equal(optimizer.state[trained[0].weight]["exp_avg.codes"], codes)
    fresh = compress(torch.optim.AdamW(trained.parameters()))
    fresh.load_state_dict(saved)
    train(fresh, trained, 1)
    assert "exp_avg.codes" in fresh.state[trained[0].weight]
    assert fresh.param_groups[0]["lr"] == 1e-2
    assert float(fresh.state[trained[0].weight]["step"]) == 4


class Counting(torch.optim.Optimizer):
    """Counts steps in its groups and in itself, as many optimizers outside of torch do."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-2, "step": 0, "rate": torch.tensor(1.0)})
        self.calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            group["step"] += 1
            group["rate"].mul_(0.5)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault("exp_avg", torch.zeros_like(parameter))
                    state["exp_avg"].lerp_(parameter.grad, 0.1)
                    factor = group["lr"] * float(group["rate"]) / group["step"]
                    parameter.data.sub_(state["exp_avg"] * factor)


@pytest.mark.parametrize("at_a_time", ["parameter", "group", None])
def test_numbers_in_groups_change_once_a_step(at_a_time: Any) -> None:
    alone, wrapped = model(), model()
    train(Counting(alone.parameters()), alone, 3)
    optimizer = compress(Counting(wrapped.parameters()), "fp32", at_a_time=at_a_time)
    train(optimizer, wrapped, 3)
    assert weights(alone) == weights(wrapped)
    assert optimizer.param_groups[0]["step"] == 3
    assert float(optimizer.param_groups[0]["rate"]) == 0.125
    assert optimizer.engine.calls == 3  # type: ignore[attr-defined]


def test_schedulers_scalers_hooks_closures_and_groups() -> None:
    trained = model()
    optimizer = compress(torch.optim.AdamW(trained[0].parameters(), lr=1.0))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.add_param_group({"params": list(trained[2].parameters()), "lr": 3.0})
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    before = weights(trained)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(trained(torch.ones(2, 96)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weights(trained) == before
    assert calls == []
    optimizer.zero_grad()

    def closure() -> float:
        loss = trained(torch.ones(2, 96)).square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > 0
    assert weights(trained) != before
    schedule.step()
    assert (optimizer.param_groups[0]["lr"], calls) == (0.5, ["before"])
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_a_group_that_is_refused_is_not_there() -> None:
    trained = model()
    optimizer = compress(torch.optim.AdamW(trained[0].parameters()))
    with pytest.raises(InvalidConfiguration):
        optimizer.add_param_group({"params": trained[2].parameters(), "block": 7})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": trained[2].parameters()})
    train(optimizer, trained, 1)


def test_groups_may_have_codecs_of_their_own() -> None:
    trained = model()
    groups = [
        {"params": [trained[0].weight], "codec": "4bit", "block": 32},
        {"params": [trained[2].weight]},
    ]
    optimizer = compress(torch.optim.AdamW(groups), "dynamic")
    train(optimizer, trained, 1)
    assert optimizer.state[trained[0].weight]["exp_avg.codes"].shape == (128, 48)
    assert optimizer.state[trained[0].weight]["exp_avg.scales"].shape == (128, 3)
    assert optimizer.state[trained[2].weight]["exp_avg.codes"].dtype == torch.uint8


class Unknown(torch.optim.Optimizer):
    """Has state of a given kind."""

    def __init__(self, parameters: Iterable[nn.Parameter], make: Callable[[Any], Any]) -> None:
        super().__init__(parameters, {"lr": 1e-2})
        self._make = make

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("thing", self._make(parameter))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: [torch.zeros_like(p)], "'thing' is a list"),
        (lambda p: object(), "'thing' is a object"),
        (lambda p: {"a": 1}, "'thing' is a dict"),
    ],
)
def test_objects_in_state_are_refused_before_anything_is_changed(make: Any, reason: str) -> None:
    trained = model()
    before = weights(trained)
    with pytest.raises(NotCompressible, match=reason):
        compress(Unknown(trained.parameters(), make))
    assert weights(trained) == before


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: p.detach().sum(-1), "its shape is not the parameter's"),
        (lambda p: torch.zeros_like(p), "its name is not known"),
    ],
)
def test_what_stays_as_it_is_is_told(
    make: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained = model()
    with caplog.at_level(logging.WARNING, logger="everstep"):
        optimizer = compress(Unknown([trained[0].weight], make))
        train(optimizer, trained, 2)
    assert reason in optimizer.kept["thing"]
    assert len([r for r in caplog.records if reason in r.getMessage()]) == 1
    assert "thing" in optimizer.state[trained[0].weight]


def test_a_state_of_another_name_is_held_when_its_role_is_said() -> None:
    trained = model()
    kind = Unknown([trained[0].weight], torch.zeros_like)
    optimizer = compress(kind, roles={"thing": "signed"})
    train(optimizer, trained, 1)
    assert "thing.codes" in optimizer.state[trained[0].weight]


class Global(Unknown):
    def step(self, closure: Any = None) -> None:
        self.state["total"] = 1  # type: ignore[index]


def _hooked(parameters: Any) -> torch.optim.Optimizer:
    made = torch.optim.AdamW(parameters)
    made.register_step_post_hook(lambda *_: None)
    return made


def _scheduled(parameters: Any) -> torch.optim.Optimizer:
    made = torch.optim.AdamW(parameters)
    torch.optim.lr_scheduler.StepLR(made, 1)
    return made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (torch.optim.LBFGS, "lists of past steps"),
        (adamw(differentiable=True), "differentiable"),
        (_hooked, "step hooks"),
        (_scheduled, "scheduler"),
        (lambda p: method_named("AdamW")(p), "holds codes already"),
        (lambda p: compress(torch.optim.AdamW(p)), "holds codes already"),
        (lambda p: Global(p, torch.zeros_like), "belongs to no parameter"),
    ],
)
def test_what_cannot_be_held_is_refused_with_the_reason(make: Make, reason: str) -> None:
    with pytest.raises(NotCompressible, match=reason):
        compress(make(model().parameters()))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"codec": "int9"}, "'int9'"),
        ({"block": 48}, "block: 48"),
        ({"roles": {"exp_avg": "big"}}, "'big'"),
        ({"at_a_time": "all"}, "'all'"),
    ],
)
def test_wrong_arguments_are_named(options: Any, field: str) -> None:
    with pytest.raises(InvalidConfiguration, match=field):
        compress(torch.optim.AdamW(model().parameters()), **options)


class Watching(torch.optim.AdamW):
    strides: tuple[int, ...] = ()

    def step(self, closure: Any = None) -> Any:
        for parameter, state in self.state.items():
            if parameter.dim() == 4:
                Watching.strides = state["exp_avg"].stride()
        return super().step(closure)


def test_strides_of_states_are_those_of_the_parameter() -> None:
    """Fused kernels want it: a convolution in channels_last."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
    optimizer: Compressed = compress(Watching(layer.parameters(), fused=True))
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(2, 16, 8, 8)).square().sum().backward()
        optimizer.step()
    assert Watching.strides == layer.weight.stride() != torch.empty(32, 16, 3, 3).stride()
    assert optimizer.state[layer.weight]["exp_avg.codes"].shape == layer.weight.shape
