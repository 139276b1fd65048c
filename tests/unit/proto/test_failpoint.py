import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def run(setting: str, code: str) -> subprocess.CompletedProcess[str]:
    program = f"from everstep.proto.failpoint import failpoint\n{code}"
    return subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"PYTHONPATH": os.pathsep.join(sys.path), "EVERSTEP_FAILPOINTS": setting},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


TWICE = "failpoint('a.b.c'); print('once', flush=True); failpoint('a.b.c'); print('twice')"


def test_without_a_setting_nothing_happens() -> None:
    assert run("", TWICE).stdout.split() == ["once", "twice"]


def test_another_point_is_not_affected() -> None:
    assert run("x.y.z=kill", TWICE).stdout.split() == ["once", "twice"]


@pytest.mark.parametrize(("setting", "said"), [("kill", []), ("kill@2", ["once"])])
def test_kill_at_the_nth_passage(setting: str, said: list[str]) -> None:
    result = run(f"a.b.c={setting}", TWICE)
    assert result.returncode == -signal.SIGKILL
    assert result.stdout.split() == said


def test_exit() -> None:
    assert run("a.b.c=exit", TWICE).returncode == 3


def test_error_raises_the_named_errno() -> None:
    code = "try: failpoint('a.b.c')\nexcept OSError as error: print(error.errno)"
    assert run("a.b.c=error:ENOSPC; x=exit", code).stdout.split() == [str(errno.ENOSPC)]


def test_an_unknown_action_ends_the_process() -> None:
    result = run("a.b.c=explode", TWICE)
    assert result.returncode == 1
    assert "unknown action 'explode'" in result.stderr


def test_hold_waits_until_it_is_released(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    Path(f"{gate}.go").touch()
    assert run(f"a.b.c=hold:{gate}", TWICE).stdout.split() == ["once", "twice"]
    assert Path(f"{gate}.reached").exists()
