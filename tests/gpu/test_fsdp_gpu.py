"""FSDP2 with NCCL on two devices: killed, and started again on two and on one.

The runs are those of tests/integration/test_fsdp.py, and so are the promises.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import AgentProcess
from tests.integration.launches import Launches, Seen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices"),
]


def test_two_devices_and_then_two_or_one(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    launches = Launches(start_agent("[memory]\nslots = 5\n"), tmp_path, "cuda")
    try:
        launches.save_and_die(2, ["fsdp"])
        launches.resume(2, ["fsdp"])
        launches.resume(1, ["fsdp"])
    finally:
        launches.close()
    seen = Seen(tmp_path, "fsdp")
    seen.check_saved()
    seen.check_restored("two", same_end=True)
    seen.check_restored("one", same_end=False)
