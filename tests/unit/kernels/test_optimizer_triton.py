"""The device code of optimizer steps, in Triton's interpreter, against torch's arithmetic."""

from collections.abc import Iterator

import pytest
import torch

from everstep.kernels import optimizer_triton
from everstep.kernels.optimizer_work import METHODS, Work
from tests.unit.kernels.optimizer_reference import make_work, step

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # numpy says where device code is silent: the code of an infinite block, 1 / 0.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

CODECS = ("fp32", "bf16", "bf16_int8", "int8", "dynamic", "fourbit", "fp8")
SMALL = optimizer_triton.Launch(elements=512, warps=1)


def tensors(work: Work) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("parameter", "correction", "direction"):
        if getattr(work, name) is not None:
            yield name, getattr(work, name)
    for place, state in enumerate(work.states):
        for name in ("codes", "scales", "correction"):
            if getattr(state, name) is not None:
                yield f"{place}.{name}", getattr(state, name)


def assert_same(found: Work, expected: Work) -> None:
    """Bit for bit, but for which NaN it is."""
    for (name, left), (_, right) in zip(tensors(found), tensors(expected), strict=True):
        assert left.dtype == right.dtype, name
        if left.is_floating_point():
            assert torch.equal(left.isnan(), right.isnan()), name
            left, right = left.nan_to_num(7.0), right.nan_to_num(7.0)
        size = {1: torch.int8, 2: torch.int16, 4: torch.int32}[left.element_size()]
        different = (left.view(size).flatten() != right.view(size).flatten()).nonzero()
        assert not len(different), (name, different[:5], len(different))


def check(works: list[Work], method: str, **scalars: float) -> None:
    expected = [step(work, method, **scalars) for work in works]
    run(works, method, **scalars)
    for work, other in zip(works, expected, strict=True):
        assert_same(work, other)


def run(works: list[Work], method: str, grad_scale: float | None = None) -> None:
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    optimizer_triton.Table(works, method, SMALL).step(scale, None)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    check([make_work(method, "fp32"), make_work(method, "int8", (2, 256))], method, grad_scale=0.37)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(2, 256), (3, 300), (5, 129), (1, 4096 + 17)], ids=str)
def test_every_codec(codec: str, shape: tuple[int, int]) -> None:
    check([make_work("adam", codec, shape)], "adam")
