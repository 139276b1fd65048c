"""Works with random tensors for the device code, and comparison of what steps make of them.

Used here in Triton's interpreter and by tests/gpu on a device. The other side is the reference of
`client/optim`, which is what users have where there is no kernel.
"""

import copy
from collections.abc import Iterator, Sequence

import torch

from everstep.client.optim import methods, reference
from everstep.client.optim.codecs import CODECS
from everstep.kernels.optimizer_kinds_triton import Launch
from everstep.kernels.optimizer_tables import single
from everstep.kernels.optimizer_triton import Table
from everstep.kernels.optimizer_work import METHODS, CodedState, Work

assert methods.METHODS  # importing them enters their arithmetic in the reference

BLOCKS = {"int8": 64, "dynamic": 256, "fourbit": 128, "fp8": 128}
PLAIN = ("fp32", "bf16", "bf16_int8")
KINDS = (*PLAIN, *BLOCKS)
SECOND = {"v", "h"}

SCALARS = {
    "step_size": 0.01, "decay": 0.999, "l2": 0.01, "b1": 0.9, "c1": 0.1, "b2": 0.99, "c2": 0.01,
    "root": 1.7, "eps": 1e-8, "momentum": 0.9, "x": 0.5, "y": 0.9, "b3": 0.9999, "c3": 0.0001,
    "inverse1": 3.0, "inverse2": 2.5, "alpha": 5.0, "b1t": 0.7, "b2t": 0.97, "rho": 0.04,
    "theta": 50.0,
}  # fmt: skip


def state_of(kind: str, name: str, values: torch.Tensor, block: int | None = None) -> CodedState:
    """A state that stands for fp32 [rows, row]; `kind` is a codec without its role."""
    full = kind if kind in PLAIN else kind + ("_second" if name in SECOND else "_signed")
    block = BLOCKS.get(kind, 0) if block is None else block
    for codec in CODECS.values():
        for role, known in codec.kernel_names.items():
            if known == full:
                parts = codec.encode(values, role, block)
                return CodedState(full, block, parts.codes, parts.scales, parts.correction)
    raise AssertionError(full)


def make_work(
    method: str,
    kind: str,
    shape: tuple[int, int] = (3, 300),
    *,
    parameter: torch.dtype = torch.float32,
    gradient: torch.dtype = torch.float32,
    corrected: bool = False,
    seed: int = 0,
    block: int | None = None,
    draw: int = 1,
    device: str = "cpu",
) -> Work:
    """A work with random tensors, whose magnitudes span many octaves."""
    generator = torch.Generator().manual_seed(draw)

    def noise(size: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) * size
        return (values * torch.exp(3 * torch.randn(shape, generator=generator))).to(device)

    known = METHODS[method]
    states = tuple(
        state_of(kind, name, noise(0.1) ** 2 if name in SECOND else noise(0.1), block)
        for name in known.states
    )
    correction = None
    if corrected:
        correction = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        correction = correction.to(device)
    return Work(
        rows=shape[0],
        row=shape[1],
        parameter=noise().to(parameter),
        gradient=None if method == "apply" else noise().to(gradient),
        states=states,
        scalars=tuple(single(SCALARS[name]) for name in known.scalars),
        correction=correction,
        direction=noise() if method == "apply" or "direction" in method else None,
        seed=seed,
    )


def tensors(work: Work) -> Iterator[tuple[str, torch.Tensor]]:
    """What a step may write."""
    for name in ("parameter", "correction", "direction"):
        if getattr(work, name) is not None:
            yield name, getattr(work, name)
    for place, state in enumerate(work.states):
        for name in ("codes", "scales", "correction"):
            if getattr(state, name) is not None:
                yield f"{name} of state {place}", getattr(state, name)


def assert_same(found: Work, expected: Work) -> None:
    """Bit for bit, but for which NaN it is."""
    for (name, left), (_, right) in zip(tensors(found), tensors(expected), strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        if left.is_floating_point():
            assert torch.equal(left.isnan(), right.isnan()), name
            left, right = left.nan_to_num(7.0), right.nan_to_num(7.0)
        size = {1: torch.int8, 2: torch.int16, 4: torch.int32}[left.element_size()]
        different = (left.view(size).flatten() != right.view(size).flatten()).nonzero().flatten()
        assert not len(different), (name, left.shape, different[:5].tolist(), len(different))


def check(
    works: Sequence[Work],
    method: str,
    *,
    launch: Launch | None = None,
    grad_scale: float | None = None,
    steps: int = 1,
) -> None:
    """Step the works and copies of them, on the device and by the reference."""
    works, expected = list(works), copy.deepcopy(list(works))
    scale = None
    if grad_scale is not None:
        scale = torch.tensor(grad_scale, device=works[0].parameter.device)
    table, other = Table(works, method, launch), reference.Table(expected, method)
    for _ in range(steps):
        table.step(scale)
        other.step(scale)
        for work, wanted in zip(works, expected, strict=True):
            assert_same(work, wanted)
