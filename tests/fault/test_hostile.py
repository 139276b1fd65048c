"""Whatever arrives on the socket: refused with a reason or ignored, and the next snapshot works.

A real trainer trains on the same agent all the while. Nothing received may end the agent, reach a
path of the sender's choice, disturb the trainer's session, or leave a traceback behind.
"""

import contextlib
import math
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness import Node, Trainer, TrainerError, until

from everstep.proto import agent_pb2 as wire
from everstep.proto.envelope import seal
from everstep.proto.errors import (
    EverstepError,
    FormatInvalid,
    InvalidName,
    OutOfSpace,
    RankClaimed,
    Refused,
    StaleIncarnation,
)
from everstep.proto.state_pb2 import Record
from everstep.snapshot.layout import LeafSpec, Part, encode, pack
from everstep.snapshot.record import seal_record

MOST = (1 << 64) - 1
NAMES = [
    "../evil",
    "..",
    ".",
    ".hidden",
    "/etc/evil",
    "a/b",
    "",
    "x" * 200,
    "a\0b",
    "a\n",
    "-\u202e",
    "\u00e9",
    "a b",
    "%2e%2e",
]


class Bystander:
    """The honest trainer, and the agent's view of it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.agent = node.start_agent()
        self.heard = 0
        self.trainer: Trainer = node.trainer()
        self.node.note(self.trainer.run(1))
        self.session = wire.Session(job="job", rank=0, world=1, process_id="stranger")
        self.session.incarnation = node.job().incarnation

    def assert_unmoved(self) -> None:
        (line,) = self.node.note(self.trainer.run(1))
        assert line["state"] == "memory", line
        assert self.agent.alive
        said = self.agent.text()[self.heard :]
        self.heard += len(said)
        assert "Traceback" not in said, said
        job = self.node.job()
        assert (job.incarnation, job.ranks[0].attached) == (1, True)


@pytest.fixture(scope="module")
def bystander(zygotes: Any) -> Iterator[Bystander]:
    node = Node(zygotes)
    node.options["limits"] = {"max_message_bytes": 1 << 20}
    yield Bystander(node)
    node.close()


def attach(node: Node, request: wire.AttachRequest) -> wire.Notice:
    """The first notice of a session, which ends with it."""
    from everstep.proto.wire_errors import decode

    with node.stub() as stub:
        stream = stub.Attach(request, timeout=10.0)
        try:
            return next(stream)
        except grpc.RpcError as error:
            raise decode(error, node.address) from None
        finally:
            stream.cancel()


def everything_beneath(*roots: Path) -> set[Path]:
    return {path for root in roots for path in root.rglob("*")}


def in_session(job: str) -> wire.Session:
    return wire.Session(job=job, rank=0, world=1, process_id="stranger", incarnation=1)


def layout_of(name: str = "leaf", elements: int = 4) -> tuple[bytes, str]:
    spec = LeafSpec(name, "float32", (elements,), 0, 4 * elements, False)
    layout = pack([Part(name, "tree", "builtins.dict", False)], [spec], {}, {})
    return encode(layout), layout.layout_id


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_job_names(bystander: Bystander, name: str) -> None:
    """By every call, raw; and by the client."""
    node = bystander.node
    before = everything_beneath(node.memory, node.nvme, node.base)
    session = in_session(name)
    layout, layout_id = layout_of()
    calls: list[tuple[str, Any]] = [
        ("Declare", wire.DeclareRequest(session=session, layout=layout, layout_id=layout_id)),
        ("Declare", wire.DeclareRequest(session=session)),
        ("Offer", wire.OfferRequest(session=session, step=1)),
        ("Abandon", wire.AbandonRequest(session=session, step=1)),
        ("Restore", wire.RestoreRequest(session=session)),
        ("Detach", wire.DetachRequest(session=session)),
    ]
    if name:
        calls.append(("Persist", wire.PersistRequest(job=name, timeout_s=1.0)))
    for method, request in calls:
        with pytest.raises((InvalidName, FormatInvalid)) as refused:
            node.ask(method, request)
        assert isinstance(refused.value, InvalidName), (method, refused.value)
    with pytest.raises(InvalidName, match="Nothing was written"):
        attach(node, wire.AttachRequest(session=session, pid=os.getpid()))
    for method, request in (
        ("Collect", wire.CollectRequest(job=name or "-", everything=True)),
        ("Verify", wire.VerifyRequest(job=name or "-")),
        ("Status", wire.StatusRequest(job=name or "-")),
    ):
        try:
            answer = node.ask(method, request)
        except InvalidName:
            continue
        assert answer in (
            wire.CollectReply(),
            wire.VerifyReply(),
        ) or not list(answer.jobs), (method, answer)
    with pytest.raises(TrainerError) as raised:
        node.start_trainer().do("connect", address=node.address, job=name)
    assert raised.value.kind == "InvalidName"
    assert "valid job name" in raised.value.message
    after = everything_beneath(node.memory, node.nvme, node.base) - before
    assert all(path.suffix == ".log" for path in after), after
    bystander.assert_unmoved()


def record(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "job": "job",
        "incarnation": 1,
        "step": 999,
        "rank": 0,
        "world": 1,
        "layout_id": "0" * 32,
        "image_bytes": 4096,
        "unit_bytes": 1 << 20,
        "unit_digests": bytes(16),
    }
    return Record(**(fields | changes))


def with_own_session(bystander: Bystander) -> wire.Session:
    """The honest trainer's very session, which whoever reads its memory could send."""
    with bystander.node.stub() as stub:
        del stub
    identity = bystander.trainer.do("identity")
    return wire.Session(**identity)


