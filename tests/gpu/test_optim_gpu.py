"""Optimizers on a GPU: the bits of a CPU, and no wait for the device."""

from typing import Any

import pytest
import torch

from everstep.client import optim

# Warnings of whatever torch the machine with the device has are not ours to judge.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
SHAPES = [(65, 127), (5000,), (3,), (), (17, 4, 5, 16), (513, 17)]
METHODS = ["AdamW", "Adam", "Lion", "SGD", "AdEMAMix", "EXAdam", "Sophia", "SPAM"]
CODECS = ["fp32", "bf16", "bf16+8", "int8", "dynamic", "4bit", "fp8"]


def trained(method: str, device: str, dtype: torch.dtype, **options: Any) -> list[bytes]:
    generator = torch.Generator().manual_seed(3)
    held = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in SHAPES
    ]
    optimizer = optim.METHODS[method](held, lr=1e-2, **options)
    for step in range(5):
        for parameter in held:
            gradient = torch.randn(parameter.shape, generator=generator) * 10 ** (step % 4 - 2)
            parameter.grad = gradient.to(device, dtype)
        if isinstance(optimizer, optim.Sophia) and step % 2 == 0:
            optimizer.update_hessian()
        optimizer.step()
    tensors = [t for p in held for t in (p.detach(), *optimizer.state[p].values())]
    return [bytes(t.cpu().contiguous().reshape(-1).view(torch.uint8).tolist()) for t in tensors]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_has_the_bits_of_a_cpu(method: str, codec: str) -> None:
    made = trained(method, "cuda", torch.float32, codec=codec)
    assert made == trained(method, "cpu", torch.float32, codec=codec)


@pytest.mark.parametrize("options", [{"master": "bf16_int8"}, {"stochastic_rounding": True}])
def test_bf16_parameters_have_the_bits_of_a_cpu(options: dict[str, Any]) -> None:
    made = trained("AdamW", "cuda", torch.bfloat16, codec="int8", **options)
    assert made == trained("AdamW", "cpu", torch.bfloat16, codec="int8", **options)


@pytest.mark.parametrize("method", ["AdamP", "SGDSaI", "Muon"])
def test_what_looks_at_whole_tensors_runs(method: str) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 96, device="cuda"))
    optimizer = optim.METHODS[method]([weight], codec="int8")
    before = weight.detach().clone()
    for _ in range(3):
        weight.grad = weight.detach().clone()
        optimizer.step()
    assert bool(weight.isfinite().all())
    assert weight.norm() < before.norm()


def test_a_step_does_not_wait() -> None:
    weight = torch.nn.Parameter(torch.randn(512, 1024, device="cuda"))
    optimizer = optim.AdamW([weight], codec="int8", clip_norm=1.0)
    weight.grad = torch.randn_like(weight)
    optimizer.step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            weight.grad = torch.full_like(weight, 0.5)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_grad_scaler_skips() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 128, device="cuda"))
    optimizer = optim.AdamW([weight], codec="int8")
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    before = weight.detach().clone()
    scaler.scale((weight * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, before)
    optimizer.zero_grad()
    scaler.scale(weight.square().sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(weight, before)
    assert float(optimizer.state[weight]["step"]) == 1
