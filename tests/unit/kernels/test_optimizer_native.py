"""The native optimizer step against the reference in torch: the same bits, whatever code runs."""

import copy
import itertools
import struct
from collections.abc import Iterator, Sequence

import pytest
import torch

from everstep.client.optim import methods, reference
from everstep.client.optim.codecs import CODECS
from everstep.kernels import native, optimizer_native, optimizer_tables
from everstep.kernels.optimizer_work import METHODS, CodedState, Work

assert methods.METHODS  # importing them enters their arithmetic in the reference

ISAS = range(1, native.best_isa() + 1)
BLOCKS = {"int8": 64, "dynamic": 256, "fourbit": 128, "fp8": 128}
PLAIN = ("fp32", "bf16", "bf16_int8")
KINDS = (*PLAIN, *BLOCKS)
SECOND = ("v", "h")
DIRECTED = ("adam_direction", "momentum_direction", "apply")
EDGES = ((1, 1), (1, 15), (1, 16), (1, 17), (3, 63), (1, 64), (2, 65), (1, 511), (1, 512))
SHAPES = (*EDGES, (1, 513), (1, 1000), (3, 129), (2, 256), (1, 0))
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALARS = {
    "step_size": 0.01, "decay": 0.999, "l2": 0.01, "b1": 0.9, "c1": 0.1, "b2": 0.99, "c2": 0.01,
    "root": 1.7, "eps": 1e-8, "momentum": 0.9, "x": 0.5, "y": 0.9, "b3": 0.9999, "c3": 0.0001,
    "inverse1": 3.0, "inverse2": 2.5, "alpha": 5.0, "b1t": 0.7, "b2t": 0.97, "rho": 0.04,
    "theta": 50.0,
}  # fmt: skip


def coded(kind: str, name: str, values: torch.Tensor, block: int | None = None) -> CodedState:
    """A state that stands for fp32 [rows, row]; `kind` is a codec without its role."""
    full = kind if kind in PLAIN else kind + ("_second" if name in SECOND else "_signed")
    codec, role = next(
        (codec, role)
        for codec in CODECS.values()
        for role, known in codec.kernel_names.items()
        if known == full
    )
    block = BLOCKS.get(kind, 0) if block is None else block
    parts = codec.encode(values, role, block)
    return CodedState(full, block, parts.codes, parts.scales, parts.correction)


def make(
    method: str,
    kind: str,
    shape: tuple[int, int] = (3, 300),
    *,
    types: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    corrected: bool = False,
    seed: int = 0,
    block: int | None = None,
    **scalars: float,
) -> Work:
    """A work with random tensors whose magnitudes span many octaves."""
    generator = torch.Generator().manual_seed(shape[1])

    def noise(size: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) * size
        return values * torch.exp(3 * torch.randn(shape, generator=generator))

    known = METHODS[method]
    states = [
        coded(kind, name, noise(0.1).square() if name in SECOND else noise(0.1), block)
        for name in known.states
    ]
    lacking = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    numbers = SCALARS | scalars
    return Work(
        rows=shape[0],
        row=shape[1],
        parameter=noise().to(types[0]),
        gradient=None if method == "apply" else noise().to(types[1]),
        states=tuple(states),
        scalars=tuple(optimizer_tables.single(numbers[name]) for name in known.scalars),
        correction=lacking if corrected else None,
        direction=noise() if method in DIRECTED else None,
        seed=seed,
    )


def tensors(work: Work) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("parameter", "correction", "direction"):
        if getattr(work, name) is not None:
            yield name, getattr(work, name)
    for place, state in enumerate(work.states):
        for name in ("codes", "scales", "correction"):
            if getattr(state, name) is not None:
                yield f"{place}.{name}", getattr(state, name)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers; NaNs are alike, since which one it is depends on the order of operands."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(size)


def assert_same(found: Work, expected: Work, where: object = "") -> None:
    for (name, left), (_, right) in zip(tensors(found), tensors(expected), strict=True):
        different = (bits(left) != bits(right)).flatten().nonzero().flatten()
        assert not len(different), (where, name, different[:5].tolist(), len(different))


