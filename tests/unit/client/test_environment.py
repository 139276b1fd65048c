"""What launchers say, and what a launch id must hold: equal on all ranks, never torn apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.client.environment import Launch, launch, named_agent, places
from everstep.proto.errors import InvalidConfiguration
from everstep.proto.places import default_places


def torchrun(rank: int = 1, world: int = 2, **more: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "GROUP_WORLD_SIZE": "1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_ERROR_FILE": f"/tmp/torchelastic_ab/none_cd/attempt_0/{rank}/error.json",
    } | more


def slurm(rank: int = 3, **more: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
    } | more


def test_alone() -> None:
    assert launch(environ={}) == Launch(0, 1, 0, "", 0)


def test_torchrun() -> None:
    found = launch(environ=torchrun(rank=1))
    assert (found.rank, found.world, found.local_rank, found.restart_count) == (1, 2, 1, 0)
    assert found.launch_id


def test_slurm_step() -> None:
    assert launch(environ=slurm()) == Launch(3, 8, 1, "77.0.0", 0)
    assert launch(environ=slurm(SLURM_RESTART_COUNT="2")) == Launch(3, 8, 1, "77.0.2", 2)
    assert launch(environ=slurm(SLURM_STEP_NUM_TASKS="4")).world == 4


@pytest.mark.parametrize("step_id", [None, "4294967291", "4294967290", "4294967292"])
def test_a_plain_process_in_a_batch_script_is_alone(step_id: str | None) -> None:
    environ = slurm(rank=0)
    del environ["SLURM_STEP_ID"]
    if step_id is not None:
        environ["SLURM_STEP_ID"] = step_id
    assert launch(environ=environ) == Launch(0, 1, 0, "", 0)


def test_torchrun_within_slurm_is_torchrun() -> None:
    found = launch(environ=slurm() | torchrun(rank=0))
    assert (found.rank, found.world) == (0, 2)


def test_arguments_win_one_by_one() -> None:
    environ = torchrun(rank=1, world=4)
    found = launch(2, environ=environ)
    assert (found.rank, found.world) == (2, 4)
    found = launch(5, 8, 3, "mine", environ=environ)
    assert found == Launch(5, 8, 3, "mine", 0)
    assert launch(launch_id="", environ=environ).launch_id == ""
    assert launch(5, 8, environ={"RANK": "1"}) == Launch(5, 8, 1, "", 0)


@pytest.mark.parametrize(
    "variable",
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT", "GROUP_WORLD_SIZE"],
)
@pytest.mark.parametrize("text", ["", "x", "-1", "1.0", " 1", "1_0", "٣", "9" * 5000])
def test_malformed_numbers_name_their_variable(variable: str, text: str) -> None:
    with pytest.raises(InvalidConfiguration, match=variable) as raised:
        launch(environ=torchrun() | {variable: text})
    assert raised.value.option == variable


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE"])
def test_half_an_environment_names_the_other_half(missing: str) -> None:
    environ = torchrun()
    del environ[missing]
    with pytest.raises(InvalidConfiguration, match=missing):
        launch(environ=environ)


def test_a_rank_outside_its_world() -> None:
    with pytest.raises(InvalidConfiguration, match="RANK"):
        launch(environ=torchrun(rank=2, world=2))
    with pytest.raises(InvalidConfiguration, match="WORLD_SIZE"):
        launch(environ=torchrun(rank=0, world=0))
    for rank, world, local_rank in ((-1, 2, 0), (2, 2, 0), (0, 0, 0), (0, 1, -1)):
        with pytest.raises(InvalidConfiguration):
            launch(rank, world, local_rank, environ={})


def ids(environments: list[dict[str, str]]) -> set[str]:
    return {launch(environ=environ).launch_id for environ in environments}


def test_launches_by_one_torchrun_are_told_apart() -> None:
    def of(rank: int, directory: str, attempt: int) -> dict[str, str]:
        file = f"/tmp/torchelastic_ab/{directory}/attempt_{attempt}/{rank}/error.json"
        return torchrun(rank, TORCHELASTIC_ERROR_FILE=file, TORCHELASTIC_RESTART_COUNT=str(attempt))

    first = ids([of(0, "none_cd", 0), of(1, "none_cd", 0)])
    restarted = ids([of(0, "none_cd", 1), of(1, "none_cd", 1)])
    second = ids([of(0, "none_ef", 0), of(1, "none_ef", 0)])
    assert len(first) == len(restarted) == len(second) == 1
    assert len(first | restarted | second) == 3
    assert "" not in first | restarted | second


def test_nothing_per_host_enters_the_id_under_several_torchruns() -> None:
    """The restart count grows only on the host whose worker failed."""
    hosts = [
        torchrun(
            rank,
            GROUP_WORLD_SIZE="2",
            TORCHELASTIC_RUN_ID="gpt",
            TORCHELASTIC_RESTART_COUNT=str(rank),
            TORCHELASTIC_ERROR_FILE=f"/tmp/{rank}/gpt_{rank}/attempt_{rank}/0/error.json",
        )
        for rank in (0, 1)
    ]
    assert ids(hosts) == {"gpt:29500"}
    unnamed = [{**host, "TORCHELASTIC_RUN_ID": "none"} for host in hosts]
    assert ids(unnamed) == {""}


@pytest.mark.parametrize("file", ["", "/dev/null", "error.json", "/elsewhere/error.json"])
def test_without_torchruns_own_directory(file: str) -> None:
    assert launch(environ=torchrun(TORCHELASTIC_ERROR_FILE=file)).launch_id == ""
    named = torchrun(TORCHELASTIC_ERROR_FILE=file, TORCHELASTIC_RUN_ID="4c2a")
    assert launch(environ=named).launch_id == "4c2a.0"


def test_ranks_set_by_hand_have_no_launch_id() -> None:
    assert launch(environ={"RANK": "0", "WORLD_SIZE": "2"}).launch_id == ""


def test_the_agents_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_agent(environ={}) is None
    assert named_agent(environ={"EVERSTEP_AGENT": "unix:/a/b"}) == "unix:/a/b"
    assert named_agent("unix:///c", environ={"EVERSTEP_AGENT": "unix:/a/b"}) == "unix:/c"
    with pytest.raises(InvalidConfiguration):
        named_agent(environ={"EVERSTEP_AGENT": "localhost:80"})
    environ = {"EVERSTEP_HOME": "/data/x"}
    assert places(environ) == default_places(environ, os.getuid())
    monkeypatch.setenv("EVERSTEP_AGENT", "unix:/from/process")
    assert named_agent() == "unix:/from/process"


_PRINT_ID = """
import sys
from pathlib import Path
from everstep.client.environment import launch
me = launch()
Path(sys.argv[1], f"{me.rank}-{me.restart_count}").write_text(me.launch_id)
sys.exit(me.rank == 1 and me.restart_count == 0)
"""


@pytest.mark.long
@pytest.mark.parametrize("mode", [["--standalone"], ["--master-port=29533"]])
def test_a_real_torchrun_through_a_shell(mode: list[str], tmp_path: Path) -> None:
    """Both restarts of both launches, each worker behind a shell of its own."""
    script = tmp_path / "worker.py"
    script.write_text(_PRINT_ID)
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text(f'"{sys.executable}" "{script}" "$1"\nexit $?\n')
    groups = []
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", *mode, "--nproc-per-node=2"]
        command += ["--max-restarts=1", "--no-python", "sh", str(wrapper), str(out)]
        subprocess.run(command, check=True, timeout=100, capture_output=True)
        groups += [{(out / f"{r}-{n}").read_text() for r in (0, 1)} for n in (0, 1)]
    assert [len(group) for group in groups] == [1] * 4
    assert len(set().union(*groups)) == 4
    assert "" not in set().union(*groups)
