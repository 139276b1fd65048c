"""The device code of optimizer steps, in Triton's interpreter, against torch's arithmetic."""

import copy

import pytest
import torch

from everstep.client.optim.codecs import CODECS, Parts
from everstep.kernels import optimizer_lookups
from everstep.kernels.optimizer_kinds_triton import Launch, addresses_of, kind_of
from everstep.kernels.optimizer_tables import FP8_RANGE
from everstep.kernels.optimizer_triton import Table
from everstep.kernels.optimizer_work import METHODS, Work
from tests.unit.kernels.device_works import KINDS, assert_same, check, make_work, tensors

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # numpy says where device code is silent: the code of an infinite block, 1 / 0.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SMALL = Launch(elements=512, warps=1)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    works = [make_work(method, "fp32"), make_work(method, "int8", (2, 256))]
    check(works, method, launch=SMALL, grad_scale=0.37)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(2, 256), (3, 300), (5, 129), (1, 1041), (2, 17), (40, 32)], ids=str
)
def test_every_codec_on_whole_and_odd_rows(kind: str, shape: tuple[int, int]) -> None:
    check([make_work("adam", kind, shape)], "adam", launch=SMALL, steps=2)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_infinite_nan_and_denormal_blocks(kind: str) -> None:
    work = make_work("adam", kind, (6, 260))
    l2 = METHODS["adam"].scalars.index("l2")
    work.scalars = (*work.scalars[:l2], 0.0, *work.scalars[l2 + 1 :])
    work.gradient[:] = 0
    for state in work.states:
        for tensor in (state.codes, state.scales, state.correction):
            if tensor is not None:
                tensor.zero_()
    work.gradient[1, 3] = torch.inf
    work.gradient[2, 259] = torch.nan
    work.gradient[3] = torch.linspace(1e-44, 1e-37, 260)
    work.gradient[4] = 1e30
    work.gradient[5, ::2] = 1e-18
    check([work], "adam", launch=SMALL, steps=2)


@pytest.mark.parametrize("method", ["lion", "sophia", "spam"])
def test_a_sign_keeps_a_nan_and_a_zero(method: str) -> None:
    work = make_work(method, "fp32", (2, 64))
    work.gradient[0, :2] = torch.tensor([torch.nan, -torch.nan])
    work.gradient[1], work.parameter[1], work.states[0].codes[1] = 0, -0.0, -0.0
    check([work], method, launch=SMALL)
    assert work.parameter[0, :2].isnan().all()


def test_corrections_of_the_smallest_numbers() -> None:
    work = make_work("adam", "bf16_int8", (1, 512), parameter=BF16, corrected=True)
    exponents = torch.arange(512) / 16 - 133
    values = torch.exp2(exponents) * torch.linspace(1, 1.999, 512)
    work.parameter[0], work.gradient[:] = values.bfloat16(), 0
    work.correction[values[None] < 2.0**-118] = 0
    for state in work.states:
        state.codes.zero_()
        state.correction.zero_()
    check([work], "adam", launch=SMALL)
    assert work.correction[0, -64:].any()


def test_how_much_is_taken_at_once_follows_from_addresses_and_rows() -> None:
    def vector(work: Work) -> int:
        return kind_of(work, "adam", addresses_of(work)).VECTOR

    work = make_work("adam", "fourbit", (3, 300))
    assert vector(work) == 4
    assert vector(make_work("adam", "fourbit", (3, 302))) == 1
    assert vector(make_work("adam", "fp8", (2, 256), parameter=BF16, gradient=BF16)) == 8
    for change in (1, 2, 3):
        wider = torch.empty(900 + change)
        other = copy.copy(work)
        other.gradient = wider[change:].reshape(3, 300)
        assert vector(other) == 1
    state = copy.copy(work.states[0])
    state.codes = torch.empty(451, dtype=torch.uint8)[1:].reshape(3, 150)
    other = copy.copy(work)
    other.states = (state, work.states[1])
    assert vector(other) == 1


@pytest.mark.parametrize("block", [16, 512])
@pytest.mark.parametrize("kind", ["int8", "fourbit", "fp8"])
def test_other_blocks(kind: str, block: int) -> None:
    check([make_work("adam", kind, (2, 600), block=block)], "adam", launch=SMALL)


def test_states_with_different_blocks_and_codecs() -> None:
    work = make_work("adam", "fourbit", (3, 290))
    work.states = (work.states[0], make_work("adam", "int8", (3, 290), draw=2).states[1])
    other = make_work("adam", "fp8", (3, 290))
    other.states = (make_work("adam", "bf16", (3, 290)).states[0], other.states[1])
    check([work, other], "adam", launch=SMALL)


@pytest.mark.parametrize(
    ("parameter", "gradient", "corrected", "seed"),
    [
        (FP16, FP16, False, 0),
        (BF16, FP32, False, 0),
        (BF16, BF16, True, 0),
        (BF16, BF16, False, 1),
        (BF16, BF16, False, 0xFEDC_BA98_7654_3210),
    ],
)
def test_other_types(
    parameter: torch.dtype, gradient: torch.dtype, corrected: bool, seed: int
) -> None:
    options = {"parameter": parameter, "gradient": gradient, "corrected": corrected, "seed": seed}
    works = [make_work("adam", "int8", shape, **options) for shape in ((2, 128), (3, 131))]
    works[0].parameter[0, :3] = torch.tensor([torch.inf, 3e38, -0.0])
    check(works, "adam", launch=SMALL)


