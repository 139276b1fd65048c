"""Checkpoints out and in again, through a real agent: the same bytes, whatever the way."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import everstep
from everstep.agent import choosing, display
from everstep.agent.bare import place_of
from everstep.agent.cli import app
from everstep.agent.exporting import _located
from everstep.client.importing.__main__ import imported
from everstep.proto.errors import Refused

from .conftest import AgentProcess
from .states import exact

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Run = Callable[..., Any]


@pytest.fixture
def run(shared_agent: AgentProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a verb that must succeed; returns its document."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERSTEP_AGENT", shared_agent.address)
    monkeypatch.setenv("EVERSTEP_HOME", str(tmp_path / "home"))

    def ran(*words: object, status: int = 0) -> Any:
        result = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert result.exit_code == status, (result.output, result.stderr)
        return json.loads(result.stdout)

    return ran


class Net(nn.Module):
    """Tied, of several types, with a number and nothing in it."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.first = nn.Linear(9, 6)
        self.norm = nn.BatchNorm1d(6)
        self.half = nn.Linear(6, 6).bfloat16()
        self.last = nn.Linear(9, 6, bias=False)
        self.last.weight = self.first.weight
        self.empty = nn.Parameter(torch.empty(0, 4))


def restored(
    job: str, agent: AgentProcess, fresh: nn.Module, name: str = "model"
) -> tuple[int | None, Any]:
    """What a program gets that attaches a model of its own."""
    with everstep.connect(job=job, agent=agent.address, rank=0, world=1) as client:
        client.attach(**{name: fresh})
        step = client.restore(weights_only=True)
    return step, exact(fresh.state_dict())


def test_a_safetensors_file_becomes_a_first_snapshot(
    run: Run, job: str, shared_agent: AgentProcess
) -> None:
    net = Net()
    state = {k: v for k, v in net.state_dict().items() if k != "last.weight"}
    save_file(state | {"last.weight": net.last.weight.detach().clone()}, "net.safetensors")
    report = run("import", "net.safetensors", "--job", job, "--step", 40)
    assert (report["step"], report["levels"]) == (40, ["memory", "nvme"])
    assert [(p["name"], p["kind"]) for p in report["parts"]] == [("model", "module")]
    rows = run("list", "--job", job)["snapshots"]
    assert {(row["level"], row["step"], row["committed"]) for row in rows} == {
        ("memory", 40, True),
        ("nvme", 40, True),
    }
    shown = run("inspect", "--job", job)
    assert [(part["name"], part["kind"]) for part in shown["parts"]] == [("model", "module")]
    checked = run("verify", "--job", job)
    assert (len(checked["shards"]), checked["damaged"]) == (2, [])
    again = run("import", "net.safetensors", "--job", job, status=2)
    assert "step 40" in again["error"]["message"]
    # Tied here, two tensors there: it must say so, not choose one of them.
    net.last.weight = nn.Parameter(net.first.weight.detach().clone())
    fresh = Net(1)
    fresh.last.weight = nn.Parameter(torch.zeros(6, 9))
    assert restored(job, shared_agent, fresh) == (40, exact(net.state_dict()))


def test_a_torch_file_becomes_parts_and_ties_stay(
    run: Run, job: str, shared_agent: AgentProcess
) -> None:
    net = Net()
    checkpoint = {"net": net.state_dict(), "schedule": {"lr": [0.1, torch.ones(2)]}, "epoch": 3}
    torch.save(checkpoint, "net.pt")
    report = imported(Path("net.pt"), job, agent=shared_agent.address)
    kinds = {part["name"]: part["kind"] for part in report["parts"]}
    assert kinds == {"net": "module", "schedule": "tree", "loose": "tree"}
    assert "net/last.weight" in run("inspect", "--job", job, "--all")["aliases"]
    assert restored(job, shared_agent, Net(1), "net") == (0, exact(net.state_dict()))
    fresh, schedule, loose = Net(1), {"lr": [0.0, torch.zeros(2)]}, {"epoch": 0}
    with everstep.connect(job=job, agent=shared_agent.address, rank=0, world=1) as client:
        client.attach(net=fresh, schedule=schedule, loose=loose)
        assert client.restore() == 0
    assert exact(schedule) == exact(checkpoint["schedule"])
    assert loose == {"epoch": 3}


def test_what_only_pickle_could_load_is_refused_and_leaves_no_job(
    run: Run, job: str, tmp_path: Path
) -> None:
    torch.save(Net(), tmp_path / "net.pt")
    refused = run("import", "net.pt", "--job", job, status=2)
    assert "state_dict" in refused["error"]["message"]
    assert "no job" in run("list", "--job", job, status=2)["error"]["message"]


def test_nothing_is_imported_into_a_job_that_runs(
    job: str, shared_agent: AgentProcess, connect: Callable[..., everstep.Client], tmp_path: Path
) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    state = {"w": torch.ones(3)}
    client = connect()
    client.attach(state=state)
    assert client.snapshot(1).wait()
    client.close()
    with pytest.raises(Refused, match="step 1"):
        imported(tmp_path / "net.pt", job, agent=shared_agent.address)


WHOLE = torch.arange(60.0).reshape(10, 6)


