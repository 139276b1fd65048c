"""Triton's interpreter, which runs device code in Python on host memory.

Triton decides when it is imported whether it compiles or interprets, and torch imports it with the
first optimizer. So it is imported here, before any test runs, and with the interpreter on.
"""

import importlib
import importlib.util
import os
import sys

import pytest
import torch


def _import_for_interpreter() -> str:
    """Import the device code; returns why its tests cannot run, if so."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available():
        return "there is a GPU: tests/gpu/test_device_kernels.py runs the compiled code on it"
    if "triton" in sys.modules:
        return "triton was imported before tests/unit/kernels/conftest.py"
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        for name in ("xxh3", "gather", "optimizer"):
            importlib.import_module(f"everstep.kernels.{name}_program_triton")
        importlib.import_module("triton.experimental.gluon")  # by the first launch, if not here
    finally:
        del os.environ["TRITON_INTERPRET"]
    return ""


_OBSTACLE = _import_for_interpreter()


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device code runs on host memory."""
    if _OBSTACLE:
        pytest.skip(_OBSTACLE)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
