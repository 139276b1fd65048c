"""State of other libraries, in formats built by hand: what is the same is taken as it is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from everstep.client.optim.codecs import CODECS
from everstep.client.optim.interchange import export_state_dict, import_state_dict
from everstep.client.optim.interchange.account import ANEW, PLAIN, SAME
from everstep.client.optim.methods import method_named
from everstep.kernels.optimizer_tables import DYNAMIC_SECOND, DYNAMIC_SIGNED, FOURBIT_SIGNED
from everstep.proto.errors import InvalidConfiguration

SIGNED, SECOND = torch.tensor(DYNAMIC_SIGNED), torch.tensor(DYNAMIC_SECOND)
NESTED = "__bnb_optimizer_quant_state__"


def optimizer_of(
    shapes: list[tuple[int, ...]], method: str = "AdamW", **options: Any
) -> torch.optim.Optimizer:
    return method_named(method)([torch.nn.Parameter(torch.zeros(s)) for s in shapes], **options)


def random_codes(count: int, most: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(most, (count,), generator=generator).to(torch.uint8)


def eight_bit(shape: tuple[int, ...], step: int = 3, nested: bool = True) -> dict[str, Any]:
    """As bitsandbytes has it after its own step."""
    count = torch.Size(shape).numel()
    blocks = -(-count // 256)
    tensors = {
        "state1": random_codes(count).reshape(shape),
        "qmap1": SIGNED,
        "absmax1": torch.rand(blocks, generator=torch.Generator().manual_seed(2)),
        "state2": random_codes(count, seed=1).reshape(shape),
        "qmap2": SECOND,
        "absmax2": torch.rand(blocks, generator=torch.Generator().manual_seed(3)),
    }
    return {"step": step, NESTED: tensors} if nested else {"step": step, **tensors}


def state_dict(*entries: Any, **options: Any) -> dict[str, Any]:
    groups = [{"lr": 0.01, **options, "params": list(range(len(entries)))}]
    return {"state": dict(enumerate(entries)), "param_groups": groups}


def decoded(codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, block: int) -> Any:
    flat = table[codes.reshape(-1).long()]
    return (flat * scales.repeat_interleave(block)[: len(flat)]).reshape(codes.shape)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(16, 512), (8, 4, 256), (5000,)])
def test_codes_of_bitsandbytes_are_taken_as_they_are(shape: tuple[int, ...], nested: bool) -> None:
    entry = eight_bit(shape, nested=nested)
    optimizer = optimizer_of([shape], codec="dynamic")
    account = import_state_dict(optimizer, state_dict(entry, betas=(0.8, 0.9), eps=1e-6))
    assert [one.outcome for one in account.conversions] == [SAME, SAME]
    assert account.is_lossless
    (state,) = optimizer.state.values()
    tensors = entry.get(NESTED, entry)
    assert torch.equal(state["exp_avg.codes"], tensors["state1"])
    assert torch.equal(state["exp_avg_sq.codes"], tensors["state2"])
    assert torch.equal(state["exp_avg.scales"].flatten(), tensors["absmax1"])
    assert float(state["step"]) == 3
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.9), 1e-6)

    values = export_state_dict(optimizer, "torch")[0]["state"][0]["exp_avg"]
    assert torch.equal(values, decoded(tensors["state1"], tensors["absmax1"], SIGNED, 256))

    back, told = export_state_dict(optimizer, "bitsandbytes")
    assert told.is_lossless
    assert back["state"][0]["step"] == 3
    written = back["state"][0][NESTED]
    for name, tensor in tensors.items():
        if name != "step":
            assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize(
    ("shape", "codec", "reason"),
    [
        ((20, 300), "dynamic", "blocks of 256 straddle rows of 300"),
        ((16, 512), "int8", "other codes than int8's"),
        ((16, 512), "4bit", "other codes than 4bit's"),
    ],
)
def test_what_is_encoded_anew_is_told_and_near(
    shape: tuple[int, ...], codec: str, reason: str
) -> None:
    entry = eight_bit(shape)
    optimizer = optimizer_of([shape], codec=codec)
    account = import_state_dict(optimizer, state_dict(entry))
    assert {(one.outcome, one.reason) for one in account.conversions} == {(ANEW, reason)}
    assert not account.is_lossless
    assert f"2 states encoded anew: {reason}" in str(account)
    values = export_state_dict(optimizer, "torch")[0]["state"][0]["exp_avg_sq"]
    tensors = entry[NESTED]
    exact = decoded(tensors["state2"], tensors["absmax2"], SECOND, 256)
    codes = CODECS[codec]
    again = codes.encode(exact, "second", codes.block)
    assert torch.equal(values, codes.decode(again, "second", codes.block, shape))
    assert float((values - exact).abs().max()) < 0.07


def test_a_table_of_other_values_is_no_lossless_import() -> None:
    entry = eight_bit((16, 512))
    entry[NESTED]["qmap1"] = SIGNED * 1.0000001
    account = import_state_dict(optimizer_of([(16, 512)], codec="dynamic"), state_dict(entry))
    assert [one.outcome for one in account.conversions] == [ANEW, SAME]
    assert "other values" in account.conversions[0].reason


def test_small_tensors_are_fp32_there_and_here() -> None:
    entry = {"step": 1, NESTED: {"state1": torch.randn(100), "state2": torch.rand(100)}}
    optimizer = optimizer_of([(100,)], codec="int8")
    account = import_state_dict(optimizer, state_dict(entry))
    assert [one.outcome for one in account.conversions] == [PLAIN, PLAIN]
    (state,) = optimizer.state.values()
    assert torch.equal(state["exp_avg"], entry[NESTED]["state1"])
    back, _ = export_state_dict(optimizer, "bitsandbytes")
    assert torch.equal(back["state"][0][NESTED]["state2"], entry[NESTED]["state2"])


def test_ademamix_has_two_averages_in_one_tensor() -> None:
    shape = (16, 512)
    one, two = eight_bit(shape)[NESTED], eight_bit(shape)[NESTED]
    tensors = {
        "state1": torch.stack([one["state1"], two["state2"]]),
        "absmax1": torch.stack([one["absmax1"], two["absmax2"]]),
        "qmap1": SIGNED,
        **{name: one[name] for name in ("state2", "absmax2", "qmap2")},
    }
    optimizer = optimizer_of([shape], "AdEMAMix", codec="dynamic")
    entry = {"step": 7, NESTED: tensors}
    options = {"alpha": 3.0, "t_alpha": 100, "t_beta3": 50}
    account = import_state_dict(optimizer, state_dict(entry, **options))
    assert account.is_lossless
    (state,) = optimizer.state.values()
    assert torch.equal(state["exp_avg_fast.codes"], one["state1"])
    assert torch.equal(state["exp_avg_slow.codes"], two["state2"])
    group = optimizer.param_groups[0]
    assert (group["alpha"], group["alpha_warmup"], group["beta3_warmup"]) == (3.0, 100, 50)
    back, _ = export_state_dict(optimizer, "bitsandbytes")
    for name, tensor in tensors.items():
        assert torch.equal(back["state"][0][NESTED][name], tensor), name
    assert back["param_groups"][0]["t_alpha"] == 100


def test_momentum_is_bitsandbytes_first_beta() -> None:
    shape = (16, 512)
    tensors = {k: v for k, v in eight_bit(shape)[NESTED].items() if k.endswith("1")}
    optimizer = optimizer_of([shape], "SGD", codec="dynamic", momentum=0.5)
    import_state_dict(optimizer, state_dict({"step": 2, NESTED: tensors}, betas=(0.9, 0.1)))
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["dampening"]) == (0.9, 0.1)
    back, _ = export_state_dict(optimizer, "bitsandbytes")
    assert back["param_groups"][0]["betas"] == (0.9, 0.1)
    assert back["param_groups"][0]["eps"] == 0.0


class OptimState4bit:
    """Named as torchao's, with its attributes."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, qmap: torch.Tensor, shape: Any):
        self.codes, self.scale, self.qmap, self.shape = codes, scale, qmap, torch.Size(shape)


