"""Optimizers in codes on parameters that real ranks share: as one process has them."""

from pathlib import Path

from tests.zygotes import Program

_LIMIT_S = 100.0


def test_two_ranks_train_what_one_process_does(tmp_path: Path) -> None:
    script = Path(__file__).parent / "optim_ranks.py"
    meeting = [str(tmp_path / "meeting"), str(tmp_path / "checkpoint")]
    log = tmp_path / "ranks.log"
    ranks = [
        Program("trainer", str(script), str(rank), "2", *meeting, environ={}, log=log)
        for rank in range(2)
    ]
    try:
        ended = [rank.wait(_LIMIT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ended == [0, 0], log.read_text(errors="replace")
