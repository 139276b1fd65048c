"""Roles of parameters, and the plans and groups that follow from them."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from everstep.client.optim.codecs import CODECS
from everstep.client.optim.methods import METHODS, method_named
from everstep.client.optim.plan import plan
from everstep.client.optim.roles import roles_of
from everstep.proto.errors import InvalidConfiguration


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width, bias=False)  # as BERT's; no head
        self.norm = nn.LayerNorm(width)


class Model(nn.Module):
    def __init__(self, rows: int = 96, width: int = 64, tied: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(rows, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.read_out = nn.Linear(width, rows, bias=False)
        if tied:
            self.read_out.weight = self.wte.weight


def found(names: dict[str, tuple[int, ...]]) -> dict[str, str]:
    named = [(name, torch.empty(shape, device="meta")) for name, shape in names.items()]
    return {name: assigned.role for name, assigned in roles_of(named).items()}


def test_roles_by_name_as_hugging_face_and_torchtitan_name() -> None:
    matrix = (640, 64)
    expected = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
        "model.layers.0.self_attn.q_proj.weight": "hidden",
        "model.layers.0.input_layernorm.weight": "vector",
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "embedding",
        "transformer.h.0.attn.c_attn.weight": "hidden",
        "transformer.h.0.attn.c_attn.bias": "vector",
        "tok_embeddings.weight": "embedding",
        "output.weight": "head",
        "layers.3.attention.wo.weight": "hidden",
        "layers.3.moe.experts.w1": "hidden",
        "_orig_mod.module.output.weight": "head",
        "bert.embeddings.word_embeddings.weight": "embedding",
        "bert.encoder.layer.1.output.dense.weight": "hidden",
        "cls.predictions.decoder.weight": "head",
        "gpt_neox.embed_in.weight": "embedding",
        "embed_out.weight": "head",
        "shared.weight": "embedding",
        "classifier.6.weight": "head",
        "vit.embeddings.cls_token": "vector",
        "backbone.layers.0.mixer.A_log": "vector",
        "backbone.layers.0.mixer.conv1d.weight": "vector",
        "layers.0.conv.weight": "hidden",
        "logit_scale": "vector",
    }
    shapes = dict.fromkeys(expected, matrix)
    shapes["layers.3.moe.experts.w1"] = (8, 64, 128)
    shapes["vit.embeddings.cls_token"] = (1, 1, 64)
    shapes["backbone.layers.0.mixer.conv1d.weight"] = (64, 1, 4)
    shapes["layers.0.conv.weight"] = (64, 3, 3, 3)
    shapes["logit_scale"] = ()
    for name in ("model.layers.0.input_layernorm.weight", "transformer.h.0.attn.c_attn.bias"):
        shapes[name] = (64,)
    assert found(shapes) == expected


def test_roles_by_type_need_no_telling_names() -> None:
    assigned = {name: one.role for name, one in roles_of(Model()).items()}
    assert assigned["wte.weight"] == "embedding"
    assert assigned["read_out.weight"] == "head"
    assert assigned["layers.0.output.weight"] == assigned["layers.1.c_attn.weight"] == "hidden"
    assert assigned["norm.weight"] == assigned["layers.0.c_attn.bias"] == "vector"


def test_a_weight_that_embedding_and_head_share_is_an_embedding() -> None:
    assigned = roles_of(Model(tied=True))
    assert assigned["wte.weight"].role == "embedding"
    assert "read_out.weight" in assigned["wte.weight"].reason
    assert "read_out.weight" not in assigned


def test_a_guess_is_overruled() -> None:
    assert roles_of(Model(), {"layers.*.output.weight": "vector"})["layers.1.output.weight"] == (
        "vector",
        "as said for layers.*.output.weight",
    )
    with pytest.raises(InvalidConfiguration, match=r"'nothing\.\*'"):
        roles_of(Model(), {"nothing.*": "vector"})
    with pytest.raises(InvalidConfiguration, match="'matrix' is not one of"):
        roles_of(Model(), {"wte.weight": "matrix"})


def test_four_bits_are_for_hidden_matrices() -> None:
    made = plan(Model(), codec="4bit")
    codecs = {entry.parameter: entry.codec for entry in made.entries}
    assert codecs["layers.0.c_attn.weight"] == "4bit"
    assert codecs["wte.weight"] == codecs["read_out.weight"] == "int8"
    assert codecs["norm.weight"] == "fp32"
    reasons = {entry.parameter: entry.reason for entry in made.entries}
    assert "64 elements, fewer than 4096" in reasons["norm.weight"]
    assert "4bit is for hidden matrices" in reasons["wte.weight"]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_bytes_are_those_of_the_optimizers_state(method: str, codec: str) -> None:
    model = Model(rows=97, width=72)  # rows that are no multiple of a block
    made = plan(model, method, codec)
    size = 0
    for optimizer in made.optimizers():
        optimizer.prepare()  # type: ignore[attr-defined]
        names = [name for name, _ in type(optimizer).states]  # type: ignore[attr-defined]
        for state in optimizer.state.values():
            for key, tensor in state.items():
                if key.partition(".")[0] in names:
                    size += tensor.numel() * tensor.element_size()
    assert made.state_bytes == size
    assert made.adamw_bytes == 8 * sum(p.numel() for p in model.parameters())


def test_groups_train_what_they_hold() -> None:
    model = Model()
    made = plan(model, codec="4bit", options={"vector": {"weight_decay": 0.0}})
    optimizer = method_named("AdamW")(made.groups, lr=1e-2, weight_decay=0.5)
    decays = {group["role"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"embedding": 0.5, "hidden": 0.5, "vector": 0.0, "head": 0.5}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[model.layers[0].c_attn.weight]
    assert state["exp_avg.codes"].shape == (192, 32)
    assert optimizer.state[model.wte.weight]["exp_avg.codes"].dtype == torch.int8


def test_a_muon_plan_leaves_all_but_hidden_matrices_to_adamw() -> None:
    made = plan(Model(), "Muon", "int8")
    methods = {entry.parameter: entry.method for entry in made.entries}
    assert methods["layers.0.c_attn.weight"] == "Muon"
    others = [name for name, method in methods.items() if method == "AdamW"]
    assert {"wte.weight", "read_out.weight", "norm.weight", "layers.0.norm.weight"} <= set(others)
    muon, adamw = made.optimizers(Muon={"lr": 0.02}, AdamW={"lr": 1e-3})
    assert (type(muon).__name__, type(adamw).__name__) == ("Muon", "AdamW")
    assert {group["lr"] for group in adamw.param_groups} == {1e-3}
    with pytest.raises(InvalidConfiguration, match="Lion"):
        made.optimizers(Lion={})


def test_a_stack_of_experts_is_no_matrix_for_muon() -> None:
    experts = nn.Parameter(torch.zeros(8, 64, 128))
    kernel = nn.Parameter(torch.zeros(64, 16, 3, 3))
    made = plan([("layers.0.experts.w1", experts), ("layers.0.conv.weight", kernel)], "Muon")
    assert [entry.method for entry in made.entries] == ["AdamW", "Muon"]
    assert {entry.role for entry in made.entries} == {"hidden"}


def test_codecs_by_role_and_by_name() -> None:
    made = plan(Model(), codecs={"embedding": "fp32", "layers.1.*": "bf16"})
    codecs = {entry.parameter: entry.codec for entry in made.entries}
    assert codecs["wte.weight"] == "fp32"
    assert codecs["layers.1.c_attn.weight"] == "bf16"
    assert codecs["layers.0.c_attn.weight"] == "int8"


def test_frozen_parameters_have_no_state() -> None:
    model = Model()
    model.wte.weight.requires_grad_(False)
    made = plan(model)
    (frozen,) = [entry for entry in made.entries if not entry.method]
    assert (frozen.parameter, frozen.state_bytes, frozen.reason) == (
        "wte.weight",
        0,
        "frozen: no state",
    )
    members = [p for group in made.groups for p in group["params"]]
    assert all(p is not model.wte.weight for p in members)
    assert len(members) == len(list(model.parameters())) - 1


def test_the_table_says_all_of_it() -> None:
    made = plan(Model(), codec="int8")
    text = str(made)
    for entry in made.entries:
        assert entry.parameter in text
    assert f"{made.elements:,} elements" in text
    assert json.loads(json.dumps(made.as_json()))["state_bytes"] == made.state_bytes


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (lambda: plan(Model(), method="Adamw"), "method: 'Adamw'"),
        (lambda: plan(Model(), codec="int9"), "codec: 'int9'"),
        (lambda: plan(Model(), block=48), "block: 48"),
        (lambda: plan(Model(), codecs={"hidde": "int8"}), r"codecs\['hidde'\]"),
        (lambda: plan(Model(), codecs={"hidden": "int9"}), "codec: 'int9'"),
        (lambda: plan(Model(), options={"hidde": {}}), r"options\['hidde'\]"),
    ],
)
def test_what_is_misspelled_is_named(wrong: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidConfiguration, match=field):
        wrong()
