"""Tickets: once, for a while, so many; and every content comes out exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.agent.tickets import TOKEN_BYTES, Tickets, Verdict


def token(number: int) -> bytes:
    return number.to_bytes(TOKEN_BYTES, "big")


def test_a_ticket_is_good_once() -> None:
    tickets: Tickets[str] = Tickets(2, 10.0)
    tickets.issue(token(1), "one", 0.0)
    assert tickets.redeem(token(1), 1.0) == (Verdict.GRANTED, "one")
    assert tickets.redeem(token(1), 1.0) == (Verdict.USED, None)
    assert tickets.expire(100.0) == []


@pytest.mark.parametrize("shown", [token(2), b"", token(1)[:-1], token(1) + b"\0", bytes(16)])
def test_another_token_is_unknown(shown: bytes) -> None:
    tickets: Tickets[str] = Tickets(2, 10.0)
    tickets.issue(token(1), "one", 0.0)
    assert tickets.redeem(shown, 0.0) == (Verdict.UNKNOWN, None)
    assert tickets.redeem(token(1), 0.0) == (Verdict.GRANTED, "one")


def test_a_ticket_expires_at_its_time_and_not_before() -> None:
    tickets: Tickets[str] = Tickets(4, 10.0)
    tickets.issue(token(1), "one", 0.0)
    tickets.issue(token(2), "two", 5.0)
    assert tickets.expire(9.999) == []
    assert tickets.redeem(token(1), 10.0) == (Verdict.EXPIRED, None)
    assert tickets.expire(10.0) == ["one"]
    assert tickets.redeem(token(1), 10.0) == (Verdict.EXPIRED, None)
    assert tickets.redeem(token(2), 14.999) == (Verdict.GRANTED, "two")


def test_only_so_many_are_outstanding() -> None:
    tickets: Tickets[str] = Tickets(2, 10.0)
    tickets.issue(token(1), "one", 0.0)
    assert not tickets.full
    tickets.issue(token(2), "two", 0.0)
    assert tickets.full
    with pytest.raises(AssertionError):
        tickets.issue(token(3), "three", 0.0)
    tickets.redeem(token(1), 0.0)
    assert not tickets.full


def test_what_is_remembered_of_used_tickets_is_bounded() -> None:
    tickets: Tickets[int] = Tickets(2, 10.0)
    for number in range(100):
        tickets.issue(token(number), number, 0.0)
        tickets.redeem(token(number), 0.0)
    assert tickets.redeem(token(99), 0.0) == (Verdict.USED, None)
    assert tickets.redeem(token(97), 0.0) == (Verdict.UNKNOWN, None)


@given(
    st.lists(
        st.tuples(st.sampled_from(["issue", "redeem", "expire"]), st.integers(0, 5)), max_size=60
    )
)
def test_every_content_comes_out_exactly_once(steps: list[tuple[str, int]]) -> None:
    tickets: Tickets[int] = Tickets(4, 3.0)
    given_in: list[int] = []
    come_out: list[int] = []
    for now, (verb, number) in enumerate(steps):
        if verb == "issue" and not tickets.full:
            given_in.append(len(given_in))
            tickets.issue(token(given_in[-1]), given_in[-1], float(now))
        elif verb == "redeem":
            verdict, content = tickets.redeem(token(number), float(now))
            assert (verdict is Verdict.GRANTED) == (content is not None)
            come_out += [] if content is None else [content]
        elif verb == "expire":
            come_out += tickets.expire(float(now))
        assert len(tickets) == len(given_in) - len(come_out) <= 4
    come_out += tickets.drain()
    assert sorted(come_out) == given_in