def run(
    works: Sequence[Work],
    method: str,
    isa: int = 0,
    grad_scale: float | None = None,
    ranges: Sequence[int] | None = None,
) -> None:
    table = optimizer_native.Table(works, method)
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    address = 0 if scale is None else scale.data_ptr()
    cuts = [0, table.chunk_count] if ranges is None else ranges
    for first, end in itertools.pairwise(cuts):
        table.step(address, 0, first, end - first, isa)


def check(works: Sequence[Work], method: str, grad_scale: float = 0.37) -> None:
    """Every instruction set's step is the reference's."""
    expected = copy.deepcopy(list(works))
    reference.Table(expected, method).step(torch.tensor(grad_scale))
    for isa in ISAS:
        found = copy.deepcopy(list(works))
        run(found, method, isa, grad_scale)
        for left, right in zip(found, expected, strict=True):
            assert_same(left, right, (isa, left.rows, left.row))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_every_codec(method: str, kind: str) -> None:
    check([make(method, kind, shape) for shape in SHAPES], method)


@pytest.mark.parametrize("types", list(itertools.product(TYPES, TYPES)), ids=str)
@pytest.mark.parametrize("kind", ["fp32", "int8", "fourbit"])
def test_every_type(kind: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    check([make("adam", kind, shape, types=types) for shape in SHAPES], "adam")


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_bf16_parameters_with_their_correction(kind: str) -> None:
    types = (torch.bfloat16, torch.bfloat16)
    check([make("lion", kind, shape, types=types, corrected=True) for shape in SHAPES], "lion")


@pytest.mark.parametrize("seed", [1, 0xFFFFFFFF, 0x1234567890ABCDEF, 2**64 - 1])
def test_stochastic_rounding(seed: int) -> None:
    types = (torch.bfloat16, torch.float32)
    check([make("adam", "int8", shape, types=types, seed=seed) for shape in SHAPES], "adam")


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_size_of_block(kind: str, block: int) -> None:
    shapes = ((3, 300), (2, 512), (1, 1041))
    check([make("adam", kind, shape, block=block) for shape in shapes], "adam")


STRANGE = (torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38, 0.0, -0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_strange_numbers(method: str, kind: str) -> None:
    """Each alone in its block, and blocks of nothing else."""
    work = make(method, kind, (2 * len(STRANGE), 300))
    for row, number in enumerate(2 * STRANGE):
        part = slice(140, 141) if row < len(STRANGE) else slice(0, 256)
        for tensor in (work.gradient, work.direction, work.parameter):
            if tensor is not None:
                tensor[row, part].fill_(number)
    check([work], method, 1.0)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_tiny_numbers(kind: str) -> None:
    for size in (2.0**-149, 2.0**-130, 2.0**-126, 2.0**-124, 2.0**-120, 2.0**-119, 2.0**127):
        works = []
        for method in ("adam", "momentum_direction"):
            work = make(method, kind, (1, 512), l2=0.0, b1=0.0, c1=1.0, b2=0.0, c2=1.0)
            work.gradient = torch.randn(1, 512).clamp(-1, 1) * (
                size**0.5 if method == "adam" else size
            )
            work.gradient[:, ::5] = 0  # a scale that overflows makes NaN of zero alone
            works.append((method, work))
        for method, work in works:
            check([work], method, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_read_as_the_reference_reads_it(kind: str) -> None:
    for method in ("adam", "lion", "sophia"):
        work = make(method, kind, (1, 512))
        for state in work.states:
            pattern = torch.arange(state.codes.numel() * state.codes.element_size()) % 256
            if kind in BLOCKS:
                state.codes.view(-1).view(torch.uint8).copy_(pattern)
        check([work], method)


@pytest.mark.parametrize("kind", KINDS)
def test_no_byte_beside_a_tensor_is_touched_and_addresses_need_no_alignment(kind: str) -> None:
    work = make("adam", kind, (3, 201), types=(torch.bfloat16, torch.float16), corrected=True)
    expected = copy.deepcopy(work)
    reference.Table([expected], "adam").step()
    fences = []

    def fenced(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        around = torch.full((tensor.numel() + 130,), 77).to(tensor.dtype)
        inside = around[65:-65].view(tensor.shape).copy_(tensor)
        fences.append((around[:65], around[-65:]))
        return inside

    for isa in ISAS:
        found = copy.deepcopy(work)
        for name in ("parameter", "gradient", "correction"):
            setattr(found, name, fenced(getattr(found, name)))
        for state in found.states:
            for name in ("codes", "scales", "correction"):
                setattr(state, name, fenced(getattr(state, name)))
        run([found], "adam", isa)
        assert_same(found, expected, isa)
        assert all((fence == 77).all() for pair in fences for fence in pair)


def test_any_split_gives_the_same_bits() -> None:
    shapes = ((3, 1100), (1, 700), (1, 0), (40, 20), (2, 512))
    kinds = ("int8", "fourbit", "fp8", "fp32", "bf16_int8")
    works = [make("adam", kind, shape) for kind, shape in itertools.product(kinds, shapes)]
    whole = copy.deepcopy(works)
    run(whole, "adam")
    count = optimizer_native.Table(works, "adam").chunk_count
    generator = torch.Generator().manual_seed(3)
    for parts in (2, 5, count):
        cuts = torch.randint(0, count + 1, (parts - 1,), generator=generator).tolist()
        split = copy.deepcopy(works)
        run(split, "adam", ranges=[0, *sorted(cuts), count])
        for left, right in zip(split, whole, strict=True):
            assert_same(left, right, cuts)


def test_steps_follow_each_other_bit_for_bit() -> None:
    for kind in KINDS:
        work = make("adam", kind, (5, 333))
        expected = copy.deepcopy(work)
        table, other = optimizer_native.Table([work], "adam"), reference.Table([expected], "adam")
        for step in range(5):
            work.gradient = torch.randn(5, 333, generator=torch.Generator().manual_seed(step))
            work.scalars = (0.01 / 2**step, *work.scalars[1:])
            expected.gradient, expected.scalars = work.gradient, work.scalars
            table.refresh([work])
            table.step(0, 0, 0, table.chunk_count)
            other.step()
            assert_same(work, expected, (kind, step))


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_written_if_an_infinity_was_found(isa: int) -> None:
    work = make("adam", "int8")
    before = copy.deepcopy(work)
    table = optimizer_native.Table([work], "adam")
    for flag, same in ((1.0, True), (torch.nan, True), (0.0, False)):
        found = torch.tensor(flag)
        table.step(0, found.data_ptr(), 0, table.chunk_count, isa)
        assert torch.equal(work.parameter, before.parameter) is same


def test_denormals_are_kept_though_the_caller_flushes_them() -> None:
    work = make("momentum_direction", "fp32", (1, 64), b1=0.0, c1=1.0)
    work.gradient.fill_(1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        run([work], "momentum_direction")
        assert float(torch.tensor(1e-40) * 1) == 0, "the caller's mode was changed"
    finally:
        torch.set_flush_denormal(False)
    assert (work.states[0].codes == torch.tensor(1e-40)).all()


def philox(index: int, seed: int) -> int:
    """The first word of Philox4x32-10, as its paper has it."""
    counter, key = [index, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return counter[0]


def test_random_numbers_are_those_of_philox_by_the_element_s_place() -> None:
    assert philox(0, 0) == 0x6627E8D5  # Random123's known answer
    work = make("apply", "fp32", (3, 700), types=(torch.bfloat16,) * 2, seed=0xABCDEF0123456789)
    work.direction.normal_()
    work.scalars = (0.25, 1.0)
    exact = work.parameter.float() - 0.25 * work.direction
    run([work], "apply")
    for index, (value, found) in enumerate(
        zip(exact.flatten().tolist(), work.parameter.flatten().float().tolist(), strict=True)
    ):
        (raw,) = struct.unpack("<I", struct.pack("<f", value))
        raised = raw + (philox(index, work.seed) & 0xFFFF) & 0xFFFF0000
        assert struct.pack("<I", raised) == struct.pack("<f", found), index


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("works[0].parameter", {"parameter": torch.zeros(3, 299)}),
        ("works[0].parameter", {"parameter": torch.zeros(3, 300, dtype=torch.float64)}),
        ("works[0].parameter", {"parameter": torch.zeros(300, 3).T}),
        ("works[0].parameter", {"parameter": torch.zeros(3, 300, device="meta")}),
        ("works[0].parameter", {"correction": torch.zeros(3, 300, dtype=torch.int8)}),
        ("works[0].gradient", {"gradient": None}),
        ("works[0].gradient", {"gradient": torch.zeros(3, 300, dtype=torch.int32)}),
        ("works[0].correction", {"correction": torch.zeros(3, 300)}),
        ("works[0].states", {"states": ()}),
        ("works[0].scalars", {"scalars": (1.0,)}),
        ("works[0].seed", {"seed": -1}),
        ("works[0].seed", {"seed": 2**64}),
        ("works[0].rows", {"rows": -3}),
    ],
)
def test_what_does_not_fit_is_refused(field: str, change: dict[str, object]) -> None:
    work = make("adam", "int8")
    for name, value in change.items():
        setattr(work, name, value)
    with pytest.raises(ValueError, match=field.replace("[", r"\[")):
        optimizer_native.Table([work], "adam")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("codec", {"codec": "int7"}),
        ("block", {"block": 48}),
        ("block", {"block": 8}),
        ("block", {"block": 1024}),
        ("codes", {"codes": torch.zeros(3, 300, dtype=torch.uint8)}),
        ("codes", {"codes": torch.zeros(3, 301, dtype=torch.int8)}),
        ("scales", {"scales": None}),
        ("scales", {"scales": torch.zeros(3, 4)}),
        ("scales", {"scales": torch.zeros(3, 5, dtype=torch.bfloat16)}),
    ],
)
def test_a_state_that_does_not_fit_is_refused(field: str, change: dict[str, object]) -> None:
    work = make("lion", "int8")
    for name, value in change.items():
        setattr(work.states[0], name, value)
    with pytest.raises(ValueError, match=rf"works\[0\]\.states\[0\]\.{field}"):
        optimizer_native.Table([work], "lion")


def test_a_method_or_range_that_is_not_there_is_refused() -> None:
    work = make("adam", "fp32")
    with pytest.raises(ValueError, match=r"method: .adamw."):
        optimizer_native.Table([work], "adamw")
    table = optimizer_native.Table([work], "adam")
    for first, count in ((-1, 1), (0, -1), (0, table.chunk_count + 1), (table.chunk_count, 1)):
        with pytest.raises(ValueError, match="chunks"):
            table.step(0, 0, first, count)


def test_a_refresh_takes_other_addresses_and_refuses_other_gradients() -> None:
    work, other = make("adam", "int8"), make("adam", "int8")
    expected = copy.deepcopy(other)
    reference.Table([expected], "adam").step()
    table = optimizer_native.Table([work], "adam")
    table.refresh([other])
    table.step(0, 0, 0, table.chunk_count)
    assert_same(other, expected)
    for gradient in (None, torch.zeros(3, 299), torch.zeros(300, 3).T, torch.zeros(3, 300).long()):
        other.gradient = gradient
        with pytest.raises(ValueError, match=r"works\[0\]\.gradient"):
            table.refresh([other])
    with pytest.raises(ValueError, match="works: 2"):
        table.refresh([work, work])


def test_a_table_of_nothing_has_no_chunks() -> None:
    table = optimizer_native.Table([], "adam")
    table.refresh([])
    table.step(0, 0, 0, 0)
    assert table.chunk_count == 0