def test_seals(bystander: Bystander) -> None:
    """Records that were never granted, of other shards, or no records at all."""
    node = bystander.node
    session = with_own_session(bystander)

    def sealed(body: bytes, **changes: Any) -> wire.SealRequest:
        fields = {"session": session, "step": 999, "slot": 0, "generation": 1, "record": body}
        return wire.SealRequest(**(fields | changes))

    good = seal_record(record())
    bad: list[wire.SealRequest] = [
        sealed(b""),
        sealed(b"\0" * 100),
        sealed(random.Random(1).randbytes(5000)),
        sealed(good[:-1]),
        sealed(good + b"\0"),
        sealed(seal("layout", record().SerializeToString())),
        sealed(seal("record", b"\xff" * 40)),
        sealed(good[:10] + struct.pack("<I", 1 << 31) + good[14:]),
        sealed(seal_record(record(job="other"))),
        sealed(seal_record(record(job="../evil"))),
        sealed(seal_record(record(rank=1, world=2))),
        sealed(seal_record(record(rank=5))),
        sealed(seal_record(record(step=998))),
        sealed(seal_record(record(incarnation=2))),
        sealed(seal_record(record(image_bytes=MOST))),
        sealed(seal_record(record(image_bytes=1 << 50))),
        sealed(seal_record(record(unit_bytes=0))),
        sealed(seal_record(record(unit_bytes=1))),
        sealed(seal_record(record(unit_digests=b"123"))),
        sealed(seal_record(record(replica_samples=b"123"))),
    ]
    for request in bad:
        with pytest.raises(FormatInvalid):
            node.ask("Seal", request)
    for request in (
        sealed(good),
        sealed(good, slot=1),
        sealed(good, slot=(1 << 32) - 1),
        sealed(good, generation=MOST),
    ):
        reply = node.ask("Seal", request)
        assert not reply.accepted
        assert "was not granted that slot" in reply.reason
    with pytest.raises((StaleIncarnation, FormatInvalid)):
        node.ask("Seal", sealed(good, session=bystander.session))
    # What is committed cannot be said anew.
    step = node.committed("memory")[-1][1]
    again = sealed(seal_record(record(step=step)), step=step)
    for slot in (0, 1):
        again.slot = slot
        try:
            assert not node.ask("Seal", again).accepted
        except EverstepError:
            pass
    node.assert_all_intact()
    bystander.assert_unmoved()


