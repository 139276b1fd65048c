"""Token buckets: never faster than they say, first come first served, adjustable."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.agent.rates import Rate
from everstep.proto.errors import DeadlineExceeded


def test_the_burst_passes_at_once_and_the_rest_in_time() -> None:
    rate = Rate(100.0, 50)
    assert rate.reserve(50, 0.0) == 0
    assert rate.reserve(100, 0.0) == pytest.approx(1.0)
    assert rate.reserve(100, 0.0) == pytest.approx(2.0)
    assert rate.reserve(0, 1.0) == pytest.approx(1.0)


def test_a_pause_saves_up_no_more_than_the_burst() -> None:
    rate = Rate(100.0, 50)
    rate.reserve(50, 0.0)
    assert rate.reserve(50, 1000.0) == 0
    assert rate.reserve(10, 1000.0) == pytest.approx(0.1)


def test_more_than_the_burst_passes_in_its_own_time() -> None:
    assert Rate(10.0, 1).reserve(101, 0.0) == pytest.approx(10.0)


def test_no_rate_is_no_limit() -> None:
    rate = Rate(None, 1)
    assert [rate.reserve(1 << 40, 0.0) for _ in range(3)] == [0.0] * 3
    assert rate.take(1 << 40)


@given(
    st.lists(st.tuples(st.integers(0, 500), st.floats(0, 3)), min_size=1, max_size=40),
    st.floats(1, 1000),
    st.integers(1, 300),
)
def test_never_more_than_the_burst_and_the_rate_allow(
    requests: list[tuple[int, float]], bytes_s: float, burst_bytes: int
) -> None:
    rate = Rate(bytes_s, burst_bytes)
    now_s, passed, last_s = 0.0, 0, 0.0
    for count, pause_s in requests:
        now_s += pause_s
        at_s = now_s + rate.reserve(count, now_s)
        passed += count
        assert at_s >= last_s - 1e-6
        assert passed <= burst_bytes + bytes_s * at_s + 1e-3
        last_s = at_s


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_what_misses_its_deadline_is_not_booked() -> None:
    clock = Clock()
    rate = Rate(10.0, 10, clock=clock)
    rate.take(10)
    with pytest.raises(DeadlineExceeded, match="10 bytes/s"):
        rate.take(100, clock() + 5)
    assert rate.reserve(1, 0.0) == pytest.approx(0.1)


def test_a_new_rate_holds_for_those_who_wait() -> None:
    rate = Rate(1.0, 1)
    rate.take(1)
    passed = threading.Event()

    def take() -> None:
        if rate.take(10_000, time.monotonic() + 20_000):
            passed.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not passed.wait(0.05)
    rate.adjust(None)
    assert passed.wait(10)
    thread.join()
    assert rate.bytes_s is None


def test_an_adjusted_bucket_starts_from_what_it_had() -> None:
    clock = Clock()
    rate = Rate(100.0, 100, clock=clock)
    rate.take(100)
    rate.adjust(10.0)
    assert rate.reserve(10, 0.0) == pytest.approx(1.0)
    rate.adjust(10.0, 5)
    assert rate.reserve(0, 1000.0) == 0
    assert rate.reserve(10, 1000.0) == pytest.approx(0.5)


def test_who_is_cancelled_gives_back_what_was_booked() -> None:
    rate = Rate(1.0, 1)
    rate.take(1)
    cancelled = threading.Event()
    cancelled.set()
    assert not rate.take(1000, cancelled=cancelled)
    assert rate.reserve(1, time.monotonic()) <= 1.0


def test_all_who_share_it_stay_below_it_together() -> None:
    rate = Rate(1e6, 1000)
    begun = time.monotonic()

    def take() -> None:
        for _ in range(10):
            rate.take(5000, begun + 60)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun >= (200_000 - 1000) / 1e6
