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


def test_room_for_a_slower_bus_is_not_taken_from_the_next_captures() -> None:
    """Two steps of 0.15 s and 15 GB at 50 GB/s, of which the rest leaves after the update only."""
    window = seen(compute_s=0.15)
    usual = window.bytes(TOTAL)
    assert window.bytes(TOTAL, pauses=True) == usual, "nothing is known of the next one"
    window.began(1.0)
    window.began(1.31)
    needed = TOTAL - (0.31 - 0.15) * 50e9
    assert usual < 0.92 * 0.15 * 50e9 < needed
    assert window.bytes(TOTAL, pauses=True) == pytest.approx(0.92 * 0.15 * 50e9)
    assert window.bytes(TOTAL) == usual
    window.began(1.64)
    window.began(1.97)
    needed = TOTAL - (0.33 - 0.15) * 50e9
    assert window.bytes(TOTAL, pauses=True) == pytest.approx(needed)
    window.began(2.5)
    window.began(3.0)
    assert window.bytes(TOTAL, pauses=True) == usual


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
    window.observe_update(0.1, -0.05)
    raised = window.bias
    assert lowered < raised < lowered + 0.03
    window.observe_update(0.1, -0.02)
    assert window.bias == raised, "it fitted, with room for a slower bus: nothing to change"


def test_the_bias_stays_within_bounds() -> None:
    window = seen()
    for _ in range(1000):
        window.observe_update(0.1, 1.0)
    assert window.bias == LOWEST_BIAS
    for _ in range(1000):
        window.observe_update(0.1, -0.09)
    assert window.bias == 1.0


def test_what_makes_no_sense_is_not_counted() -> None:
    window = seen()
    window.observe_update(0.0, 1.0)
    window.observe_update(-1.0, 1.0)
    window.observe_bandwidth(0, 1.0)
    window.observe_bandwidth(10, 0.0)
    assert window.bytes(TOTAL) == pytest.approx(FIRST_BIAS * 0.1 * 50e9)


def test_a_bus_that_is_slower_now_and_then_is_allowed_for() -> None:
    """At each sixth snapshot three quarters of the usual speed, as measured on a shared H100: not
    each of those may make the update wait for the 24 ms that are missing."""
    window = seen(compute_s=0.15)
    late_s, copied = [], []
    for number in range(300):
        bandwidth = 50e9 * (0.75 if number % 6 == 5 else 1.0)
        most = window.bytes(TOTAL)
        ended_s = most / bandwidth
        window.observe_bandwidth(most, ended_s)
        window.observe_update(0.15, ended_s - 0.15)
        late_s.append(max(0.0, ended_s - 0.15))
        copied.append(most)
    assert sum(late_s[100:]) / 200 < 0.0001
    assert sum(late_s[:24]) == 0.0, "nor the first ones"
    assert min(copied[100:]) > 0.699 * 0.15 * 50e9


def test_a_bus_that_is_fast_again_is_used_again() -> None:
    window = seen(compute_s=0.15)
    for late_s in (0.03, 0.03, 0.03):
        window.observe_update(0.15, late_s)
    for _ in range(200):
        ended_s = window.bytes(TOTAL) / 50e9
        window.observe_update(0.15, ended_s - 0.15)
    assert 0.65 < window.bias <= 0.67, "up to what leaves room"
