"""Parity on NVMe: beside the shards of the same snapshot, in its step directory.

Owns ``parity.manifest`` and ``parity-<plan id>`` in the directories that `steps` owns. The manifest
is written last and names its plan, hence the file, so that another plan's parity takes the place of
an older one in one move. On a node without shards of the snapshot the directory holds parity alone.

Promises that what is listed survives power loss, stays with a snapshot that is moved aside, and
goes with it. Manifests carry parity of their own. Does not promise that bytes on disk stay right:
`verify` tells.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from everstep.proto import state_pb2
from everstep.proto.envelope import MAX_REPAIRABLE_BYTES, open_envelope, seal
from everstep.proto.errors import FormatInvalid
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import SnapshotId, checked_name, step_directory
from everstep.storage.direct import ImageWriter
from everstep.storage.directory import Directory, storage_error
from everstep.storage.identity import snapshot_of
from everstep.storage.images import damaged_units, publish_image
from everstep.storage.jobs import Jobs
from everstep.storage.level import Problem
from everstep.storage.mapping import map_range
from everstep.storage.parity import (
    ParityImage,
    by_snapshot,
    check_parity_bytes,
    check_plan,
    parity_bytes,
    parse_manifest,
    protected_snapshot,
)
from everstep.storage.steps import (
    COMMIT,
    MANIFEST,
    PARITY_STEM,
    make_room,
    parity_name,
    read_manifest,
    readable_step,
    remove_unheld,
    step_names,
    steps_of,
    sweep_parity,
    withdraw_manifest,
)

_SHARD = re.compile(r"\.?rank-\d{5,7}\..*")


@dataclass(frozen=True, slots=True)
class _Stored:
    directory_name: str
    manifest: state_pb2.ParityManifest


class ParityNvme:
    """Parity on NVMe: the attribute `parity` of an `NvmeLevel`, which makes it.

    See `ParityStore` for the methods that every store has. As there, a snapshot is not to be
    written and deleted at once, be it shards or parity.

    Args:
        root: The level's root.
        jobs: The level's jobs.
        writer: The level's writer.
    """

    def __init__(self, root: Path, jobs: Jobs, writer: ImageWriter) -> None:
        self.root = root
        self._jobs = jobs
        self._writer = writer

    def store(self, job: str, snapshot: SnapshotId, image: memoryview, envelope: bytes) -> None:
        """Store a member's parity, verified against its digests; safe once this returns.

        For a committed snapshot, or on a node that holds no shard of it. Parity of another plan
        of the same snapshot is there until this is.

        Args:
            job: The job.
            snapshot: The snapshot.
            image: The parity. Must not change while this runs; fastest from a page-aligned mapping.
            envelope: The manifest's plain envelope.

        Raises:
            ShardCorrupt: If units of `image` do not match the manifest. Nothing was stored.
            FormatInvalid: If the manifest is unreadable, of another snapshot or length, or if
                shards of the snapshot are here and not committed. Nothing was stored.
            OutOfSpace: If it does not fit. Nothing was stored.
            WriteFailed: If the device fails. Nothing was stored.
        """
        where = str(self.root / checked_name("job", job) / step_directory(snapshot.step) / MANIFEST)
        manifest = parse_manifest(envelope, where)
        plan_id = manifest.plan.plan_id
        check_plan(manifest, job, plan_id, where)
        if protected_snapshot(manifest) != snapshot:
            raise FormatInvalid(where, f"it is of {protected_snapshot(manifest)}, not {snapshot}")
        check_parity_bytes(manifest, image.nbytes, where)
        body = open_envelope("parity_manifest", envelope, where)
        # A long manifest is stored as it is: better than no parity at all.
        repairable = len(body) <= MAX_REPAIRABLE_BYTES
        sealed = seal("parity_manifest", body, repairable=repairable)
        with self._jobs.create(job) as directory:
            with _writing(directory.path):
                name = _place(directory, job, snapshot)
            try:
                with directory.child(name) as step:
                    self._store(step, manifest, image, sealed)
            except BaseException:
                # Best effort: what stays goes with the next `sweep`.
                with contextlib.suppress(OSError, FormatInvalid):
                    _clear_unpublished(directory, name, job, plan_id)
                raise

    def _store(
        self, step: Directory, manifest: state_pb2.ParityManifest, image: memoryview, sealed: bytes
    ) -> None:
        name = parity_name(manifest.plan.plan_id)
        publish_image(self._writer, step, name, image, manifest.unit_digests)
        step.publish(MANIFEST, sealed, "parity")
        for entry in step.names():
            if entry.startswith(PARITY_STEM) and entry != name:
                # Stored it is. What it replaces is found again by `sweep`.
                step.discard(entry)

    def manifests(self, job: str) -> list[state_pb2.ParityManifest]:
        """See `ParityStore.manifests`."""
        found = {one.manifest.plan.plan_id: one.manifest for one in self._scan(job)[0]}
        return sorted(found.values(), key=by_snapshot)

    def open(self, job: str, plan_id: str) -> ParityImage:
        """See `ParityStore.open`."""
        with self._opened(job, plan_id) as (stored, path, descriptor):
            view, mapping = map_range(descriptor, 0, parity_bytes(stored.manifest))
        body = stored.manifest.SerializeToString(deterministic=True)
        envelope = seal("parity_manifest", body)
        return ParityImage(view.toreadonly(), envelope, path, 0, mapping, stored.manifest)

    def verify(self, job: str, plan_id: str) -> list[int]:
        """See `ParityStore.verify`. Reads rather than maps: a bad sector is a bad unit."""
        with self._opened(job, plan_id) as (stored, _, descriptor):
            manifest = stored.manifest
            return damaged_units(descriptor, parity_bytes(manifest), manifest.unit_digests)

    def delete(self, job: str, plan_id: str) -> None:
        """See `ParityStore.delete`. A directory that held only this goes too."""
        checked_name("plan", plan_id)
        directory = self._jobs.open(job)
        if directory is None:
            return
        with directory, _writing(directory.path):
            for stored in self._manifests(directory, job)[0]:
                if stored.manifest.plan.plan_id == plan_id:
                    name = stored.directory_name
                    with directory.child(name) as step:
                        withdraw_manifest(step)
                        step.unlink(parity_name(plan_id))
                        failpoint("storage.unparity.after_unlink")
                    remove_unheld(directory, name)

    def sweep(self, job: str) -> list[str]:
        """See `ParityStore.sweep`. Part of the level's own."""
        directory = self._jobs.open(job)
        if directory is None:
            return []
        with directory, _writing(directory.path):
            return sweep_parity(directory, job)

    def problems(self, job: str) -> list[Problem]:
        """See `ParityStore.problems`."""
        return self._scan(job)[1]

    def _scan(self, job: str) -> tuple[list[_Stored], list[Problem]]:
        """What is here in full length, and what cannot be used."""
        directory = self._jobs.open(job)
        if directory is None:
            return [], []
        with directory:
            whole = []
            found, problems = self._manifests(directory, job)
            for stored in found:
                try:
                    _check_file(directory, stored)
                except FormatInvalid as error:
                    problems.append(Problem(error.where, error.problem))
                else:
                    whole.append(stored)
        return whole, problems

    def _manifests(self, directory: Directory, job: str) -> tuple[list[_Stored], list[Problem]]:
        """The manifests that can be read and belong where they are, and why others do not."""
        found, problems = [], []
        for name in step_names(directory):
            try:
                manifest = read_manifest(directory, name, job)
                if manifest is not None:
                    _check_commit(directory, name, job, manifest)
                    found.append(_Stored(name, manifest))
            except FormatInvalid as error:
                problems.append(Problem(error.where, error.problem))
        return found, problems

    @contextmanager
    def _opened(self, job: str, plan_id: str) -> Iterator[tuple[_Stored, Path, int]]:
        checked_name("plan", plan_id)
        where = str(self.root / checked_name("job", job))
        missing = FormatInvalid(where, f"the parity of plan {plan_id} is not on this disk")
        directory = self._jobs.open(job)
        if directory is None:
            raise missing
        with directory:
            found, problems = self._manifests(directory, job)
            mine = [one for one in found if one.manifest.plan.plan_id == plan_id]
            if not mine:
                hints = [problem for problem in problems if problem.where.endswith(MANIFEST)]
                if hints:
                    raise FormatInvalid(where, f"{missing.problem}; unusable: {hints[0].where}")
                raise missing
            stored = mine[-1]
            _check_file(directory, stored)
            with directory.child(stored.directory_name) as step:
                path = step.path / parity_name(plan_id)
                try:
                    descriptor = step.open_file(path.name, os.O_RDONLY)
                except OSError as error:
                    raise FormatInvalid(str(path), f"it cannot be opened: {error}") from error
        try:
            yield stored, path, descriptor
        finally:
            os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(str(path), 4096, error) from error


