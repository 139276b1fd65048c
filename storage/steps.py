"""The step directories of one job on disk: which are committed, and how they come and go.

Owns the meaning of ``step-000000001234`` and ``.superseded-step-000000001234`` with their
``commit`` and ``parity.manifest``. A directory is held by its commit; on a node that has parity of
the snapshot and no shards, by its manifest alone, and then it is not a committed snapshot.

Promises that at every moment, power loss included, each snapshot that is held is readable under
one of the two names until its successor is committed or it is deleted, and that a directory loses
manifest and commit before anything else in it. Does not look at shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from everstep.proto import state_pb2
from everstep.proto.errors import FormatInvalid
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import SnapshotId, parse_step_directory, step_directory
from everstep.storage.directory import Directory
from everstep.storage.identity import check_snapshot, parse_commit, snapshot_of
from everstep.storage.jobs import sweep_partial
from everstep.storage.level import Problem
from everstep.storage.parity import check_plan, parse_manifest, protected_snapshot

COMMIT = "commit"
MANIFEST = "parity.manifest"
PARITY_STEM = "parity-"
_PARITY = (MANIFEST, PARITY_STEM, f".{MANIFEST}", f".{PARITY_STEM}")
_ASIDE = ".superseded-"


@dataclass(frozen=True, slots=True)
class CommittedStep:
    """A snapshot on disk, and the name of the directory that holds it."""

    directory_name: str
    commit: state_pb2.Commit


def step_names(directory: Directory) -> list[str]:
    """The step directories of a job, those that were moved aside first."""
    # Hidden names sort first.
    return [name for name in directory.directories() if _step_of(name) is not None]


def committed_steps(
    directory: Directory, job: str
) -> tuple[dict[SnapshotId, CommittedStep], list[Problem]]:
    """All committed snapshots, and the commits that cannot be used."""
    found, problems = {}, []
    # Those aside come first, so that a snapshot under both names is taken from its own.
    for name in step_names(directory):
        try:
            step = _read(directory, name, job)
        except FormatInvalid as error:
            problems.append(Problem(error.where, error.problem))
            continue
        if step is not None:
            found[snapshot_of(step.commit)] = step
    return found, problems


def readable_step(directory: Directory, name: str, job: str) -> CommittedStep | None:
    """What a step directory says is committed in it; None if nothing that can be read."""
    try:
        return _read(directory, name, job)
    except FormatInvalid:
        return None


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


def steps_of(directory: Directory, job: str, snapshot: SnapshotId) -> Iterator[str]:
    """The directories that hold a snapshot: its shards, its parity or both."""
    name = step_directory(snapshot.step)
    for candidate in (_ASIDE + name, name):
        if _held(directory, candidate, job) == snapshot:
            yield candidate


def read_manifest(directory: Directory, name: str, job: str) -> state_pb2.ParityManifest | None:
    """The manifest in a step directory, or None if it has none.

    Raises:
        FormatInvalid: If it is damaged, or not of this job and step.
    """
    where = str(directory.path / name / MANIFEST)
    try:
        with directory.child(name) as step:
            data = step.read(MANIFEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FormatInvalid(where, f"it cannot be read: {error}") from error
    manifest = parse_manifest(data, where)
    check_plan(manifest, job, manifest.plan.plan_id, where)
    if manifest.plan.step != _step_of(name):
        raise FormatInvalid(where, f"it is of step {manifest.plan.step}")
    return manifest


def make_room(directory: Directory, job: str, snapshot: SnapshotId) -> None:
    """Make the directory of a step that is to be written; a committed one goes aside."""
    name = step_directory(snapshot.step)
    if not _is_held(directory, name):
        failpoint("storage.begin.before_clear")
        directory.remove_tree(name)
    elif _held(directory, name, job) == snapshot:
        if not _has(directory, name, COMMIT):
            _clear_shards(directory, name)
        return
    else:
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
        # The manifest first: without its commit it would hold the directory.
        withdraw_manifest(step)
        failpoint("storage.delete.before_commit")
        step.unlink(COMMIT)
        step.sync()
        failpoint("storage.delete.after_commit")
    directory.remove_tree(name)
    failpoint("storage.delete.after_directory")


def withdraw_manifest(step: Directory) -> None:
    """Remove a step's parity manifest, if it has one, and make that durable."""
    if step.exists(MANIFEST):
        failpoint("storage.withdraw.before_unlink")
        step.unlink(MANIFEST)
        failpoint("storage.withdraw.after_unlink")
        step.sync()


