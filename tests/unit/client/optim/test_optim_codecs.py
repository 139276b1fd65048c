"""Codecs: what they keep, what they never lose, and what they do with what is not finite."""

import struct
from itertools import product

import pytest
import torch

from everstep.client.optim.codecs import (
    CODECS,
    Codec,
    Role,
    codec_named,
    left_plain,
    register,
    valid_block,
)
from everstep.client.optim.codecs.codec import root_of
from everstep.client.optim.codecs.corrected import joined, split
from everstep.client.optim.codecs.fp8 import exp2_of, log2_of
from everstep.client.optim.rounding import random_words, seed_of, stochastic
from everstep.proto.errors import InvalidConfiguration

ROLES: tuple[Role, ...] = ("signed", "second")
BLOCKED = ("int8", "dynamic", "4bit", "fp8")
# Mean error over mean magnitude of normal numbers; notes of the papers have the same.
ERRORS = {
    "fp32": (0.0, 0.0),
    "bf16": (0.0018, 0.0018),
    "bf16+8": (2e-5, 2e-5),
    "int8": (0.008, 0.008),
    "dynamic": (0.02, 0.02),
    "4bit": (0.2, 0.32),
    "4bit-rank1": (0.2, 0.32),
    "fp8": (0.03, 0.035),
}


def encoded(name: str, values: torch.Tensor, role: Role) -> torch.Tensor:
    """Through the codec and back."""
    codec = codec_named(name)
    parts = codec.encode(values, role, codec.block)
    for part, form in codec.forms(values.shape, role, codec.block).items():
        tensor = parts.named()[part]
        assert (tuple(tensor.shape), tensor.dtype) == (form.shape, form.dtype)
        assert tensor.is_contiguous()
    assert sum(t.nbytes for t in parts.named().values()) == codec.bytes_of(
        values.shape, role, codec.block
    )
    return codec.decode(parts, role, codec.block, values.shape)


def normal(*shape: int, role: Role = "signed") -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return values * values if role == "second" else values


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", sorted(ERRORS))
@pytest.mark.parametrize("shape", [(5, 700), (3, 4, 65), (1000,), (), (7, 1), (0, 64)])
def test_what_is_lost_is_little(name: str, role: Role, shape: tuple[int, ...]) -> None:
    values = normal(*shape, role=role)
    back = encoded(name, values, role)
    assert back.shape == values.shape
    assert back.dtype == torch.float32
    if values.numel() > 100:
        error = (back - values).abs().sum() / values.abs().sum()
        assert error <= ERRORS[name][role == "second"]


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("role", ROLES)
def test_what_is_encoded_again_does_not_move(name: str, role: Role) -> None:
    values = normal(4, 300, role=role)
    if name in ("dynamic", "4bit"):
        values = values.abs()  # the maps have no -1, so that scales of negative blocks do move
    once = encoded(name, values, role)
    twice = encoded(name, once, role)
    # FP8's power depends on the least magnitude, which has moved.
    assert torch.allclose(once, twice, rtol=0.15 if name == "fp8" else 1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_a_second_moment_is_never_zero_where_it_was_not(name: str) -> None:
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    values = torch.logspace(-18, 0, 512)[order].reshape(2, 256)
    values[0, 5] = 0
    back = encoded(name, values, "second")
    assert bool((back[values > 0] > 0).all())
    if not name.startswith("4bit"):  # whose map has no zero at all
        assert back[0, 5] == 0


@pytest.mark.parametrize("name", sorted(ERRORS))
@pytest.mark.parametrize("role", ROLES)
def test_zeros_stay_zeros(name: str, role: Role) -> None:
    values = torch.zeros(3, 200)
    assert torch.equal(encoded(name, values, role).abs(), values)


@pytest.mark.parametrize("name", sorted(ERRORS))
@pytest.mark.parametrize("role", ROLES)
def test_bytes_of_zero_are_zeros(name: str, role: Role) -> None:
    """The state at the start, and what SPAM resets to."""
    codec = codec_named(name)
    made = codec.encode(normal(3, 200, role=role), role, codec.block)
    for tensor in made.named().values():
        tensor.zero_()
    assert not codec.decode(made, role, codec.block, (3, 200)).count_nonzero()


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(
    name: str, role: Role, bad: float
) -> None:
    block = codec_named(name).block
    values = normal(2, 3 * block, role=role)
    values[1, block + 3] = bad
    back = encoded(name, values, role)
    assert bool(back[1, block : 2 * block].isnan().all())
    assert int(back.isnan().sum()) == block


@pytest.mark.parametrize("name", sorted(ERRORS))
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("size", [1e-45, 1e-41, 2.0**-126, 2.0**-121, 1e-30, 1e30, 3e38])
def test_tiny_and_huge_numbers_stay_finite(name: str, role: Role, size: float) -> None:
    values = torch.full((2, 300), size)
    values[:, ::3] = 0
    back = encoded(name, values, role)
    assert bool(back.isfinite().all())
    if size >= 1e-30:
        lost = 0.1 if name.startswith("4bit") else 0.01
        assert torch.allclose(back[:, 1], values[:, 1], rtol=lost)


def test_negative_numbers_of_fp8_keep_their_sign_and_smallness() -> None:
    values = torch.tensor([[1.0, -1e-6, 1e-6, -1.0, 0.0] * 20])
    back = encoded("fp8", values, "signed")
    assert torch.equal(back.sign(), values.sign())
    assert torch.allclose(back, values, rtol=0.04)


def test_logarithm_and_power_are_near_enough() -> None:
    values = torch.logspace(-37, 0, 4001)
    assert (log2_of(values).double() - values.double().log2()).abs().max() < 1e-5
    powers = -torch.linspace(0, 126, 4001)
    exact = powers.double().exp2()
    assert ((exp2_of(powers).double() - exact) / exact).abs().max() < 6e-6
    assert exp2_of(torch.zeros(1)).item() == 1.0


def test_roots_are_exact() -> None:
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 1e-6
    exact = [struct.unpack("f", struct.pack("f", v**0.5))[0] for v in values.tolist()]
    assert root_of(values).tolist() == exact


def test_a_corrected_number_has_24_bits_less_one() -> None:
    values = normal(5000) * torch.logspace(-30, 30, 5000)
    rounded, correction = split(values)
    error = ((joined(rounded, correction) - values) / values).abs().max()
    assert error < 2.0**-8 / 127
    assert torch.equal(rounded, values.bfloat16())
    # Nothing is lost by going through it again: the master copy does not drift. (The two tensors
    # may change: half a unit above one number is half a unit below the next.)
    once = joined(rounded, correction)
    assert torch.equal(joined(*split(once)), once)


def test_what_cannot_be_corrected_is_not() -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, 1e-40, -0.0])
    rounded, correction = split(values)
    assert not correction.count_nonzero()
    assert torch.equal(joined(rounded, correction).nan_to_num(7), rounded.float().nan_to_num(7))


