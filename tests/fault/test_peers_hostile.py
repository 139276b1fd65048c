"""Whatever an agent's port is told by strangers, zombies and liars: refused, counted, named."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

from everstep.agent.peers import PEER_PROTOCOL
from everstep.proto import agent_pb2, peer_pb2, state_pb2
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.peer_pb2_grpc import PeersStub
from everstep.proto.wire_errors import decode

TIMEOUT_S = 20.0


def _clusters() -> ModuleType:
    path = Path(__file__).parents[1] / "integration" / "clusters.py"
    spec = importlib.util.spec_from_file_location("clusters_for_hostile_peers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two agents that know each other; no test here may hurt them."""
    clusters = _clusters()
    both = clusters.AgentCluster()
    try:
        both.start(2)
        yield both
        # After all that was thrown at them they are one cluster still.
        assert all(node.runs for node in both.nodes.values())
        both.await_members(2)
    finally:
        both.close()


@pytest.fixture
def stub(cluster: Any) -> Iterator[Any]:
    """The service of n1, as anyone who reaches its port may call it."""
    with grpc.insecure_channel(cluster["n1"].endpoint) as channel:
        yield PeersStub(channel)


@pytest.fixture
def member(stub: Any) -> peer_pb2.Sender:
    """How n2 speaks: a report of a stranger is answered with the membership."""
    request = peer_pb2.ReportRequest(
        sender=peer_pb2.Sender(node_id="stranger", boot_id="b", protocol=PEER_PROTOCOL)
    )
    reply = stub.Report(request, timeout=TIMEOUT_S)
    assert not reply.orders
    (entry,) = [entry for entry in reply.view.entries if entry.node_id == "n2"]
    return peer_pb2.Sender(
        node_id="n2",
        boot_id=entry.boot_id,
        epoch=max(e.since_epoch for e in reply.view.entries),
        protocol=PEER_PROTOCOL,
    )


def refusal(call: Any, request: Any) -> str:
    """What kind of error an answer is."""
    with pytest.raises(grpc.RpcError) as raised:
        call(request, timeout=TIMEOUT_S)
    return type(decode(raised.value, "n1")).__name__


def changed(sender: peer_pb2.Sender, **values: Any) -> peer_pb2.Sender:
    other = peer_pb2.Sender()
    other.CopyFrom(sender)
    for name, value in values.items():
        setattr(other, name, value)
    return other


def inventory(sender: peer_pb2.Sender, job: str = "j") -> peer_pb2.InventoryRequest:
    return peer_pb2.InventoryRequest(sender=sender, job=job)


def test_a_member_is_answered(stub: Any, member: peer_pb2.Sender) -> None:
    """Else the refusals below would prove nothing."""
    assert stub.Inventory(inventory(member), timeout=TIMEOUT_S).node_id == "n1"


def test_strangers_and_zombies_are_refused(stub: Any, member: peer_pb2.Sender) -> None:
    for sender in (
        changed(member, node_id="n9"),
        changed(member, boot_id="an older one"),
        changed(member, node_id="../n2"),
        peer_pb2.Sender(),
    ):
        kind = refusal(stub.Inventory, inventory(sender))
        assert kind in {"StaleEpoch", "InvalidName", "Refused"}, sender


def test_another_version_is_refused_with_a_word(stub: Any, member: peer_pb2.Sender) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stub.Inventory(inventory(changed(member, protocol=PEER_PROTOCOL + 1)), timeout=TIMEOUT_S)
    assert "Run the same release on all nodes" in str(decode(raised.value, "n1"))


def test_a_zombies_report_changes_nothing(stub: Any, member: peer_pb2.Sender) -> None:
    """It claims a snapshot of everybody's job, and gets no orders."""
    fact = peer_pb2.JobFact(job="j", incarnation=1 << 40, world=1, newest_incarnation=1 << 40)
    zombie = changed(member, boot_id="an older one")
    request = peer_pb2.ReportRequest(sender=zombie, sequence=1 << 60, term=1 << 60, jobs=[fact])
    reply = stub.Report(request, timeout=TIMEOUT_S)
    assert not reply.orders
    assert not reply.coordinator


def test_a_place_that_is_held_is_not_given_away(stub: Any, member: peer_pb2.Sender) -> None:
    for node_id in ("n1", "n2"):
        claim = peer_pb2.ClaimRequest(
            sender=peer_pb2.Sender(node_id=node_id, boot_id="usurper", protocol=PEER_PROTOCOL),
            address="127.0.0.1:1",
        )
        reply = stub.Claim(claim, timeout=TIMEOUT_S)
        holders = {entry.node_id: entry.boot_id for entry in reply.view.entries}
        assert holders[node_id] != "usurper"
        assert "alive" in reply.refusal or reply.coordinator not in ("", "n1")
    assert stub.Inventory(inventory(member), timeout=TIMEOUT_S).node_id == "n1"


