"""What the agent's log says of gRPC."""

import logging
from collections.abc import Iterator

import pytest

from everstep.agent.daemon import is_worth_telling

NAME = "grpc._cython.cygrpc"


class ExecuteBatchError(Exception):
    """Named as gRPC's, which nobody can make."""


@pytest.fixture
def grpc_log(caplog: pytest.LogCaptureFixture) -> Iterator[logging.Logger]:
    log = logging.getLogger(NAME)
    log.addFilter(is_worth_telling)
    try:
        yield log
    finally:
        log.removeFilter(is_worth_telling)


def fail(log: logging.Logger, error: Exception) -> None:
    try:
        raise error
    except Exception:
        log.exception("%s raised in core by servicer method [%s]", type(error).__name__, "/Offer")


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_an_answer_too_late_is_no_error(
    grpc_log: logging.Logger, caplog: pytest.LogCaptureFixture, level: int
) -> None:
    with caplog.at_level(level):
        fail(grpc_log, ExecuteBatchError("late"))
    assert "Traceback" not in caplog.text
    assert ("too late for its caller" in caplog.text) == (level == logging.INFO)
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_other_errors_are_told_in_full(
    grpc_log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    fail(grpc_log, ValueError("wrong"))
    assert "Traceback" in caplog.text
    assert caplog.records[0].levelno == logging.ERROR