def test_sessions(bystander: Bystander) -> None:
    """Strangers, wrong numbers, and the honest trainer's rank."""
    node = bystander.node
    stranger, own = bystander.session, with_own_session(bystander)

    def changed(session: wire.Session, **fields: Any) -> wire.Session:
        copy = wire.Session()
        copy.CopyFrom(session)
        for name, value in fields.items():
            setattr(copy, name, value)
        return copy

    layout, layout_id = layout_of()
    for session in (
        stranger,
        changed(own, incarnation=0),
        changed(own, incarnation=MOST),
        changed(own, rank=7),
        changed(own, job="unknown"),
        wire.Session(job="job"),
    ):
        for method, request in (
            ("Offer", wire.OfferRequest(session=session, step=5000)),
            ("Abandon", wire.AbandonRequest(session=session, step=1, reason="x" * 100_000)),
            ("Detach", wire.DetachRequest(session=session)),
            ("Declare", wire.DeclareRequest(session=session, layout=layout, layout_id=layout_id)),
            ("Declare", wire.DeclareRequest(session=session, round=1)),
        ):
            with pytest.raises(StaleIncarnation):
                node.ask(method, request)
    assert not (node.memory / "unknown").exists()
    pid = bystander.trainer.process.pid
    for request in (
        wire.AttachRequest(session=wire.Session(job="job", world=1, process_id="x"), pid=2**40),
        wire.AttachRequest(
            session=wire.Session(job="job", world=1, process_id="x"), pid=-1, pid_started_s=math.nan
        ),
        wire.AttachRequest(session=wire.Session(job="job", world=1, process_id="x"), launch_id="y"),
    ):
        with pytest.raises(RankClaimed, match=f"process {pid}"):
            attach(node, request)
    for fields in (
        {"rank": 1, "world": 1},
        {"rank": 0, "world": 0},
        {"rank": (1 << 32) - 1, "world": (1 << 32) - 1},
        {"rank": 0, "world": (1 << 32) - 1},
    ):
        session = wire.Session(job="numbers", process_id="x", **fields)
        with pytest.raises(Refused, match="not possible"):
            attach(node, wire.AttachRequest(session=session, pid=os.getpid()))
    assert not (node.memory / "numbers").exists()
    bystander.assert_unmoved()


@pytest.mark.parametrize("pid", [-1, 0, -(2**63), 2**63 - 1, 2**31])
def test_strange_pids_claim_nothing(bystander: Bystander, pid: int) -> None:
    """Who says that it is no process cannot keep the next one out, nor the next agent down."""
    node = bystander.node
    job = f"pid{pid % 97}"
    for process_id, incarnation in (("first", 1), ("second", 2)):
        session = wire.Session(job=job, rank=0, world=1, process_id=process_id)
        request = wire.AttachRequest(session=session, pid=pid, pid_started_s=math.nan)
        assert attach(node, request).attached.incarnation == incarnation
    bystander.assert_unmoved()


def test_highest_numbers(bystander: Bystander) -> None:
    """The largest incarnation or step leaves a job that others can still use."""
    node = bystander.node
    session = wire.Session(job="high", rank=0, world=1, process_id="a", incarnation=MOST)
    try:
        attach(node, wire.AttachRequest(session=session, pid=os.getpid()))
    except EverstepError:
        pass
    trainer = node.trainer(job="high")
    assert trainer.run(1)[0]["state"] == "memory"
    own = wire.Session(**trainer.do("identity"))
    for step in (1 << 63, MOST):
        reply = node.ask("Offer", wire.OfferRequest(session=own, step=step))
        assert reply.granted or reply.reason
        node.ask("Abandon", wire.AbandonRequest(session=own, step=step, reason="a joke"))
    trainer.kill()
    trainer = node.trainer(job="high")
    assert trainer.do("restore")["step"] == 1
    assert trainer.run(1)[0]["state"] == "memory"
    trainer.kill()
    bystander.assert_unmoved()


