"""Bytes that rot in memory, on disk and on the wire; disks that are full or stand still; a job of
another size. Of several nodes, the others' parity mends what one has lost."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet import Fleet, Host
from harness import until

pytestmark = pytest.mark.netns
FleetOf = Callable[..., Fleet]
LONG = pytest.mark.long


def started(fleet: Fleet, steps: int = 2) -> Fleet:
    fleet.start()
    fleet.launch()
    fleet.commit(steps, "parity")
    return fleet


def flip(path: Path, offset: int) -> None:
    """One bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def flip_shards(host: Host) -> None:
    """One bit of each snapshot that a node has in memory."""
    for arena in host.arenas():
        slots = int(arena.stem.rpartition("-s")[2])
        size = arena.stat().st_size // slots
        for slot in range(slots):
            flip(arena, slot * size + 150_000)


def flip_parity(host: Host) -> None:
    for path in host.memory.glob("*/parity/*.parity"):
        flip(path, path.stat().st_size // 3)


def test_a_bit_flips_in_a_shard_in_memory(fleet_of: FleetOf) -> None:
    # No flush at the trainers' end: it reads the shard too, and would drop it before the restore.
    fleet = started(fleet_of(options={"nvme": {"interval": "1 steps", "flush_on_exit": False}}))
    fleet.kill_trainers()
    flip_shards(fleet.hosts["n2"])
    found = fleet.relaunch("parity")
    assert "rank 1" in " ".join(found["rejected"]), found
    fleet.commit(1, "parity")
    fleet.lose("n3")
    fleet.start("n3")
    fleet.relaunch("parity")
    fleet.assert_calm()


def test_a_bit_flips_in_parity(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of(parities=2))
    fleet.kill_trainers()
    flip_parity(fleet.hosts["n1"])
    fleet.lose("n4")
    fleet.start("n4")
    fleet.relaunch("parity")
    fleet.assert_calm()


def test_more_rot_than_parity_is_refused(fleet_of: FleetOf) -> None:
    # No flush at the trainers' end: it races with the rot, and what it has written first is good.
    fleet = started(fleet_of(options={"nvme": {"flush_on_exit": False}}))
    fleet.kill_trainers()
    for node_id in ("n1", "n2"):
        flip_shards(fleet.hosts[node_id])
    assert not [path for host in fleet.hosts.values() for path in host.nvme.rglob("*.safetensors")]
    fleet.launch()
    assert "NothingRecoverable" in fleet.refused()
    fleet.assert_calm()


def test_manifests_are_gone_or_from_the_future(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of(parities=2))
    fleet.kill_trainers()
    for node_id in ("n1",):
        for path in fleet.hosts[node_id].memory.glob("*/parity/*.manifest"):
            path.unlink()
    fleet.lose("n4")
    fleet.agent("n1").kill()
    fleet.start("n1", "n4")
    fleet.relaunch("parity")
    fleet.commit(1, "parity")
    fleet.kill_trainers()
    for path in fleet.hosts["n3"].memory.glob("*/parity/*.manifest"):
        data = bytearray(path.read_bytes())
        data[4] ^= 0x40  # the version, or what is read as it
        path.write_bytes(data)
    fleet.agent("n3").kill()
    fleet.lose("n2")
    fleet.start("n2", "n3")
    fleet.relaunch("parity")
    fleet.assert_calm()


def test_bits_flip_on_the_wire(fleet_of: FleetOf) -> None:
    fleet = fleet_of()
    for node_id in fleet.node_ids:
        fleet.network.delay(node_id, 0.0, 0.0, flips=3)
    started(fleet, 4)
    fleet.lose("n2")
    fleet.start("n2")
    fleet.relaunch("parity")
    fleet.commit(1, "parity")
    fleet.assert_calm()


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=LONG) for how in ("zeroed", "missing")] + ["truncated", "swapped"],
)
def test_a_shard_on_one_disk_is_not_what_it_says(fleet_of: FleetOf, how: str) -> None:
    # A step that was not told of in time is flushed all the same, and would push out the older one.
    fleet = started(fleet_of(options={"nvme": {"keep_newest": 8}}))
    fleet.commit(1, "nvme")
    older = fleet.told["nvme"]
    if how == "swapped":
        fleet.commit(1, "nvme")
    fleet.until_parity_is_durable()
    fleet.cut_power()
    damage(fleet.hosts["n3"], how, older[1])
    fleet.start()
    found = fleet.relaunch("nvme")
    assert "nvme" in found["levels"]
    fleet.commit(1, "parity")
    fleet.assert_calm()