def test_random_words_are_philox() -> None:
    """Of triton.language.randint(seed, index); see tests of the Triton kernels, too."""
    words = random_words(3, 0, torch.device("cpu"))
    assert words[0].item() == 0x6627E8D5  # the known answer for a counter and a key of zeros
    assert len(set(random_words(1000, seed_of(1, 2, 3), torch.device("cpu")).tolist())) == 1000


def test_stochastic_rounding_is_right_on_average() -> None:
    values = torch.full((200_000,), 1.0 + 2.0**-10)
    rounded = stochastic(values, seed_of(0, 0, 1)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs(rounded.double().mean().item() - values[0].item()) < 3e-5
    exact = torch.tensor([1.0, -2.0, 0.0, float("inf")])
    assert torch.equal(stochastic(exact, 99).float(), exact)
    assert stochastic(torch.tensor([float("nan")]), 99).isnan().item()


def test_seeds_differ() -> None:
    seeds = {seed_of(*numbers) for numbers in product(range(3), range(3), range(3), (0, 8))}
    assert len(seeds) == 54
    assert all(0 < seed < 1 << 64 for seed in seeds)


def test_what_is_unknown_is_refused_by_name_and_value() -> None:
    with pytest.raises(InvalidConfiguration, match="codec: 'int7' is not one of"):
        codec_named("int7")
    with pytest.raises(InvalidConfiguration, match="block: 48 is not a divisor of 512"):
        valid_block(CODECS["int8"], 48)
    with pytest.raises(InvalidConfiguration, match="'int8' is there already"):
        register(CODECS["int8"])


def test_a_codec_is_one_small_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fp16(type(CODECS["bf16"])):  # type: ignore[misc]
        name = "fp16"

    monkeypatch.setattr("everstep.client.optim.codecs.CODECS", {**CODECS})
    register(Fp16())
    assert isinstance(codec_named("fp16"), Codec)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((64, 64), ""),
        ((4096,), ""),
        ((63, 65), "4095 elements"),
        ((1000, 15), "rows of 15"),
        ((), "1 elements"),
        ((8, 16, 64), ""),
    ],
)
def test_small_tensors_are_left_alone(shape: tuple[int, ...], why: str) -> None:
    assert left_plain(CODECS["int8"], shape).startswith(why)
    assert bool(left_plain(CODECS["int8"], shape)) == bool(why)
    assert left_plain(CODECS["fp32"], shape) == ""


def test_blocks_do_not_straddle_rows() -> None:
    """A shard by rows is a slice of codes and scales."""
    for name in BLOCKED:
        codec = CODECS[name]
        values = normal(6, 333)
        whole = codec.encode(values, "signed", codec.block).named()
        part = codec.encode(values[2:5], "signed", codec.block).named()
        for key, tensor in part.items():
            assert torch.equal(tensor, whole[key][2:5])


def test_rank_one_scales_fit_columns_that_stand_out() -> None:
    """Such are in every block, and hide their neighbours there."""
    values = 0.5 + torch.rand(40, 300, generator=torch.Generator().manual_seed(0))
    values[:, ::50] *= 1e4
    errors = {}
    for name in ("4bit", "4bit-rank1"):
        errors[name] = ((encoded(name, values, "second") - values) / values).abs().median().item()
    assert errors["4bit-rank1"] < 0.5 * errors["4bit"]


def test_what_is_not_finite_makes_its_row_and_column_nan_with_rank_one_scales() -> None:
    values = normal(5, 70, role="second")
    values[2, 3] = float("inf")
    nan = encoded("4bit-rank1", values, "second").isnan()
    assert bool(nan[2].all() & nan[:, 3].all())
    assert int(nan.sum()) == 70 + 5 - 1
