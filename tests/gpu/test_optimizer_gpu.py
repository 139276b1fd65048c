"""Optimizer steps compiled for a GPU, against the torch reference on the same device."""

import copy

import pytest
import torch

from everstep.kernels import optimizer_triton
from everstep.kernels.optimizer_kinds_triton import Launch
from everstep.kernels.optimizer_triton import Table
from everstep.kernels.optimizer_work import METHODS
from tests.unit.kernels.device_works import KINDS, assert_same, check, make_work

# Warnings of whatever torch the machine with the device has are not ours to judge.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(64, 1024), (33, 260), (5, 129), (1, 70_001), (300, 16), (7, 96)]


@pytest.fixture(autouse=True)
def _on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.mark.parametrize("kind", KINDS)
def test_every_codec(kind: str) -> None:
    works = [
        make_work("adam", kind, shape, draw=place, device="cuda")
        for place, shape in enumerate(SHAPES)
    ]
    works[0].gradient[3] = 0
    works[0].gradient[5, 7] = torch.inf
    works[1].gradient[2, 259] = torch.nan
    works[2].gradient[:] = 1e-40
    works[4].gradient[:100] = 1e30
    check(works, "adam", grad_scale=0.37, steps=5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    works = [make_work(method, "int8", shape, device="cuda") for shape in ((16, 512), (9, 75))]
    check([*works, make_work(method, "fp32", (8, 33), device="cuda")], method, steps=3)


@pytest.mark.parametrize("parameter", [FP32, FP16, BF16])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("seed", [0, 0xFEDC_BA98_7654_3210])
def test_every_type(parameter: torch.dtype, corrected: bool, seed: int) -> None:
    if parameter != BF16 and (corrected or seed):
        pytest.skip("of bf16 parameters alone")
    options = {"parameter": parameter, "gradient": parameter, "device": "cuda"}
    works = [
        make_work("adam", "int8", shape, corrected=corrected, seed=seed, **options)
        for shape in ((16, 512), (9, 75))
    ]
    check(works, "adam", steps=3)


@pytest.mark.parametrize("launch", [Launch(512, 4, 4), Launch(4096, 8), Launch(256, 1)], ids=str)
@pytest.mark.parametrize("kind", ["int8", "fourbit", "fp8"])
def test_bits_do_not_depend_on_the_launch(kind: str, launch: Launch) -> None:
    check([make_work("adam", kind, (65, 1024), device="cuda")], "adam", launch=launch)


def test_fp8_is_exact_near_every_step() -> None:
    """Values whose codes change with the last bits: the margins of the near computation."""
    work = make_work("adam", "fp8", (256, 4096), device="cuda", draw=3)
    for number in range(8):
        steps = torch.arange(4096, device="cuda") * (0.1 + number / 16)
        values = torch.exp2(-steps / 256) * (1 + torch.randn(256, 4096, device="cuda") * 1e-7)
        work.gradient.copy_(values * 2.0 ** (number * 30 - 120))
        for state in work.states:
            state.codes.zero_()
            state.scales.zero_()
        check([work], "adam", steps=2)


def test_a_step_waits_for_nothing_and_compiles_once() -> None:
    works = [make_work("adam", "int8", device="cuda") for _ in range(3)]
    table = Table(works, "adam")
    table.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            for work in works:
                work.gradient = work.gradient.clone()
                work.scalars = (work.scalars[0] * 0.5, *work.scalars[1:])
            table.refresh(works)
            table.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_steps_follow_each_other_with_what_each_was_given() -> None:
    """Pinned tables of later steps do not overtake: many steps are queued before the first runs."""
    work = make_work("adam", "int8", (512, 4096), device="cuda")
    expected = copy.deepcopy(work)
    table, slow = Table([work], "adam"), Table([expected], "adam")
    sizes = [0.01 * number for number in range(1, 30)]
    torch.cuda._sleep(200_000_000)
    for size in sizes:
        work.scalars = (size, *work.scalars[1:])
        table.refresh([work])
        table.step()
    for size in sizes:
        torch.cuda.synchronize()
        expected.scalars = (size, *expected.scalars[1:])
        slow.refresh([expected])
        slow.step()
    torch.cuda.synchronize()
    assert_same(work, expected)


def test_nothing_is_written_where_an_infinity_was_found() -> None:
    work = make_work("adam", "fourbit", (33, 260), device="cuda")
    before = copy.deepcopy(work)
    optimizer_triton.Table([work], "adam").step(None, torch.ones((), device="cuda"))
    assert_same(work, before)