@pytest.mark.parametrize("scale", [0.0, 1.0, torch.nan])
def test_nothing_is_written_where_an_infinity_was_found(scale: float) -> None:
    work = make_work("adam", "int8")
    before, written = copy.deepcopy(work), copy.deepcopy(work)
    Table([work], "adam", SMALL).step(None, torch.tensor(scale))
    if scale == 0.0:
        Table([written], "adam", SMALL).step()
        assert_same(work, written)
        assert not torch.equal(work.parameter, before.parameter)
    else:
        assert_same(work, before)


def test_many_tensors_of_all_sorts_are_stepped_together() -> None:
    shapes = [(1, 4096), (7, 64), (2, 192), (3, 65), (1, 16), (30, 17), (2, 1024)]
    works = [make_work("adam", "int8", shape, draw=place) for place, shape in enumerate(shapes)]
    works += [make_work("adam", "fp32", (1, 5)), make_work("adam", "fp32", (64, 64))]
    check(works, "adam", launch=SMALL)


def test_neither_more_nor_less_is_written() -> None:
    for shape in ((3, 300), (4, 256), (5, 129)):
        memory = [torch.full((tensor.numel() + 64,), 77, dtype=tensor.dtype)
                  for _, tensor in tensors(make_work("adam", "fourbit", shape))]  # fmt: skip
        work = inside(make_work("adam", "fourbit", shape), memory)
        check_in_place(work)
        for kept in memory:
            assert (kept[:32] == 77).all()
            assert (kept[-32:] == 77).all()


def inside(work: Work, memory: list[torch.Tensor]) -> Work:
    """The same work, with its tensors in the middle of larger ones."""
    views = []
    for (_, tensor), larger in zip(tensors(work), memory, strict=True):
        view = larger[32:-32].reshape(tensor.shape)
        view.copy_(tensor)
        views.append(view)
    work.parameter = views[0]
    for place, state in enumerate(work.states):
        state.codes, state.scales = views[1 + 2 * place : 3 + 2 * place]
    return work


def check_in_place(work: Work) -> None:
    expected = copy.deepcopy(work)
    Table([expected], "adam", SMALL).step()
    Table([work], "adam", SMALL).step()
    assert_same(work, expected)


def test_addresses_scalars_and_seeds_follow() -> None:
    work = make_work("adam", "int8", parameter=BF16, seed=5)
    table = Table([work], "adam", SMALL)
    moved = make_work("adam", "int8", parameter=BF16, seed=1 << 63 | 6, draw=2)
    moved.scalars = (0.5, *moved.scalars[1:])
    expected = copy.deepcopy(moved)
    table.refresh([moved])
    table.step()
    Table([expected], "adam", SMALL).step()
    assert_same(moved, expected)
    # An address that is less aligned is another launch.
    wider = torch.empty(901, dtype=moved.gradient.dtype)
    wider[1:] = moved.gradient.flatten()
    moved.gradient, expected.gradient = wider[1:].reshape(3, 300), moved.gradient
    table.refresh([moved])
    table.step()
    Table([expected], "adam", SMALL).step()
    assert_same(moved, expected)


@pytest.mark.parametrize("launch", [Launch(1024, 4), Launch(4096, 8), Launch(128, 1, 3)], ids=str)
def test_bits_do_not_depend_on_the_launch(launch: Launch) -> None:
    check([make_work("adam", "fourbit", (5, 384))], "adam", launch=launch)


def test_wrong_arguments_are_refused() -> None:
    work = make_work("adam", "int8")
    with pytest.raises(ValueError, match="'newton'"):
        Table([work], "newton")
    with pytest.raises(ValueError, match="adam with 1 states"):
        Table([make_work("lion", "int8")], "adam")
    table = Table([work], "adam", SMALL)
    with pytest.raises(ValueError, match=r"grad_scale is torch\.float64"):
        table.step(torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"found_inf is torch\.float32 \(2,\)"):
        table.step(None, torch.zeros(2))
    with pytest.raises(ValueError, match="codec 'int7'"):
        work.states[0].codec = "int7"
        Table([work], "adam")
    with pytest.raises(ValueError, match="a block of 48"):
        Table([make_work("adam", "int8", block=48)], "adam")
    with pytest.raises(ValueError, match=r"torch\.float64"):
        Table([make_work("adam", "int8", parameter=torch.float64)], "adam")
    with pytest.raises(ValueError, match="gaps"):
        torn = make_work("adam", "fp32", (4, 300))
        torn.gradient = torn.gradient.repeat(1, 2)[:, ::2]
        Table([torn], "adam")


def test_no_works_are_stepped() -> None:
    Table([], "adam").step()
    Table([make_work("adam", "fp32", (0, 4))], "adam").step()


def test_fp8_values_that_are_looked_up_are_those_that_are_computed() -> None:
    sixteenths = torch.arange(1, 257)
    # Half a sixteenth above the quotient's floor: far from where powers change.
    least = torch.exp2(-FP8_RANGE / (sixteenths + 0.5)).clamp(min=2.0**-126)
    scales = torch.stack([torch.ones(256), least], -1)[1:, None]
    codes = torch.arange(127, dtype=torch.uint8).expand(255, 127).contiguous()
    computed = CODECS["fp8"].decode(Parts(codes, scales), "signed", 128, (255, 127))
    begin = optimizer_lookups.FP8_VALUES + 2 * 128
    rows = optimizer_lookups.table()[begin:].reshape(255, 128)[:, :127]
    assert rows.tobytes() == computed.numpy().tobytes()
