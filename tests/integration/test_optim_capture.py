"""State in codes is captured as codes, restored bit for bit, and exported decoded if one asks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import everstep
from everstep.agent.cli import app
from everstep.client import optim

from .conftest import AgentProcess
from .states import exact, states

Objects = dict[str, Any]
SAVED, LAST = 3, 6
KINDS: dict[str, dict[str, Any]] = {
    "AdamW-int8": {"codec": "int8"},
    "AdamW-4bit": {"codec": "4bit"},
    "AdamW-fp8": {"codec": "fp8"},
    "Lion-dynamic": {"codec": "dynamic"},
    "AdEMAMix-bf16+8": {"codec": "bf16+8"},
    "SPAM-int8": {"codec": "int8", "reset_interval": 4},
}


def make(seed: int, kind: str = "AdamW-int8", **options: Any) -> Objects:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(130, 96), nn.LayerNorm(96), nn.Linear(96, 130))
    chosen = options or KINDS[kind]
    method = optim.METHODS[kind.partition("-")[0]]
    return {"model": model, "optimizer": method(model.named_parameters(), lr=1e-2, **chosen)}


def train(objects: Objects, first: int, last: int) -> None:
    for step in range(first + 1, last + 1):
        batch = torch.randn(16, 130, generator=torch.Generator().manual_seed(step))
        objects["optimizer"].zero_grad()
        (objects["model"](batch) - batch).square().mean().backward()
        objects["optimizer"].step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit(connect: Callable[..., everstep.Client], kind: str) -> None:
    original = make(1, kind)
    client = connect()
    client.attach(**original)
    train(original, 0, SAVED)
    at_snapshot = states(original)
    handle = client.snapshot(SAVED)
    train(original, SAVED, LAST)  # while the snapshot is copied
    assert handle.wait(), handle
    client.close(timeout=0)
    for trained in (0, 1):  # without any state, and with state that must be replaced
        other = make(2, kind)
        train(other, 0, trained)
        client = connect()
        client.attach(**other)
        assert client.restore() == SAVED
        assert states(other) == at_snapshot
        train(other, SAVED, LAST)
        assert states(other) == states(original)
        client.close(timeout=0)


def test_codes_are_stored_as_they_are(agent_process: AgentProcess) -> None:
    """And an int8 run's shard is at most 0.52 of the fp32 run's bytes."""
    sizes = {}
    for codec in ("int8", "fp32"):
        objects = wide(codec)
        save(agent_process, f"run-{codec}", objects)
        (held,) = agent_process.memory.records(f"run-{codec}")
        sizes[codec] = held.record.image_bytes
    assert sizes["int8"] <= 0.52 * sizes["fp32"], sizes


def wide(codec: str) -> Objects:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    optimizer = optim.AdamW(model.parameters(), codec=codec)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def save(agent: AgentProcess, job: str, objects: Objects) -> None:
    client = everstep.connect(job, agent=agent.address, rank=0, world=1)
    client.attach(**objects)
    assert client.snapshot(1).wait()
    client.close(timeout=0)


@pytest.fixture
def export(
    agent_process: AgentProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs the verb on a job, with more words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERSTEP_AGENT", agent_process.address)
    monkeypatch.setenv("EVERSTEP_HOME", str(tmp_path / "home"))

    def run(job: str, *words: str) -> Any:
        return CliRunner().invoke(app, ["export", "--job", job, *words, "out.pt"])

    return run


@pytest.mark.parametrize(
    "codec", ["int8", "4bit", "4bit-rank1", "fp8", "dynamic", "bf16", "bf16+8"]
)
def test_an_export_decodes(
    agent_process: AgentProcess, export: Callable[..., Any], codec: str
) -> None:
    objects = make(1, "AdamW", codec=codec)
    train(objects, 0, SAVED)
    save(agent_process, "run", objects)
    assert export("run", "--to", "torch").exit_code == 0
    stored = torch.load("out.pt", weights_only=True)["optimizer"]
    assert "exp_avg.codes" in stored["state"][0]
    assert exact(stored) == exact(objects["optimizer"].state_dict())
    result = export("run", "--to", "torch", "--decode", "--force")
    assert result.exit_code == 0, result.output
    loaded = torch.load("out.pt", weights_only=True)
    group, state = loaded["optimizer"]["param_groups"][0], loaded["optimizer"]["state"]
    assert (group["codec"], group["block"]) == ("fp32", 0)
    # As the optimizer itself decodes them when its codec is changed.
    optimizer = objects["optimizer"]
    optimizer.param_groups[0]["codec"] = "fp32"
    optimizer.prepare()
    for index, entry in optimizer.state_dict()["state"].items():
        assert state[index].keys() == entry.keys()
        for key, tensor in entry.items():
            assert torch.equal(state[index][key], tensor), key
    theirs = torch.optim.AdamW(make(2, "AdamW", codec=codec)["model"].parameters())
    theirs.load_state_dict(loaded["optimizer"])
    for parameter in theirs.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    theirs.step()


def test_what_cannot_be_decoded_is_refused(
    agent_process: AgentProcess, export: Callable[..., Any]
) -> None:
    objects = make(1, "AdamW", codec="int8")
    train(objects, 0, 1)
    for state in objects["optimizer"].state.values():
        if "exp_avg.codes" in state:
            state["mystery.codes"] = state["exp_avg.codes"].clone()
    save(agent_process, "run", objects)
    result = export("run", "--to", "torch", "--decode")
    assert result.exit_code == 2
    assert "state mystery of model.0.weight is not decoded" in " ".join(result.output.split())
    assert not Path("out.pt").exists()
    assert export("run", "--to", "dcp", "--decode").exit_code == 2
