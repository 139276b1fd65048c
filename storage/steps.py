"""The step directories of one job on disk: which are committed, and how they come and go.

Owns the meaning of ``step-000000001234`` and ``.superseded-step-000000001234`` with their
``commit``. Promises that at every moment, power loss included, each committed snapshot is readable
under one of the two names until its successor is committed or it is deleted, and that a directory
loses its commit before anything else in it. Does not look at shards.
"""

from dataclasses import dataclass

from everstep.proto import state_pb2
from everstep.proto.errors import FormatInvalid
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import SnapshotId, parse_step_directory, step_directory
from everstep.storage.directory import Directory
from everstep.storage.identity import check_snapshot, parse_commit, snapshot_of
from everstep.storage.jobs import sweep_partial
from everstep.storage.level import Problem

COMMIT = "commit"
_ASIDE = ".superseded-"


@dataclass(frozen=True, slots=True)
class CommittedStep:
    """A snapshot on disk, and the name of the directory that holds it."""

    directory_name: str
    commit: state_pb2.Commit


def committed_steps(
    directory: Directory, job: str
) -> tuple[dict[SnapshotId, CommittedStep], list[Problem]]:
    """All committed snapshots, and the commits that cannot be used."""
    found, problems = {}, []
    # Hidden names sort first, so that a snapshot under both names is taken from its own.
    for name in directory.directories():
        if _step_of(name) is None:
            continue
        try:
            step = _read(directory, name, job)
        except FormatInvalid as error:
            problems.append(Problem(error.where, error.problem))
            continue
        if step is not None:
            found[snapshot_of(step.commit)] = step
    return found, problems


def find_step(directory: Directory, job: str, snapshot: SnapshotId) -> CommittedStep:
    """One committed snapshot.

    Raises:
        FormatInvalid: If it is not here, or its commit cannot be used.
    """
    name = step_directory(snapshot.step)
    problem: FormatInvalid | None = None
    for candidate in (name, _ASIDE + name):
        try:
            step = _read(directory, candidate, job)
        except FormatInvalid as error:
            problem = problem or error
            continue
        if step is not None and snapshot_of(step.commit) == snapshot:
            return step
    raise problem or FormatInvalid(
        str(directory.path / name), f"{snapshot} is not committed on this disk"
    )


def make_room(directory: Directory, job: str, snapshot: SnapshotId) -> None:
    """Make the directory of a step that is to be written; a committed one goes aside."""
    name = step_directory(snapshot.step)
    if not _has_commit(directory, name):
        failpoint("storage.begin.before_clear")
        directory.remove_tree(name)
    else:
        present = _readable(directory, name, job)
        if present is not None and snapshot_of(present.commit) == snapshot:
            return
        _move_aside(directory, name, job)
    failpoint("storage.begin.before_create")
    directory.child(name, create=True).close()
    failpoint("storage.begin.after_create")


def remove_superseded(directory: Directory, step: int) -> None:
    """Remove what a step that is now committed had moved aside."""
    name = _ASIDE + step_directory(step)
    if directory.exists(name):
        failpoint("storage.supersede.before_removal")
        remove_step(directory, name)
        failpoint("storage.supersede.after_removal")


def remove_step(directory: Directory, name: str) -> None:
    """Remove a step directory; it stops being committed before anything else goes."""
    with directory.child(name) as step:
        failpoint("storage.delete.before_commit")
        step.unlink(COMMIT)
        step.sync()
        failpoint("storage.delete.after_commit")
    directory.remove_tree(name)
    failpoint("storage.delete.after_directory")


def clear_uncommitted(directory: Directory, job: str, step: int) -> None:
    """Remove what a failed attempt at a step left; what went aside for it comes back."""
    name = step_directory(step)
    if not _has_commit(directory, name):
        directory.remove_tree(name)
        if directory.exists(_ASIDE + name):
            _sweep_aside(directory, _ASIDE + name, job)


def sweep_steps(directory: Directory, job: str) -> list[str]:
    """Remove what was never committed, bring back what was moved aside for it."""
    done = []
    names = [name for name in directory.directories() if _step_of(name) is not None]
    for name in names:
        if not _has_commit(directory, name):
            directory.remove_tree(name)
            done.append(f"removed {directory.path / name}, which was never committed")
        else:
            with directory.child(name) as step:
                done += sweep_partial(step)
    for aside in names:
        if aside.startswith(_ASIDE) and directory.exists(aside):
            done += _sweep_aside(directory, aside, job)
    return done


def _sweep_aside(directory: Directory, aside: str, job: str) -> list[str]:
    name = aside.removeprefix(_ASIDE)
    if not directory.exists(name):
        directory.rename(aside, name)
        directory.sync()
        return [f"brought back {directory.path / name}: its successor was never committed"]
    if _readable(directory, name, job) is None:
        # The successor was committed and has rotted since. Neither is ours to throw away.
        return []
    remove_step(directory, aside)
    return [f"removed what {directory.path / name} supersedes"]


def _move_aside(directory: Directory, name: str, job: str) -> None:
    aside = _ASIDE + name
    if directory.exists(aside):
        if _readable(directory, name, job) is None and _readable(directory, aside, job) is not None:
            # There is room for one aside, and the readable one is worth more.
            remove_step(directory, name)
            return
        remove_step(directory, aside)
    failpoint("storage.begin.before_aside")
    directory.rename(name, aside)
    directory.sync()
    failpoint("storage.begin.after_aside")


def _read(directory: Directory, name: str, job: str) -> CommittedStep | None:
    """A directory's commit, or None if it has none."""
    where = str(directory.path / name / COMMIT)
    try:
        with directory.child(name) as step:
            data = step.read(COMMIT)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FormatInvalid(where, f"it cannot be read: {error}") from error
    commit = parse_commit(data, where)
    expected = SnapshotId(commit.incarnation, _step_of(name) or 0)
    check_snapshot(commit, job, expected, where)
    return CommittedStep(name, commit)


def _readable(directory: Directory, name: str, job: str) -> CommittedStep | None:
    try:
        return _read(directory, name, job)
    except FormatInvalid:
        return None


def _has_commit(directory: Directory, name: str) -> bool:
    """Whether there is a commit, readable or not: a disk error must not look like an absence."""
    try:
        with directory.child(name) as step:
            return step.exists(COMMIT)
    except FileNotFoundError:
        return False


def _step_of(name: str) -> int | None:
    return parse_step_directory(name.removeprefix(_ASIDE))
