"""The verbs with a real agent behind them, and what they export loaded by torch itself."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from typer.testing import CliRunner

import everstep
from everstep.agent import asking
from everstep.agent.cli import app
from tests.zygotes import Program

from .conftest import AgentProcess, eventually

STEPS = 5
NVME_STEPS = {4, 5}
JOB = "gpt"


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(agent_process: AgentProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a verb against this test's agent."""
    monkeypatch.chdir(tmp_path)
    # Not the fixture's environment alone: `export` has a child.
    monkeypatch.setenv("EVERSTEP_AGENT", agent_process.address)
    monkeypatch.setenv("EVERSTEP_HOME", str(tmp_path / "home"))
    runner = CliRunner()

    def run(*words: object, answer: str | None = None) -> Outcome:
        result = runner.invoke(app, [str(word) for word in words], input=answer)
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


class Training:
    """A model with tied weights, two groups, a scheduler and a counter, trained for some steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Embedding(20, 16), nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)
        )
        self.model.append(nn.Linear(16, 20, bias=False))
        self.model[4].weight = self.model[0].weight
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1]},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ]
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.progress = {"tokens": 0, "average": torch.zeros(3, dtype=torch.bfloat16)}

    def step(self) -> None:
        words = torch.randint(0, 20, (8,))
        loss = nn.functional.cross_entropy(self.model(words), words)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.progress["tokens"] += 8

    def attached(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "progress": self.progress,
        }

    def states(self) -> dict[str, Any]:
        return {
            name: thing.state_dict() if hasattr(thing, "state_dict") else thing
            for name, thing in self.attached().items()
        }


@pytest.fixture
def training(agent_process: AgentProcess) -> Training:
    """Trained, and gone: memory holds its last steps, NVMe every second and the last."""
    training = Training()
    with everstep.connect(job=JOB, agent=agent_process.address, nvme_interval=2) as client:
        client.attach(**training.attached())
        for step in range(1, STEPS + 1):
            training.step()
            handle = client.snapshot(step)
            handle.wait("memory", timeout=30)
            if step % 2 == 0:
                handle.wait("nvme", timeout=30)
    return training


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Equal in type, order and every bit."""
    if isinstance(left, dict):
        assert isinstance(right, dict), path
        assert list(left) == list(right), path
        for key in left:
            assert_same(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), path
        for_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        assert torch.equal(*for_bytes), path
    elif isinstance(left, list | tuple):
        assert type(left) is type(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    else:
        assert (type(left), left) == (type(right), right), path


def test_status_tells_what_the_agent_holds(
    cli: Cli, training: Training, agent_process: AgentProcess
) -> None:
    document = cli("status", "--json").document
    about = {
        "address": agent_process.address,
        "node_id": "n0",
        "pid": agent_process.pid,
        "memory_dir": str(agent_process.memory_dir),
        "nvme_dir": str(agent_process.nvme_dir),
    }
    assert document.items() >= about.items()
    (job,) = document["jobs"]
    assert (job["job"], job["incarnation"], job["world"]) == (JOB, 1, 1)
    assert {level: one["step"] for level, one in job["newest"].items()} == {
        "memory": STEPS,
        "nvme": STEPS,
    }
    assert job["counters"]["committed"] == STEPS
    assert 0 <= job["last_commit_age_s"] < 300
    (rank,) = job["ranks"]
    assert (rank["pid"], rank["attached"], rank["last_sealed_step"]) == (os.getpid(), False, STEPS)
    assert document["memory_reserved_bytes"] == rank["arena_bytes"] > 0
    shown = cli("status", "--job", JOB)
    assert shown.status == 0
    assert "memory step 5" in shown.out


def test_a_job_the_agent_does_not_know_is_usage(cli: Cli, training: Training) -> None:
    for words in (
        ("status",),
        ("list",),
        ("verify",),
        ("inspect",),
        ("gc", "--dry-run"),
        ("export", "out", "--to", "safetensors"),
    ):
        outcome = cli(*words, "--job", "other")
        assert outcome.status == 2, words
        assert JOB in outcome.err, "it names those it knows"


def test_list_has_sizes_and_ages_of_both_levels(cli: Cli, training: Training) -> None:
    rows = cli("list", "--job", JOB, "--json").document["snapshots"]
    found = {(row["level"], row["step"]) for row in rows}
    assert found >= {("memory", STEPS)} | {("nvme", step) for step in NVME_STEPS}
    assert len({row["bytes"] for row in rows}) == 1
    assert all(row["bytes"] > 0 and row["age_s"] < 300 and row["committed"] for row in rows)


def test_a_job_that_is_in_memory_alone_is_listed(cli: Cli, agent_process: AgentProcess) -> None:
    """Nothing of it was ever flushed: it has no directory on NVMe."""
    client = everstep.connect(
        job="alone", interval=1, nvme_interval=1 << 30, agent=agent_process.address
    )
    client.attach(tree={"x": torch.ones(3)})
    assert client.snapshot(1).wait("memory")
    assert agent_process.nvme_dir is not None
    assert not (agent_process.nvme_dir / "alone").exists()
    rows = cli("list", "--json").document["snapshots"]
    assert [(row["job"], row["level"], row["step"]) for row in rows] == [("alone", "memory", 1)]
    client.close(timeout=0)


def test_verify_finds_damage_in_either_level(
    cli: Cli, training: Training, agent_process: AgentProcess
) -> None:
    fine = cli("verify", "--json")
    assert (fine.status, fine.document["damaged"], fine.document["problems"]) == (0, [], [])
    assert {one["level"] for one in fine.document["shards"]} == {"memory", "nvme"}
    agent_process.flip(JOB, STEPS)
    damaged = cli("verify", "--step", STEPS, "--json")
    assert damaged.status == 1
    assert [one["level"] for one in damaged.document["damaged"]] == ["memory"]
    assert damaged.document["usable"][0].items() >= {"step": STEPS, "levels": ["nvme"]}.items()
    assert cli("verify", "--step", STEPS, "--level", "nvme").status == 0
    shown = cli("verify")
    assert shown.status == 1
    assert "can still restore step 5 from nvme" in shown.err


def test_verify_finds_a_commit_that_the_agent_does_not_see(
    cli: Cli, training: Training, agent_process: AgentProcess
) -> None:
    assert agent_process.nvme_dir is not None
    commit = agent_process.nvme_dir / JOB / f"step-{STEPS:012}" / "commit"
    commit.write_bytes(b"ruined")
    agent_process.restart()
    outcome = cli("verify", "--json")
    assert outcome.status == 1
    assert [problem["where"] for problem in outcome.document["problems"]] == [str(commit)]


def test_inspect_through_the_agent(cli: Cli, training: Training) -> None:
    document = cli("inspect", "--job", JOB, "--level", "nvme", "--step", 4, "--json").document
    assert (document["step"], document["level"]) == (4, "nvme")
    parts = {part["name"]: part["kind"] for part in document["parts"]}
    assert parts == {
        "model": "module",
        "optimizer": "optimizer",
        "scheduler": "stateful",
        "progress": "tree",
    }
    assert document["aliases"] == {"model/4.weight": "model/0.weight"}
    assert torch.__version__ in document["record"]["producer"]
    assert cli("inspect").status == 0, "of the only job's newest"


def test_export_to_torch_is_what_the_state_dicts_were(cli: Cli, training: Training) -> None:
    outcome = cli("export", "--job", JOB, "--to", "torch", "out.pt", "--json")
    assert (outcome.status, outcome.document["optimizers_by_name"]) == (0, [])
    loaded = torch.load("out.pt", weights_only=True)
    assert_same({name: loaded[name] for name in training.states()}, training.states())
    assert loaded["everstep"]["step"] == STEPS
    assert loaded["rng"].keys() >= {"python", "torch"}
    tied = [loaded["model"][name].data_ptr() for name in ("0.weight", "4.weight")]
    assert tied[0] == tied[1]
    fresh = Training()
    fresh.optimizer.load_state_dict(loaded["optimizer"])
    assert_same(fresh.optimizer.state_dict(), training.optimizer.state_dict())


def test_export_of_a_part_from_nvme(cli: Cli, training: Training) -> None:
    words = ("export", "--job", JOB, "--level", "nvme", "--part", "model", "--json")
    outcome = cli(*words, "--to", "torch", "out.pt")
    assert outcome.document["levels"] == ["nvme"]
    loaded = torch.load("out.pt", weights_only=True)
    assert loaded.keys() == {"model", "everstep"}
    assert_same(loaded["model"], training.model.state_dict())
    assert cli(*words, "--to", "safetensors", "out.safetensors").status == 0
    from safetensors.torch import load_file

    fresh = Training().model
    fresh.load_state_dict(load_file("out.safetensors"), strict=True)
    assert_same(fresh.state_dict(), training.model.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_export_to_dcp_loads_in_place(cli: Cli, training: Training) -> None:
    assert cli("export", "--job", JOB, "--to", "dcp", "out").status == 0
    fresh = Training()
    fresh.step()
    state = fresh.states()
    checkpoint.load(state, checkpoint_id="out", no_dist=True)
    assert_same(state["model"], training.model.state_dict())
    assert_same(state["optimizer"]["state"], training.optimizer.state_dict()["state"])
    assert state["progress"]["tokens"] == training.progress["tokens"]


def test_an_optimizer_whose_order_is_unknown_keeps_its_names(
    cli: Cli, agent_process: AgentProcess
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_buffer("mask", torch.ones(2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([*reversed(list(model.parameters()))], lr=0.1, momentum=0.9)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    with everstep.connect(job=JOB, agent=agent_process.address) as client:
        client.attach(model=model, optimizer=optimizer)
        client.snapshot(1).wait("memory", timeout=30)
    outcome = cli("export", "--job", JOB, "--to", "torch", "out.pt", "--json")
    assert outcome.document["optimizers_by_name"] == ["optimizer"]
    state = torch.load("out.pt", weights_only=True)["optimizer"]["state"]
    assert state.keys() == {"model.1.weight", "model.1.bias"}
    assert_same(state["model.1.bias"], optimizer.state_dict()["state"][0])


RANK = """
import sys, torch, everstep
from torch import distributed, nn
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Linear(300, 200))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.full((2, 300), rank + 1.0)).sum().backward()
optimizer.step()
own = {"seen": torch.full((3,), rank)}
client = everstep.connect(job="ddp")
client.attach(model=model, optimizer=optimizer, per_rank={"own": own})
client.snapshot(1).wait("nvme", timeout=60)
if rank == 0:
    states = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(states, store + ".pt")
client.close()
distributed.destroy_process_group()
"""


def test_export_puts_the_ranks_of_a_ddp_job_together(cli: Cli, tmp_path: Path) -> None:
    store, script, log = tmp_path / "store", tmp_path / "rank.py", tmp_path / "ranks.log"
    script.write_text(RANK)
    ranks = [
        Program("trainer", str(script), str(rank), str(store), environ={}, log=log)
        for rank in (0, 1)
    ]
    assert [rank.wait(100) for rank in ranks] == [0, 0], log.read_text(errors="replace")
    shards = [cli("inspect", "--rank", rank, "--json").document for rank in (0, 1)]
    assert all(shard["leaves"][0]["replicated"] for shard in shards)
    assert sum(shard["parts"][0]["held_bytes"] for shard in shards) == 4 * (300 * 200 + 200)
    expected = torch.load(tmp_path / "store.pt", weights_only=True)
    assert cli("export", "--rank", 1, "--to", "torch", "out.pt", "--job", "ddp").status == 0
    loaded = torch.load("out.pt", weights_only=True)
    assert_same({name: loaded[name] for name in expected}, expected)
    assert loaded["own"]["seen"].tolist() == [1] * 3


def test_gc_of_a_whole_job_leaves_nothing_and_the_agent_well(
    cli: Cli, training: Training, agent_process: AgentProcess
) -> None:
    words = ("gc", "--job", JOB, "--all")
    planned = cli(*words, "--dry-run", "--json").document
    assert not planned["freed"]
    assert {item["level"] for item in planned["items"]} == {"memory", "nvme"}
    assert planned["bytes"] > 0
    assert cli(*words, answer="n\n").status == 0
    assert agent_process.steps_in_memory(JOB)
    assert cli(*words, answer="y\n").status == 0
    assert agent_process.nvme_dir is not None
    assert [p for p in agent_process.nvme_dir.iterdir() if not p.name.startswith(".")] == []
    assert not (agent_process.memory_dir / JOB).exists()
    assert cli("status", "--json").document["jobs"] == []


def test_gc_refuses_what_is_in_use(
    cli: Cli, training: Training, agent_process: AgentProcess
) -> None:
    outcome = cli("gc", agent_process.nvme_dir, "--keep-newest", 1, "--yes")
    assert outcome.status == 2
    assert f"pid {agent_process.pid}" in outcome.err
    with everstep.connect(job=JOB, agent=agent_process.address):
        assert cli("gc", "--job", JOB, "--all", "--yes").status == 2
    assert agent_process.steps_on_nvme(JOB)[-2:] == sorted(NVME_STEPS)


def test_an_agent_that_hangs_is_status_3_within_the_deadline(
    cli: Cli, agent_process: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "STATUS_TIMEOUT_S", 0.2)
    agent_process.stop()
    outcome = cli("status", "--json")
    assert (outcome.status, outcome.document["error"]["type"]) == (3, "AgentUnavailable")
    agent_process.cont()
    monkeypatch.undo()


def test_an_agent_that_was_killed_is_status_3(cli: Cli, agent_process: AgentProcess) -> None:
    agent_process.kill()
    outcome = cli("status")
    assert outcome.status == 3
    assert "is gone" in outcome.err


def test_the_agent_is_small_at_rest(agent_process: AgentProcess) -> None:
    assert psutil.Process(agent_process.pid).memory_info().rss < 100e6


def test_the_agent_says_in_json_where_it_answers(tmp_path: Path) -> None:
    agent = AgentProcess(tmp_path / "nvme")
    words = ["agent", "--json", "--node-id", "n9", "--socket", str(agent.socket)]
    words += ["--memory-dir", str(agent.memory_dir), "--nvme-dir", "", "--log-file", str(agent.log)]
    process = subprocess.Popen(
        [sys.executable, "-m", "everstep.agent", *words], stdout=subprocess.PIPE
    )
    agent.process = process
    try:
        eventually(agent._answers, "the agent answers")
        with asking.Agent(agent.address) as asked:
            assert asked.status().node_id == "n9"
        process.terminate()
        output, _ = process.communicate(timeout=60)
        said = json.loads(output)
        assert (said["node_id"], said["pid"], said["nvme_dir"]) == ("n9", process.pid, "")
        assert said["address"] == agent.address
        assert "answers at" in agent.log.read_text()
        assert process.returncode == 0
    finally:
        agent.close()
