"""When a snapshot goes to NVMe, and what is deleted there."""

from dataclasses import replace

from everstep.agent import actions, events
from everstep.agent.state import Rules
from everstep.proto.ids import SnapshotId

from .deciding import JOB, QUIET, Node, adoption, flushed, shard


def test_flushes_at_an_interval_of_steps() -> None:
    node = Node(replace(QUIET, nvme_interval_steps=10), world=1).launch()
    assert flushed(node, range(1, 35)) == [10, 20, 30]


def test_an_interval_counts_though_no_snapshot_falls_on_it() -> None:
    node = Node(replace(QUIET, nvme_interval_steps=10), world=1).launch()
    assert flushed(node, range(3, 40, 7)) == [10, 24, 31]


def test_a_trainers_own_interval_goes_first() -> None:
    node = Node(replace(QUIET, nvme_interval_steps=10), world=1).launch()
    node.attach(0, incarnation=1, interval=3)
    assert flushed(node, range(1, 10)) == [3, 6, 9]


def test_flushes_at_an_interval_of_seconds() -> None:
    node = Node(replace(QUIET, nvme_interval_s=60.0), world=1).launch()
    found = []
    for step in range(1, 14):
        found += flushed(node, range(step, step + 1))
        node.now_s += 20.0
    assert found == [1, 4, 7, 10, 13]


def test_an_interval_starts_at_the_step_that_was_restored() -> None:
    node = Node(replace(QUIET, nvme_interval_steps=10), world=1).launch()
    node.commit(9)
    node.attach(0, "second")
    node.handle(events.RestoreDecided(JOB, 2, SnapshotId(1, 9)))
    assert flushed(node, range(10, 22)) == [10, 20]
    node = Node(replace(QUIET, nvme_interval_steps=10), world=1).launch()
    node.commit(8)
    node.attach(0, "second")
    node.handle(events.RestoreDecided(JOB, 2, SnapshotId(1, 8)))
    assert flushed(node, range(9, 10)) == []


def test_without_nvme_nothing_is_flushed() -> None:
    node = Node(Rules(nvme=False, nvme_interval_steps=1), world=1).launch()
    assert flushed(node, range(1, 5)) == []
    assert node.handle(events.PersistWanted(JOB)) is None
    node.lose(0)
    assert not node.took(actions.Flush)


def test_a_late_flush_is_skipped_and_counted_never_queued() -> None:
    node = Node(replace(QUIET, nvme_interval_steps=2), world=1).launch(slots=3)
    assert flushed(node, range(1, 7), end_each=False) == [2]
    assert node.job.counters["flushes_skipped"] >= 2
    node.handle(events.FlushEnded(JOB, node.id(2)))
    assert not node.took(actions.Flush)


def test_a_flush_under_way_is_not_late_for_the_steps_after_it() -> None:
    node = Node(replace(QUIET, nvme_interval_steps=10), world=1).launch(slots=3)
    assert flushed(node, range(10, 19), end_each=False) == [10]
    assert "flushes_skipped" not in node.job.counters


def test_a_failed_flush_keeps_what_was_durable_and_counts() -> None:
    node = Node(replace(QUIET, nvme_interval_steps=1), world=1, keep=1).launch()
    flushed(node, range(1, 2))
    node.commit(2)
    node.done.clear()
    node.handle(events.FlushEnded(JOB, node.id(2), "no space left"))
    assert set(node.job.durable) == {node.id(1)}
    assert not node.done
    assert node.job.counters["flushes_failed"] == 1
    assert "no space left" in node.job.last_error
    # Due again at the next commit.
    assert flushed(node, range(3, 4)) == [3]
    assert set(node.job.durable) == {node.id(3)}


def test_retention_deletes_what_it_does_not_keep() -> None:
    node = Node(replace(QUIET, nvme_interval_steps=1), world=1, keep=2).launch()
    flushed(node, range(1, 5))
    deleted = node.took(actions.DeleteDurable)
    assert [a.snapshot.step for a in deleted] == [1, 2]
    assert {s.step for s in node.job.durable} == {3, 4}
    told = [a.snapshot.step for a in node.took(actions.NotifyCommitted) if a.level == "nvme"]
    assert told == [1, 2, 3, 4]


def test_what_is_restored_from_nvme_is_not_deleted_meanwhile() -> None:
    node = Node(replace(QUIET, flush_on_exit=True), world=2, keep=1)
    node.handle(adoption(durable=[(SnapshotId(1, 10), 2)]))
    node.launch("second")
    node.handle(events.RestoreDecided(JOB, 2, SnapshotId(1, 10)))
    node.offer(0, 11)
    node.offer(1, 11)
    # The agent is started anew, and does not know any more that all ranks are done.
    node.job.restoring = {0, 1}
    node.seal(0, 11)
    node.seal(1, 11)
    node.handle(events.PersistWanted(JOB))
    node.handle(events.FlushEnded(JOB, node.id(11)))
    assert not node.took(actions.DeleteDurable)
    assert SnapshotId(1, 10) in node.job.durable


def test_a_step_that_is_taken_again_replaces_its_predecessor() -> None:
    node = Node(QUIET, world=1)
    node.handle(adoption(world=1, durable=[(SnapshotId(1, 10), 1)]))
    node.launch("second")
    node.commit(10)
    node.handle(events.PersistWanted(JOB))
    node.handle(events.FlushEnded(JOB, node.id(10)))
    assert set(node.job.durable) == {SnapshotId(2, 10)}
    # The level has already put one in place of the other.
    assert not node.took(actions.DeleteDurable)


def test_somebody_waits_for_the_newest() -> None:
    node = Node(world=1).launch(slots=3)
    assert node.handle(events.PersistWanted(JOB)) is None
    assert node.handle(events.PersistWanted("other")) is None
    node.commit(1)
    assert node.handle(events.PersistWanted(JOB)) == node.id(1)
    assert node.took(actions.Flush) == [actions.Flush(JOB, node.id(1))]
    assert node.handle(events.PersistWanted(JOB)) == node.id(1)
    node.commit(2)
    assert node.handle(events.PersistWanted(JOB)) == node.id(2)
    assert not node.took(actions.Flush)
    node.handle(events.FlushEnded(JOB, node.id(1)))
    assert node.took(actions.Flush) == [actions.Flush(JOB, node.id(2))]
    node.handle(events.FlushEnded(JOB, node.id(2)))
    assert node.handle(events.PersistWanted(JOB)) == node.id(2)
    assert not node.took(actions.Flush)
    assert not node.job.flush_wanted


def test_a_failed_flush_does_not_cost_the_one_that_is_waited_for() -> None:
    node = Node(world=1).launch(slots=3)
    node.commit(1)
    node.handle(events.PersistWanted(JOB))
    node.commit(2)
    node.handle(events.PersistWanted(JOB))
    node.done.clear()
    node.handle(events.FlushEnded(JOB, node.id(1), "no space left"))
    assert node.took(actions.Flush) == [actions.Flush(JOB, node.id(2))]
    # Tried once: whoever waits hears of the failure.
    node.handle(events.FlushEnded(JOB, node.id(2), "no space left"))
    assert not node.took(actions.Flush)


def test_an_older_snapshot_never_replaces_a_newer_one_on_nvme() -> None:
    node = Node(world=1)
    node.handle(
        adoption(
            world=1,
            shards=[shard(1, 10, 0, 1)],
            durable=[(SnapshotId(2, 10), 1)],
            incarnation=2,
        )
    )
    assert node.handle(events.PersistWanted(JOB)) == SnapshotId(2, 10)
    assert not node.took(actions.Flush)
