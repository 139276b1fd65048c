"""How much is copied before an update."""

import pytest

from everstep.snapshot.window import FIRST_BIAS, LOWEST_BIAS, RECENT, Window

TOTAL = 15 * 10**9


def seen(*, compute_s: float = 0.1, bandwidth: float = 50e9) -> Window:
    window = Window()
    window.observe_update(compute_s, None)
    window.observe_bandwidth(int(bandwidth), 1.0)
    return window


def test_nothing_before_both_were_measured() -> None:
    window = Window()
    assert window.bytes(TOTAL) == 0
    assert window.compute_s is None
    window.observe_update(0.1, None)
    assert window.bytes(TOTAL) == 0
    window.observe_bandwidth(50, 1e-9)
    assert window.bytes(TOTAL) == pytest.approx(FIRST_BIAS * 0.1 * 50e9)


def test_what_earlier_captures_kept_from_a_new_one_counts() -> None:
    window = seen()
    whole = window.bytes(TOTAL)
    window.observe_wait(0.04)
    assert window.bytes(TOTAL) == pytest.approx(0.6 * whole, rel=1e-6)
    window.observe_wait(0.0)
    assert window.bytes(TOTAL) == pytest.approx(0.6 * whole, rel=1e-6), "it may alternate"
    window.observe_wait(-0.01)
    assert window.bytes(TOTAL) == whole
    window.observe_wait(1.0)
    assert window.bytes(TOTAL) == 0


def test_a_wait_that_a_larger_window_would_end_does_not_make_it_smaller() -> None:
    """Two steps of 0.15 s for 15 GB at 50 GB/s: 7 GB before the update leave 8 for the second."""
    window = seen(compute_s=0.15)
    whole = window.bytes(TOTAL)
    window.observe_wait(0.08)
    assert window.bytes(TOTAL) < 0.5 * whole
    window.began(1.0)
    window.began(1.36)
    assert window.bytes(TOTAL) == whole
    window.began(1.51)
    assert window.bytes(TOTAL) < 0.5 * whole, "at every step the bus is too slow for it"


def test_the_shortest_recent_step_counts() -> None:
    window = seen(compute_s=0.1)
    for _ in range(RECENT - 1):
        window.observe_update(10.0, None)
    assert window.compute_s == 0.1
    window.observe_update(10.0, None)
    assert window.compute_s == 10.0


def test_one_slow_copy_among_many_does_not_count() -> None:
    window = seen()
    for seconds in (1.0, 100.0, 1.0):
        window.observe_bandwidth(50 * 10**9, seconds)
    assert window.bytes(TOTAL) == pytest.approx(FIRST_BIAS * 0.1 * 50e9)


def test_late_copies_lower_the_bias_and_early_ones_raise_it_slowly() -> None:
    window = seen()
    window.observe_update(0.1, 0.005)
    lowered = window.bias
    assert lowered < FIRST_BIAS - 0.04
    window.observe_update(0.1, -0.01)
    raised = window.bias
    assert lowered < raised < lowered + 0.03
    window.observe_update(0.1, -0.001)
    assert window.bias == raised, "it fitted: nothing to change"


def test_the_bias_stays_within_bounds() -> None:
    window = seen()
    for _ in range(1000):
        window.observe_update(0.1, 1.0)
    assert window.bias == LOWEST_BIAS
    for _ in range(1000):
        window.observe_update(0.1, -0.05)
    assert window.bias == 1.0


def test_what_makes_no_sense_is_not_counted() -> None:
    window = seen()
    window.observe_update(0.0, 1.0)
    window.observe_update(-1.0, 1.0)
    window.observe_bandwidth(0, 1.0)
    window.observe_bandwidth(10, 0.0)
    assert window.bytes(TOTAL) == pytest.approx(FIRST_BIAS * 0.1 * 50e9)
