"""`--seed N` repeats one simulation and prints what happened; `--seeds N` simulates so many."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="simulate this seed alone, and print what happened")
    parser.addoption("--seeds", type=int, help="how many seeds to simulate")


@pytest.fixture
def one_seed(request: pytest.FixtureRequest) -> int | None:
    """The seed to look at, if one was named."""
    seed = request.config.getoption("--seed", default=None)
    return int(seed) if seed is not None else None


@pytest.fixture
def seed_count(request: pytest.FixtureRequest) -> int | None:
    """How many seeds, if that was said."""
    count = request.config.getoption("--seeds", default=None)
    return int(count) if count is not None else None
