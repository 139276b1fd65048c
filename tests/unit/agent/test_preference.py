"""Which snapshot a restore wants first, when the nodes remember different things."""

from everstep.agent.deciding import _preference
from everstep.agent.holdings import JobFact, RoundFact, SnapshotFact
from everstep.agent.tables import JobTable
from everstep.proto.ids import SnapshotId

OLD, ABANDONED, NEW = SnapshotId(1, 2), SnapshotId(1, 9), SnapshotId(2, 3)


def fact(*snapshots: tuple[SnapshotId, str], restored: SnapshotId | None = None) -> JobFact:
    parts = tuple(SnapshotFact(snapshot, 2, stage) for snapshot, stage in snapshots)
    return JobFact("job", 3, 2, snapshots=parts, restored=restored)


def wanted(
    facts: dict[str, JobFact], table: JobTable | None = None, incarnation: int = 3
) -> object:
    key = _preference(table or JobTable(), facts, incarnation)
    return max((OLD, ABANDONED, NEW), key=key)


def test_what_was_left_behind_is_not_wanted() -> None:
    facts = {"n1": fact((OLD, "committed"), restored=OLD), "n2": fact(restored=OLD)}
    assert wanted(facts) == OLD


def test_one_node_that_missed_the_commit_hides_it_from_nobody() -> None:
    """It was started again after the commit, and the job before it was told."""
    late = fact((OLD, "committed"), (NEW, "sealed"), restored=OLD)
    facts = {"n1": fact((OLD, "committed"), (NEW, "committed")), "n2": late}
    assert wanted(facts) == NEW


def test_launches_that_came_to_nothing_change_nothing() -> None:
    table = JobTable()
    table.restored, table.decided_incarnation = OLD, 2
    late = fact((NEW, "sealed"), restored=OLD)
    facts = {"n1": fact((NEW, "committed")), "n2": late}
    assert wanted(facts, table, incarnation=7) == NEW


def test_what_an_older_incarnation_committed_stays_left_behind() -> None:
    table = JobTable()
    table.restored, table.decided_incarnation = OLD, 4
    facts = {"n1": fact((NEW, "committed"), restored=OLD)}
    assert wanted(facts, table, incarnation=5) == OLD


def test_what_is_known_by_its_parity_alone_is_wanted() -> None:
    """All ranks ran on a node that is lost; the others held nothing but parity."""
    parity = RoundFact("plan", NEW, "committed", ("n1", "n2"))
    late = JobFact("job", 3, 2, restored=OLD, rounds=(parity,))
    assert wanted({"n1": fact(), "n2": late}) == NEW