def test_names_that_leave_their_directory_are_refused(stub: Any, member: peer_pb2.Sender) -> None:
    for job in ("../n2", "/etc", "a/b", "", ".hidden", "x" * 200):
        assert refusal(stub.Inventory, inventory(member, job)) == "InvalidName"
        open_ = peer_pb2.OpenRequest(
            sender=member, job=job, incarnation=1, step=1, level="memory", shard={"rank": 0}
        )
        assert refusal(stub.Open, open_) == "InvalidName"


def test_what_is_not_there_is_not_given(stub: Any, member: peer_pb2.Sender) -> None:
    units = peer_pb2.UnitRange(first=0, count=(1 << 64) - 1)
    for request in (
        peer_pb2.OpenRequest(sender=member, job="j", level="memory"),
        peer_pb2.OpenRequest(sender=member, job="j", level="attic", shard={"rank": 0}),
        peer_pb2.OpenRequest(
            sender=member,
            job="j",
            incarnation=1,
            step=1,
            level="nvme",
            shard=peer_pb2.ShardUnits(rank=7, units=[units]),
        ),
        peer_pb2.OpenRequest(
            sender=member,
            job="j",
            incarnation=1,
            step=1,
            level="memory",
            parity=peer_pb2.ParityUnits(plan_id="../p", row=1 << 31, units=units),
        ),
    ):
        assert refusal(stub.Open, request) in {"Refused", "FormatInvalid", "InvalidName"}, request


def test_plans_that_cannot_be_are_refused(stub: Any, member: peer_pb2.Sender) -> None:
    """Before anything of the size that they name is allocated."""
    shard = state_pb2.PlannedShard(
        rank=0, image_bytes=1 << 62, layout_id="l", record_digest=b"d" * 16
    )
    good = state_pb2.ParityPlan(
        plan_id="p",
        job="j",
        incarnation=1,
        step=1,
        world=2,
        code="cauchy-11d",
        parities=1,
        unit_bytes=UNIT_BYTES,
        members=[state_pb2.PlannedMember(node_id=f"n{n}") for n in (1, 2)],
    )
    huge, many, twice, other = (state_pb2.ParityPlan() for _ in range(4))
    for plan in (huge, many, twice, other):
        plan.CopyFrom(good)
    huge.members[0].shards.append(shard)
    many.parities = 1 << 31
    twice.members[1].node_id = "n1"
    other.code = "xor"
    for plan in (huge, many, twice, other):
        request = peer_pb2.RebuildRequest(
            sender=member, plan=plan, units={"first": 0, "count": 1}, usable=["n2/memory"]
        )
        assert refusal(stub.Rebuild, request) == "FormatInvalid", plan


def test_a_message_that_is_too_large_is_not_read(stub: Any, member: peer_pb2.Sender) -> None:
    request = peer_pb2.ReportRequest(sender=member)
    request.jobs.append(peer_pb2.JobFact(job="j", launch_id="x" * (70 << 20)))
    with pytest.raises(grpc.RpcError) as raised:
        stub.Report(request, timeout=TIMEOUT_S)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_only_the_coordinator_decides(cluster: Any, member: peer_pb2.Sender) -> None:
    """n2 is asked, by n1's name even: it says that it is not for it to say."""
    with grpc.insecure_channel(cluster["n2"].endpoint) as channel:
        n2 = PeersStub(channel)
        session = agent_pb2.Session(job="j", rank=0, world=1, process_id="p")
        view = n2.Report(
            peer_pb2.ReportRequest(
                sender=peer_pb2.Sender(node_id="s", boot_id="b", protocol=PEER_PROTOCOL)
            ),
            timeout=TIMEOUT_S,
        ).view
        (boot,) = [entry.boot_id for entry in view.entries if entry.node_id == "n1"]
        sender = changed(member, node_id="n1", boot_id=boot)
        join = peer_pb2.JoinRequest(sender=sender, session=session)
        assert refusal(n2.Join, join) == "CoordinatorUnknown"


def test_refusals_are_counted_by_name(cluster: Any, stub: Any, member: peer_pb2.Sender) -> None:
    before = dict(cluster.status("n1").cluster.refused_calls)
    refusal(stub.Inventory, inventory(changed(member, boot_id="an older one")))
    refusal(stub.Inventory, inventory(changed(member, node_id="n9")))
    after = dict(cluster.status("n1").cluster.refused_calls)
    assert after["n2"] == before.get("n2", 0) + 1
    assert after["strangers"] == before.get("strangers", 0) + 1