def test_torchaos_four_bits_have_the_first_element_in_the_high_half() -> None:
    shape = (32, 256)
    nibbles = random_codes(32 * 256, most=16)
    packed = (nibbles[0::2] << 4) | nibbles[1::2]
    scale = torch.rand(64, generator=torch.Generator().manual_seed(5))
    second = torch.linspace(0, 1, 17)[1:]
    entry = {
        "step": torch.tensor(4.0),
        "exp_avg": OptimState4bit(packed, scale, torch.tensor(FOURBIT_SIGNED), shape),
        "exp_avg_sq": OptimState4bit(packed, scale, second, shape),
    }
    optimizer = optimizer_of([shape], codec="4bit")
    account = import_state_dict(optimizer, state_dict(entry, lr=torch.tensor(0.5)))
    assert [one.outcome for one in account.conversions] == [SAME, SAME]
    values = export_state_dict(optimizer, "torch")[0]["state"][0]
    grid = nibbles.reshape(shape)
    exact = decoded(grid, scale, torch.tensor(FOURBIT_SIGNED), 128)
    assert torch.equal(values["exp_avg"], exact)
    assert torch.equal(values["exp_avg_sq"], decoded(grid, scale, second, 128))
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_torchaos_fp8_is_another_format() -> None:
    shape = (32, 256)
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    state = SimpleNamespace(codes=codes, scale=torch.full((32,), 2.0), shape=torch.Size(shape))
    kind = type("OptimStateFp8", (SimpleNamespace,), {})
    entry = {"step": 1.0, "exp_avg": kind(**vars(state)), "exp_avg_sq": torch.rand(shape)}
    optimizer = optimizer_of([shape], codec="bf16")
    account = import_state_dict(optimizer, state_dict(entry))
    assert [one.outcome for one in account.conversions] == [ANEW, ANEW]
    values = export_state_dict(optimizer, "torch")[0]["state"][0]["exp_avg"]
    assert torch.equal(values, codes.float() * 2)  # seven bits fit into bf16


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_torchs_adamw_goes_on_with_what_is_exported(codec: str) -> None:
    shapes = [(64, 128), (33, 200), (10,)]
    optimizer = optimizer_of(shapes, codec=codec, lr=0.25)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    exported, account = export_state_dict(optimizer, "torch")
    assert account.is_lossless
    held = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape)
    theirs = torch.optim.AdamW(held)
    theirs.load_state_dict(exported)
    theirs.step()
    assert theirs.param_groups[0]["lr"] == 0.25
    assert float(theirs.state[held[0]]["step"]) == 2

    again = optimizer_of(shapes, codec=codec)
    import_state_dict(again, exported)
    state = again.state[again.param_groups[0]["params"][0]]
    before = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert state.keys() == before.keys()


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"step": 1, NESTED: {"state1": random_codes(8192)}}, "state1"),
        ({"step": 1, NESTED: eight_bit((16, 512))[NESTED] | {"state1": None}}, "state1"),
        ({"step": 1, NESTED: eight_bit((8, 512))[NESTED]}, "state1"),
        (
            {"step": 1, NESTED: eight_bit((16, 512))[NESTED] | {"absmax1": torch.ones(4)}},
            "blocks of 2048",
        ),
        ({"step": 1, "exp_avg": torch.zeros(16, 512)}, "exp_avg_sq"),
        ({"step": 1, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}, "exp_avg"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(entry: Any, field: str) -> None:
    optimizer = optimizer_of([(16, 512)])
    with pytest.raises(InvalidConfiguration, match=field):
        import_state_dict(optimizer, state_dict(entry, lr=7.0))
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_other_groups_and_libraries_are_refused() -> None:
    optimizer = optimizer_of([(16, 512), (4,)])
    with pytest.raises(InvalidConfiguration, match="param_groups"):
        import_state_dict(optimizer, state_dict(eight_bit((16, 512))))
    with pytest.raises(InvalidConfiguration, match="'apex'"):
        export_state_dict(optimizer, "apex")  # type: ignore[arg-type]


def test_a_lion_does_not_take_the_state_of_an_adamw() -> None:
    optimizer = optimizer_of([(16, 512)], "Lion", codec="dynamic")
    with pytest.raises(InvalidConfiguration, match="state2"):
        import_state_dict(optimizer, state_dict(eight_bit((16, 512))))
