"""State of bitsandbytes and torchao, with the libraries themselves; skipped without them."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from everstep.client.optim.interchange import export_state_dict, import_state_dict
from everstep.client.optim.methods import method_named

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
SHAPES = ((64, 256), (256, 512), (40, 300), (5000,), (100,))


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def steps(optimizer: torch.optim.Optimizer, held: list[torch.nn.Parameter], count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(count):
            for parameter in held:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()


def peer(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(pytest.importorskip(module), name)


BITSANDBYTES = [
    ("AdamW8bit", "AdamW"),
    ("Lion8bit", "Lion"),
    ("AdEMAMix8bit", "AdEMAMix"),
]


@pytest.mark.parametrize(("theirs", "ours"), BITSANDBYTES)
def test_bitsandbytes_trains_on_here_and_there(theirs: str, ours: str) -> None:
    kind = peer("bitsandbytes.optim", theirs)
    held = parameters()
    original = kind(held, lr=1e-3)
    steps(original, held, 3)
    saved = original.state_dict()

    optimizer = method_named(ours)(parameters(), codec="dynamic")
    account = import_state_dict(optimizer, saved)
    outcomes = {(one.parameter, one.outcome) for one in account.conversions}
    assert outcomes == {
        (0, "same codes"),
        (1, "same codes"),
        (2, "encoded anew"),
        (3, "same codes"),
        (4, "plain"),
    }
    assert "straddle rows of 300" in str(account)
    assert optimizer.param_groups[0]["lr"] == 1e-3

    back, _ = export_state_dict(optimizer, "bitsandbytes")
    for index in (0, 1, 3, 4):
        before = saved["state"][index]["__bnb_optimizer_quant_state__"]
        after = back["state"][index]["__bnb_optimizer_quant_state__"]
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]), (index, key)
    fresh = kind(held, lr=1e-3)
    fresh.load_state_dict(back)
    steps(fresh, held, 2)


@pytest.mark.parametrize(
    ("theirs", "codec", "exact"),
    [("AdamW8bit", "dynamic", True), ("AdamW4bit", "4bit", True), ("AdamWFp8", "fp8", False)],
)
def test_torchao_trains_on_here_and_there(theirs: str, codec: str, exact: bool) -> None:
    kind = peer("torchao.optim", theirs)
    held = parameters()
    original = kind(held, lr=1e-3)
    saved = original.state_dict()
    for parameter in held:
        new = original._new_buffer
        state = original.state[parameter]
        state["step"] = torch.tensor(3.0)
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            state[name] = new(parameter, signed)
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
            state[name].copy_(values if signed else values.square())
    saved = original.state_dict()

    optimizer = method_named("AdamW")(parameters(), codec=codec)
    account = import_state_dict(optimizer, saved)
    same = {one.parameter for one in account.conversions if one.outcome == "same codes"}
    assert same == ({0, 1} if exact else set())
    for parameter, old in zip(optimizer.param_groups[0]["params"], held, strict=True):
        assert float(optimizer.state[parameter]["step"]) == 3.0
        decoded = _decoded(optimizer, parameter)
        theirs_decoded = original.state[old]["exp_avg"]
        if hasattr(theirs_decoded, "dequantize") and hasattr(theirs_decoded, "codes"):
            theirs_decoded = theirs_decoded.dequantize()
        if old.numel() == SHAPES[0][0] * SHAPES[0][1] and exact:
            assert torch.equal(decoded, theirs_decoded)
        largest = theirs_decoded.abs().max()
        assert float((decoded - theirs_decoded).abs().max() / largest) < 0.2

    back, _ = export_state_dict(optimizer, "torchao")
    if exact:
        for index in (0, 1):
            for name in ("exp_avg", "exp_avg_sq"):
                before, after = saved["state"][index][name], back["state"][index][name]
                assert type(before) is type(after)
                assert torch.equal(before.codes, after.codes)
                assert torch.equal(before.scale, after.scale)
    fresh = kind(held, lr=1e-3)
    for group in back["param_groups"]:
        group["lr"] = torch.tensor(group["lr"])
    fresh.load_state_dict(back)


def _decoded(optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    exported, _ = export_state_dict(optimizer, "torch")
    places = {id(p): place for place, p in enumerate(optimizer.param_groups[0]["params"])}
    values: torch.Tensor = exported["state"][places[id(parameter)]]["exp_avg"]
    return values
