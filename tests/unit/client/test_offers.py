"""The question for a slot, at the client's end: an agent's socket that a thread plays."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from everstep.client.offers import OfferLine
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import AgentFault, AgentUnavailable, StaleIncarnation
from everstep.proto.places import format_address, offers_socket
from everstep.proto.wire_errors import encode

GRANTED = wire.OfferAnswer(reply=wire.OfferReply(granted=True, slot=2, generation=5))
Answer = Callable[[wire.OfferRequest], bytes | None]


def slot_of_step(request: wire.OfferRequest) -> bytes:
    return wire.OfferAnswer(
        reply=wire.OfferReply(granted=True, slot=request.step)
    ).SerializeToString()


class Agent:
    """Answers as it is told; None: not at all."""

    def __init__(self, socket: Path, answer: Answer) -> None:
        self.address = format_address(socket)
        self.public = socket
        socket.touch()
        offers_socket(socket).parent.mkdir()
        self.path = str(offers_socket(socket))
        self.answer = answer
        self.calls: list[int] = []
        """Steps that came by the call."""
        self.steps: list[int] = []
        """Steps that came by the socket."""
        self.gone = threading.Event()
        """Somebody has hung up."""
        self._peers: list[socket.socket] = []
        self.listen()

    def listen(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=(self._listener,))
        self._thread.start()

    def end(self) -> None:
        """As SIGKILL would."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for peer in self._peers:
            peer.close()
        self._peers.clear()
        os.unlink(self.path)

    def _serve(self, listener: socket.socket) -> None:
        threads = []
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                break
            self._peers.append(peer)
            threads.append(threading.Thread(target=self._answer, args=(peer,)))
            threads[-1].start()
        for peer in self._peers:
            peer.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()

    def _answer(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError):  # whoever asked has hung up
            while data := peer.recv(1 << 16):
                request = wire.OfferRequest.FromString(data)
                self.steps.append(request.step)
                answer = self.answer(request)
                if answer is not None:
                    peer.send(answer)
        self.gone.set()

    def start(self, method: str, request: wire.OfferRequest, timeout_s: float) -> Any:
        """As `Channel.start`."""
        assert method == "Offer"
        self.calls.append(request.step)
        return SimpleNamespace(result=lambda: wire.OfferReply(granted=True, slot=99))


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    found = Agent(tmp_path / "agent.sock", slot_of_step)
    yield found
    if os.path.exists(found.path):
        found.end()


@pytest.fixture
def line(agent: Agent) -> Iterator[OfferLine]:
    found = OfferLine(agent)  # type: ignore[arg-type]
    yield found
    found.hang_up()


def ask(line: OfferLine, agent: Agent, step: int, timeout_s: float = 10.0) -> int:
    return line.ask(wire.OfferRequest(step=step), timeout_s).result().slot


def test_questions_are_answered_over_one_connection(agent: Agent, line: OfferLine) -> None:
    assert [ask(line, agent, step) for step in (1, 2, 3)] == [1, 2, 3]
    assert len(agent._peers) == 1 and not agent.calls


@pytest.mark.parametrize("left", [False, True], ids=["no socket", "nobody listens"])
def test_without_a_socket_the_call_is_made(agent: Agent, line: OfferLine, left: bool) -> None:
    agent.end()
    if left:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(agent.path)
    assert [ask(line, agent, step) for step in (1, 2)] == [99, 99]
    assert (agent.calls, agent.steps) == ([1, 2], [])
    if left:
        os.unlink(agent.path)


def test_nobody_but_the_agent_is_believed(
    agent: Agent, line: OfferLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimpleNamespace(st_uid=os.getuid() + 1)
    with monkeypatch.context() as patched:
        patched.setattr(type(agent.public), "lstat", lambda path: other)
        assert ask(line, agent, 1) == 99
    assert ask(line, agent, 2) == 2
    assert (agent.calls, agent.steps) == ([1], [2])


def test_another_agent_at_the_same_place_is_found(agent: Agent, line: OfferLine) -> None:
    assert ask(line, agent, 1) == 1
    agent.end()
    agent.listen()
    assert ask(line, agent, 2) == 2
    agent.end()
    assert ask(line, agent, 3) == 99
    assert (agent.calls, agent.steps) == ([3], [1, 2])


def test_an_answer_that_does_not_come_in_time(agent: Agent, line: OfferLine) -> None:
    agent.answer = lambda request: None
    with pytest.raises(AgentUnavailable, match="deadline exceeded"):
        ask(line, agent, 1, timeout_s=0.01)
    assert agent.gone.wait(10), "it is taken back"
    agent.answer = slot_of_step
    assert ask(line, agent, 2) == 2, "and not the answer to the question before"
    assert len(agent._peers) == 2


def test_a_question_that_was_dropped_is_not_answered_by_the_next(
    agent: Agent, line: OfferLine
) -> None:
    dropped = line.ask(wire.OfferRequest(step=1), 10.0)
    assert ask(line, agent, 2) == 2
    assert dropped.result().slot == 99
    assert ask(line, agent, 3) == 3
    assert len(agent._peers) == 2 and agent.calls == [1]


def test_an_agent_that_hangs_up_is_asked_by_the_call(agent: Agent, line: OfferLine) -> None:
    """It has no room, is ending, or died: the call says what is wrong, if anything is."""
    agent.answer = lambda request: None
    asked = line.ask(wire.OfferRequest(step=1), 10.0)
    agent.end()
    assert asked.result().slot == 99
    agent.listen()
    agent.answer = slot_of_step
    assert ask(line, agent, 2) == 2
    assert (agent.calls, agent.steps) == ([1], [1, 2])


def test_what_the_agent_raises_is_raised(agent: Agent, line: OfferLine) -> None:
    error = encode(StaleIncarnation("gpt", 3, 4))
    agent.answer = lambda request: wire.OfferAnswer(error=error).SerializeToString()
    with pytest.raises(StaleIncarnation, match="gpt"):
        ask(line, agent, 1)
    agent.answer = lambda request: wire.OfferAnswer(error=b"?").SerializeToString()
    with pytest.raises(AgentFault):
        ask(line, agent, 2)
    agent.answer = lambda request: b"\xff\xff\xff"
    with pytest.raises(AgentFault):
        ask(line, agent, 3)
    agent.answer = slot_of_step
    assert ask(line, agent, 4) == 4


def test_a_forked_child_leaves_its_parents_connection_alone(agent: Agent, line: OfferLine) -> None:
    assert ask(line, agent, 1) == 1
    pid = os.fork()
    if pid == 0:
        line.hang_up()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert ask(line, agent, 2) == 2
    assert len(agent._peers) == 1


def test_the_agent_sees_who_hangs_up_though_a_child_holds_the_connection(
    agent: Agent, line: OfferLine
) -> None:
    assert ask(line, agent, 1) == 1
    ends, lives = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(lives)
        os.read(ends, 1)
        os._exit(0)
    try:
        line.hang_up()
        assert agent.gone.wait(10)
    finally:
        os.close(lives)
        os.close(ends)
        os.waitpid(pid, 0)