def test_layouts(bystander: Bystander) -> None:
    node = bystander.node
    own = with_own_session(bystander)
    layout, layout_id = layout_of()

    def declare(body: bytes, name: str = layout_id) -> wire.DeclareRequest:
        return wire.DeclareRequest(session=own, layout=body, layout_id=name)

    for request in (
        declare(b"\0"),
        declare(random.Random(2).randbytes(3000)),
        declare(layout[:-1]),
        declare(layout, "../../evil"),
        declare(layout, "0" * 32),
        declare(layout, ""),
        declare(seal("record", b"")),
        declare(seal("layout", b"\xff" * 100)),
        wire.DeclareRequest(session=own, candidates=["a", "b"], candidate_digests=b"12", round=1),
        wire.DeclareRequest(session=own, candidate_digests=bytes(16), round=1),
        wire.DeclareRequest(session=own, round=1, participants=[own.rank, 1 << 31]),
        wire.DeclareRequest(session=own, round=1, participants=[own.rank, own.rank]),
        wire.DeclareRequest(session=own, round=1, joining=True, participants=[own.rank + 1]),
    ):
        with pytest.raises(FormatInvalid):
            node.ask("Declare", request)
    huge, huge_id = layout_of(elements=1 << 44)
    before = everything_beneath(node.memory)
    with pytest.raises((OutOfSpace, FormatInvalid)):
        node.ask("Declare", declare(huge, huge_id))
    assert {p.suffix for p in everything_beneath(node.memory) - before} <= {"", ".layout"}
    bystander.assert_unmoved()


def test_other_calls(bystander: Bystander) -> None:
    node = bystander.node
    own = with_own_session(bystander)
    for timeout_s in (math.nan, -1.0, math.inf, -math.inf, 1e300, 0.0):
        reply = node.ask("Persist", wire.PersistRequest(job="job", timeout_s=timeout_s))
        assert reply.durable or reply.reason, timeout_s
    for job in ("unknown", "job"):
        answer = node.ask("Verify", wire.VerifyRequest(job=job, step=MOST, levels=["x", ""]))
        assert not answer.shards
    with pytest.raises(Refused, match="trainer attached"):
        node.ask("Collect", wire.CollectRequest(job="job", everything=True))
    for request in (
        wire.RestoreRequest(session=own, levels=["memroy"]),
        wire.RestoreRequest(session=own, to_step=MOST),
        wire.RestoreRequest(session=bystander.session, to_step=1, levels=["x"] * 1000),
    ):
        with pytest.raises(EverstepError):
            node.ask("Restore", request)
    with pytest.raises(EverstepError):
        node.ask("Abandon", wire.AbandonRequest(session=own, step=1, reason="x" * (2 << 20)))
    bystander.assert_unmoved()


def http2(*frames: tuple[int, int, int, bytes]) -> bytes:
    """A client preface and frames of (type, flags, stream, body)."""
    raw = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for kind, flags, stream, body in frames:
        raw += struct.pack(">I", len(body))[1:] + bytes([kind, flags])
        raw += struct.pack(">I", stream) + body
    return raw


CHANCE = random.Random(3)
RAW: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(100_000),
    "noise": CHANCE.randbytes(100_000),
    "http1": b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n" * 100,
    "pickle": b"cos\nsystem\n(S'touch /tmp/evil'\ntR." * 50,
    "preface": http2(),
    "noise after the preface": http2() + CHANCE.randbytes(50_000),
    "huge frame": http2((4, 0, 0, b"")) + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "headers that are none": http2((4, 0, 0, b""), (1, 4, 1, CHANCE.randbytes(500))),
    "window of nothing": http2((4, 0, 0, struct.pack(">HI", 4, 0x7FFFFFFF)), (8, 0, 0, bytes(4))),
    "settings flood": http2(*[(4, 0, 0, b"")] * 3000),
    "ping flood": http2((4, 0, 0, b""), *[(6, 0, 0, bytes(8))] * 3000),
    "reset flood": http2((4, 0, 0, b""), *[(3, 0, n, bytes(4)) for n in range(1, 4001, 2)]),
}