def _place(directory: Directory, job: str, snapshot: SnapshotId) -> str:
    """The directory that parity of a snapshot belongs into, made if there is none."""
    holding = list(steps_of(directory, job, snapshot))
    if holding:
        return holding[-1]
    name = step_directory(snapshot.step)
    if _has_shards(directory, name):
        raise FormatInvalid(
            str(directory.path / name), f"shards of {snapshot} are here and not committed yet"
        )
    make_room(directory, job, snapshot)
    return name


def _has_shards(directory: Directory, name: str) -> bool:
    """Whether a directory has shards that are not committed, whosever they are."""
    try:
        with directory.child(name) as step:
            names = step.names()
    except FileNotFoundError:
        return False
    return COMMIT not in names and any(_SHARD.fullmatch(entry) for entry in names)


def _check_commit(
    directory: Directory, name: str, job: str, manifest: state_pb2.ParityManifest
) -> None:
    """Check that a manifest lies beside a commit of its own snapshot, if beside any."""
    # A damaged commit is no reason against parity, on the contrary.
    committed = readable_step(directory, name, job)
    if committed is not None and snapshot_of(committed.commit) != protected_snapshot(manifest):
        where = str(directory.path / name / MANIFEST)
        raise FormatInvalid(
            where,
            f"it is of {protected_snapshot(manifest)}, beside {snapshot_of(committed.commit)}",
        )


def _check_file(directory: Directory, stored: _Stored) -> None:
    name = parity_name(stored.manifest.plan.plan_id)
    with directory.child(stored.directory_name) as step:
        where = str(step.path / name)
        try:
            held_bytes = step.size(name)
        except OSError as error:
            raise FormatInvalid(where, f"it cannot be read: {error}") from error
    check_parity_bytes(stored.manifest, held_bytes, where)


def _clear_unpublished(directory: Directory, name: str, job: str, plan_id: str) -> None:
    """Remove parity whose manifest could not be written, and the directory if it is empty then."""
    manifest = read_manifest(directory, name, job)
    if manifest is None or manifest.plan.plan_id != plan_id:
        with directory.child(name) as step:
            step.unlink(parity_name(plan_id))
        remove_unheld(directory, name)