def damage(host: Host, how: str, older_step: int) -> None:
    """Make the newest shard on a node's disk another one."""
    newest = sorted(host.nvme.glob("*/step-*/*.safetensors"))[-1]
    if how == "truncated":
        os.truncate(newest, newest.stat().st_size // 2)
    elif how == "zeroed":
        with newest.open("r+b") as file:
            file.seek(8192)
            file.write(bytes(4096))
    elif how == "swapped":
        (other,) = host.shards(older_step)
        assert other != newest
        data = other.read_bytes()
        other.write_bytes(newest.read_bytes())
        newest.write_bytes(data)
    else:
        newest.unlink()


def test_a_disk_stands_still(fleet_of: FleetOf, tmp_path: Path) -> None:
    """What is durable lags; memory and parity go on, and nothing is queued."""
    fleet = fleet_of(options={"nvme": {"interval": "1 steps", "keep_newest": 2}})
    gate = tmp_path / "disk"
    go, reached = Path(f"{gate}.go"), Path(f"{gate}.reached")
    go.touch()
    fleet.start("n1", "n2", "n4")
    fleet.start("n3", failpoints=f"storage.shard.before_write=hold:{gate}")
    fleet.launch()
    fleet.commit(1, "nvme")
    go.unlink()
    reached.unlink()
    fleet.train(1)
    until(reached.exists, "a flush that is held")
    fleet.hear()
    durable = fleet.told["nvme"]
    fleet.commit(6, "memory")
    fleet.hear()
    assert fleet.told["nvme"][1] <= durable[1] + 1
    assert fleet.told["memory"][1] >= durable[1] + 6
    go.touch()
    fleet.commit(1, "nvme")
    assert fleet.told["nvme"] > durable
    fleet.assert_calm()


def test_a_full_disk_costs_what_is_durable_and_nothing_else(
    fleet_of: FleetOf, small_disk: Callable[[Host, int], None]
) -> None:
    fleet = fleet_of()
    small_disk(fleet.hosts["n2"], 1)
    fleet.start()
    fleet.launch()
    lines = fleet.train(1, "nvme", timeout=4.0)[0]
    assert any("space" in line["error"] for line in lines.values()), lines
    assert "nvme" not in fleet.told
    fleet.commit(2, "parity")
    fleet.lose("n3")
    fleet.start("n3")
    fleet.relaunch("parity")


def test_a_job_of_another_size(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of())
    fleet.commit(1, "nvme")
    told, ranks = dict(fleet.told), list(fleet.nodes_of_ranks)
    fleet.kill_trainers()
    fleet.nodes_of_ranks = ranks[:3]
    fleet.launch()
    # What each rank has for itself is given to no other unasked: see test_nodes_resized.py.
    assert "StateMismatch" in fleet.refused()
    # The old size is still there.
    fleet.kill_trainers()
    fleet.nodes_of_ranks = ranks
    fleet.told = told
    fleet.relaunch("nvme")
    fleet.commit(1, "parity")

    # Begun anew with three: groups are those of the nodes that take part now.
    fleet.kill_trainers()
    fleet.nodes_of_ranks = ranks[:3]
    fleet.launch()
    fleet.told = {}
    fleet.commit(3, "parity")
    fleet.lose("n2")
    fleet.start("n2")
    fleet.relaunch("parity")
    fleet.assert_calm()