@pytest.mark.parametrize("case", RAW)
def test_bytes(bystander: Bystander, case: str) -> None:
    """No gRPC at all, or none that anybody should send."""
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as visitor:
            visitor.settimeout(10.0)
            visitor.connect(str(bystander.node.socket))
            try:
                visitor.sendall(RAW[case])
                visitor.shutdown(socket.SHUT_WR)
                while visitor.recv(1 << 16):
                    pass
            except (ConnectionError, TimeoutError):
                pass
    assert not Path("/tmp/evil").exists()
    bystander.assert_unmoved()


def test_methods_and_messages_that_do_not_exist(bystander: Bystander) -> None:
    node = bystander.node

    def same(data: bytes) -> bytes:
        return data

    with grpc.insecure_channel(node.address) as channel:
        for method in ("Nothing", "../Attach", "Offer"):
            for body in (b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", CHANCE.randbytes(2000)):
                call = channel.unary_unary(f"/everstep.agent.v1.Agent/{method}", same, same)
                with pytest.raises(grpc.RpcError):
                    call(body, timeout=10.0)
    # gRPC itself logs what it could not parse.
    said = bystander.agent.text()[bystander.heard :]
    assert said.count("Traceback") == said.count("DecodeError: "), said
    bystander.heard += len(said)
    bystander.assert_unmoved()


def test_private_socket_is_private(bystander: Bystander) -> None:
    """What stands behind the door cannot be reached past it by another user."""
    private = bystander.node.socket.parent / "private"
    assert private.stat().st_mode & 0o077 == 0
    assert bystander.node.socket.stat().st_mode & 0o077 == 0
    assert bystander.node.memory.stat().st_mode & 0o077 == 0
    for path in everything_beneath(bystander.node.memory, bystander.node.nvme):
        assert path.stat().st_mode & 0o077 == 0, path


def flood(node: Node, make: Callable[[int], Any], count: int) -> None:
    with node.stub() as stub:
        calls = [make(number)(stub) for number in range(count)]
        for call in calls:
            with pytest.raises(grpc.RpcError):
                call.result(timeout=30.0)


def test_many_at_once(bystander: Bystander) -> None:
    """Hundreds of calls and sessions at one time; the trainer's own stay quick."""
    node = bystander.node
    stranger = bystander.session
    request = wire.OfferRequest(session=stranger, step=1)
    flood(node, lambda _: lambda stub: stub.Offer.future(request, timeout=20.0), 300)
    with contextlib.ExitStack() as visitors:
        for _ in range(100):
            visitor = visitors.enter_context(socket.socket(socket.AF_UNIX))
            visitor.connect(str(node.socket))
        lines = node.note(bystander.trainer.run(3))
        assert [line["state"] for line in lines] == ["memory"] * 3
    until(lambda: len(os.listdir(f"/proc/{bystander.agent.pid}/fd")) < 60, "their end")
    bystander.assert_unmoved()


def test_the_bystander_restores(bystander: Bystander) -> None:
    """After all that: what the honest trainer was told is there, bit for bit."""
    node = bystander.node
    newest = node.committed("memory")[-1]
    node.assert_all_intact()
    bystander.trainer.kill()
    bystander.trainer = node.trainer()
    node.assert_restored(bystander.trainer.do("restore"), step=newest[1])
    bystander.agent.kill()
    bystander.agent = node.start_agent()
    node.assert_nothing_left_over()