def save_spread(job: str, agent: AgentProcess) -> None:
    """Two ranks: rows of one tensor, columns of another, and something of their own."""
    clients = [everstep.connect(job, agent=agent.address, rank=r, world=2) for r in (0, 1)]
    cuts = [(slice(0, 4), slice(0, 6)), (slice(4, 10), slice(0, 6))]
    for rank, client in enumerate(clients):
        rows, _ = cuts[rank]
        columns = slice(2 * rank, 2 + 4 * rank)
        state = {
            "rows": WHOLE[rows].clone(),
            "columns": WHOLE.bfloat16()[:, columns].contiguous(),
            "own": torch.full((3,), rank),
        }
        places = {
            "state/rows": everstep.Extent("state/rows", (10, 6), (rows.start, 0)),
            "state/columns": everstep.Extent("state/columns", (10, 6), (0, columns.start)),
        }

        def place(name: str, _: object, places: dict[str, Any] = places) -> Any:
            return [places[name]] if name in places else None

        client.attach(state=state, placement={"state": place})
    handles = [client.snapshot(5) for client in clients]
    assert all(handle.wait(timeout=60) for handle in handles)
    for client in clients:
        client.close()


@pytest.fixture
def spread(job: str, shared_agent: AgentProcess) -> dict[str, torch.Tensor]:
    """What comes out of it for rank 1."""
    save_spread(job, shared_agent)
    return {"rows": WHOLE, "columns": WHOLE.bfloat16(), "own": torch.ones(3).long()}


def test_safetensors_in_several_files_out_and_in(
    run: Run, job: str, shared_agent: AgentProcess, spread: dict[str, torch.Tensor]
) -> None:
    words = ("export", "--job", job, "--to", "safetensors", "--rank", 1)
    run(*words, "--part", "state", "one.safetensors")
    assert exact(load_file("one.safetensors")) == exact(spread)
    report = run(*words, "--part", "state", "--shard-bytes", 200, "several")
    assert report["files"] == 3
    index = json.loads(Path("several/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in spread.values())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(Path("several") / file, framework="pt") as opened:
            found[name] = opened.get_tensor(name)
    assert exact(found) == exact(spread)
    imported(Path("several"), f"{job}-in", agent=shared_agent.address)
    run("export", "--job", f"{job}-in", "--to", "safetensors", "--part", "model", "again")
    assert exact(load_file("again")) == exact(spread)
    assert "--force" in run(*words, "several", status=2)["error"]["message"]
    run(*words, "--shard-bytes", 200, "--force", "several")
    run(*words, "--sharded", "images")
    names = sorted(path.name for path in Path("images").iterdir())
    assert names == ["rank-00000.safetensors", "rank-00001.safetensors"]
    with safe_open("images/rank-00001.safetensors", framework="pt") as opened:
        assert torch.equal(opened.get_tensor("state/rows[4:10,0:6]"), WHOLE[4:])


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_torch_forms_out_and_in(
    run: Run, job: str, shared_agent: AgentProcess, spread: dict[str, torch.Tensor], form: str
) -> None:
    how = ["--sharded"] if form == "dcp" else []
    run("export", "--job", job, "--to", form, "--rank", 1, "out", *how)
    report = imported(Path("out"), f"{job}-in", agent=shared_agent.address)
    assert (report["format"], report["step"]) == (form, 5), "an export of ours says its step"
    state = {name: torch.zeros_like(tensor) for name, tensor in spread.items()}
    with everstep.connect(f"{job}-in", agent=shared_agent.address, rank=0, world=1) as client:
        client.attach(state=state)
        assert client.restore() == 5
    assert exact(state) == exact(spread)
    run("export", "--job", f"{job}-in", "--to", "safetensors", "--part", "state", "again")
    assert exact(load_file("again")) == exact(spread)


def test_options_that_do_not_go_together_are_refused(run: Run, job: str) -> None:
    words = ("export", "--job", job, "out", "--to")
    for more in (
        ("torch", "--sharded"),
        ("dcp", "--shard-bytes", 5),
        ("safetensors", "--sharded", "--shard-bytes", 5),
        ("safetensors", "--sharded", "--part", "a"),
    ):
        message = run(*words, *more, status=2)["error"]["message"]
        assert "Nothing was written" in message


WATCHED = """
import json, re, sys, threading
from pathlib import Path
from everstep.client.exporting import __main__ as exporting
from everstep.client.importing import __main__ as importing
import torch.distributed.checkpoint

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], held())

begun = held()
peak, done = [begun], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
if sys.argv[1] == "import":
    report = importing.imported(Path(sys.argv[2]), sys.argv[3])
else:
    report = exporting.main(sys.argv[2:])
done.set()
watcher.join()
print(json.dumps({"grown": peak[0] - begun, "report": report}), file=sys.stderr)
"""


def grown(*words: object, data: bytes = b"", home: Path) -> int:
    """By how many bytes a process of its own grew at most, without what lies in files."""
    environ = {**os.environ, "EVERSTEP_HOME": str(home), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, words)],
        input=data,
        capture_output=True,
        env=environ,
        check=True,
    )
    return int(json.loads(ended.stderr.splitlines()[-1])["grown"])


@pytest.mark.parametrize("form", ["torch", pytest.param("dcp", marks=pytest.mark.long)])
def test_memory_does_not_grow_with_the_state(
    run: Run, job: str, shared_agent: AgentProcess, tmp_path: Path, form: str
) -> None:
    size, limit = 256 << 20, 100 << 20
    save_file({"w": torch.ones(size // 4 // 2), "v": torch.ones(size // 8)}, "in.safetensors")
    imported(Path("in.safetensors"), job, agent=shared_agent.address)
    assert shared_agent.nvme_dir is not None
    with place_of(shared_agent.nvme_dir, job) as place:
        located = _located(choosing.choose(place, job, None, display.silent))
    words = ("export", "--to", form, "--output", tmp_path / form)
    assert grown(*words, data=located.SerializeToString(), home=tmp_path) < limit
    assert grown("import", tmp_path / form, f"{job}-{form}", home=tmp_path) < limit
    for name in (job, f"{job}-{form}"):
        run("gc", "--job", name, "--all", "--yes")
