"""The benchmark of resharding runs, at its smallest: bytes are compared in it, times are not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_short_run_moves_what_is_needed_and_no_more() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reshard", "--short"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    met = {target["name"]: target["met"] for target in report["targets"]}
    for case in ("dp4 to dp4", "dp4 to dp3", "dp4 to dp8", "tp2-dp2 to dp4"):
        assert met[f"{case}, bytes moved over needed"]
        assert met[f"{case}, restore(): MiB over the local shards"]
        assert f"{case}, dcp.load over restore" in met
    assert sum(name.startswith("snapshot() of 200 leaves") for name in met) == 5
