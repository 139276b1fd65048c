"""Optimizers in codes on parameters that real ranks share: as one process has them."""

import subprocess
import sys
from pathlib import Path

_LIMIT_S = 100.0


def test_two_ranks_train_what_one_process_does(tmp_path: Path) -> None:
    script = Path(__file__).parent / "optim_ranks.py"
    meeting = [str(tmp_path / "meeting"), str(tmp_path / "checkpoint")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), "2", *meeting],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=_LIMIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