def remove_unheld(directory: Directory, name: str) -> None:
    """Remove a step directory that nothing holds and that has no shards on their way either."""
    if _is_held(directory, name):
        return
    with directory.child(name) as step:
        if any(not _is_parity(entry) for entry in step.names()):
            return
    directory.remove_tree(name)


def clear_uncommitted(directory: Directory, job: str, step: int) -> None:
    """Remove what a failed attempt at a step left; what went aside for it comes back."""
    name = step_directory(step)
    if _is_held(directory, name):
        if not _has(directory, name, COMMIT):
            _clear_shards(directory, name)
    else:
        directory.remove_tree(name)
        if directory.exists(_ASIDE + name):
            _sweep_aside(directory, _ASIDE + name, job)


def sweep_steps(directory: Directory, job: str) -> list[str]:
    """Remove what was never committed, bring back what was moved aside for it."""
    done = []
    names = step_names(directory)
    for name in names:
        if not _is_held(directory, name):
            directory.remove_tree(name)
            done.append(f"removed {directory.path / name}, which was never committed")
            continue
        with directory.child(name) as step:
            done += sweep_partial(step)
        if not _has(directory, name, COMMIT) and _clear_shards(directory, name):
            done.append(f"removed shards in {directory.path / name}, never committed")
    for aside in names:
        if aside.startswith(_ASIDE) and directory.exists(aside):
            done += _sweep_aside(directory, aside, job)
    return done


def sweep_parity(directory: Directory, job: str) -> list[str]:
    """Remove parity that no manifest names: of a plan that was replaced, or never published."""
    done = []
    for name in step_names(directory):
        try:
            manifest = read_manifest(directory, name, job)
        except FormatInvalid:
            # It may be what the damaged manifest is about.
            continue
        kept = {MANIFEST, parity_name(manifest.plan.plan_id)} if manifest is not None else set()
        with directory.child(name) as step:
            for entry in step.names():
                if _is_parity(entry) and entry not in kept:
                    step.unlink(entry)
                    done.append(f"removed {step.path / entry}, which no manifest names")
        remove_unheld(directory, name)
    return done


def parity_name(plan_id: str) -> str:
    """The name of the file that holds a plan's parity."""
    return PARITY_STEM + plan_id


def _sweep_aside(directory: Directory, aside: str, job: str) -> list[str]:
    name = aside.removeprefix(_ASIDE)
    if not directory.exists(name):
        directory.rename(aside, name)
        directory.sync()
        return [f"brought back {directory.path / name}: its successor was never committed"]
    if readable_step(directory, name, job) is None:
        # The successor was committed and has rotted since, or is parity that cannot take its
        # place. Neither is ours to throw away.
        return []
    remove_step(directory, aside)
    return [f"removed what {directory.path / name} supersedes"]


def _move_aside(directory: Directory, name: str, job: str) -> None:
    aside = _ASIDE + name
    if directory.exists(aside):
        if readable_step(directory, name, job) is None and _held(directory, aside, job) is not None:
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


def _held(directory: Directory, name: str, job: str) -> SnapshotId | None:
    """The snapshot that a directory holds; None if nothing says so that can be read."""
    try:
        step = _read(directory, name, job)
        if step is not None:
            return snapshot_of(step.commit)
        manifest = read_manifest(directory, name, job)
    except FormatInvalid:
        return None
    return protected_snapshot(manifest) if manifest is not None else None


def _is_held(directory: Directory, name: str) -> bool:
    """Whether there is a commit or a manifest, readable or not: a disk error must not look like
    an absence."""
    return _has(directory, name, COMMIT) or _has(directory, name, MANIFEST)


def _has(directory: Directory, name: str, entry: str) -> bool:
    try:
        with directory.child(name) as step:
            return step.exists(entry)
    except FileNotFoundError:
        return False


def _is_parity(entry: str) -> bool:
    return entry.startswith(_PARITY)


def _clear_shards(directory: Directory, name: str) -> bool:
    """Remove all but parity from a directory without a commit; whether there was anything."""
    with directory.child(name) as step:
        shards = [entry for entry in step.names() if not _is_parity(entry)]
        for entry in shards:
            step.remove_tree(entry)
        if shards:
            step.sync()
    return bool(shards)


def _step_of(name: str) -> int | None:
    return parse_step_directory(name.removeprefix(_ASIDE))
