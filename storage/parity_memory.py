"""Parity in memory: a small pool of tmpfs files, which outlive the agent.

Owns ``<root>/<job>/parity/``: ``000001.parity`` is a file of the pool, wholly allocated, and
``000001-<plan id>.manifest`` says whose parity is in it. A file without a manifest is free, and is
used again: touching a page for the first time costs 7.5 times as much as writing to it. Files are
unmapped between rounds, or a removed job's memory would stay taken.

Promises that parity is listed exactly while its manifest is there, which appears in one move and
names the file by its own name; that room is refused early and whole, never as a SIGBUS; and that
a job has at most `MAX_FILES` files. Promises nothing after a reboot. Whoever still reads parity
that is deleted may see another plan's bytes: digests tell.
"""

import contextlib
import mmap
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from everstep.kernels.digest import verify_units
from everstep.proto import state_pb2
from everstep.proto.envelope import open_envelope, seal
from everstep.proto.errors import FormatInvalid, OutOfSpace, WriteFailed
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES, checked_name
from everstep.storage.directory import Directory, storage_error
from everstep.storage.jobs import PARITY, Jobs, sweep_partial
from everstep.storage.level import Problem
from everstep.storage.mapping import map_range, populate, unmap
from everstep.storage.parity import (
    MAX_PARITY_BYTES,
    ParityImage,
    by_snapshot,
    check_parity_bytes,
    check_plan,
    parity_bytes,
    parse_manifest,
)
from everstep.storage.reservation import grow_file, reserve_file

MAX_FILES = 3
"""Of a job: the newest protected snapshot's, the one before, and the one being encoded."""

_PAGE_BYTES = 4096
_FILE = re.compile(r"(\d{6,12})\.parity")
_MANIFEST = re.compile(r"(\d{6,12})-([A-Za-z0-9_-][A-Za-z0-9._-]{0,127})\.manifest")


@dataclass(slots=True)
class ParityRoom:
    """A file of the pool, taken for one plan. Use as a context manager, or call `close`.

    Until it is closed nobody else gets the file. Closing gives it back unless it was published.
    """

    job: str
    plan_id: str
    view: memoryview = field(repr=False)
    """Where the parity goes; holds what was there before."""
    path: Path
    number: int
    store: "ParityMemory" = field(repr=False)
    mapping: mmap.mmap | None = field(repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap it, and give it back if it was not published. Again is a no-op."""
        in_use = False
        try:
            self.view.release()
            if self.mapping is not None:
                unmap(self.mapping)
        except BufferError:
            # Somebody holds a view of it and may write through that.
            in_use = True
        self.store.given_back(self, in_use=in_use)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A manifest that can be used, and the file that it describes."""

    name: str
    number: int
    file_name: str
    envelope: bytes
    manifest: state_pb2.ParityManifest


class ParityMemory:
    """Parity in memory. See `ParityStore` for the methods that every store has.

    One instance for each root and process: it knows which files are being written.

    Args:
        root: The memory level's root, on a tmpfs.
        keep_free_bytes: Memory that a reservation must leave to everyone else.
    """

    def __init__(self, root: Path, *, keep_free_bytes: int) -> None:
        self.root = root
        self._keep_free_bytes = keep_free_bytes
        self._jobs = Jobs(root, repairable=False)
        self._lock = threading.Lock()
        self._taken: dict[tuple[str, str], ParityRoom | int] = {}

    def reserve(self, job: str, plan_id: str, length_bytes: int) -> ParityRoom:
        """Take a file of the pool to encode into, all of it allocated.

        Published parity, also of the same plan, stays as it is.

        Args:
            job: The job.
            plan_id: The plan; nothing of it is being written.
            length_bytes: How long its parity is.

        Raises:
            OutOfSpace: If tmpfs or memory do not hold it, or all files of the job are in use.
                Nothing was changed.
        """
        checked_name("plan", plan_id)
        assert 0 <= length_bytes <= MAX_PARITY_BYTES, length_bytes
        key = (job, plan_id)
        with self._folder(job, create=True) as folder, self._lock, _writing(folder):
            assert folder is not None
            assert key not in self._taken, f"plan {plan_id} is being written"
            number = self._file_for(folder, job, length_bytes)
            self._taken[key] = number
        try:
            view, mapping = self._mapped(job, number, length_bytes)
            if mapping is not None:
                populate(mapping)
        except BaseException:
            self._taken.pop(key, None)
            raise
        path = self.root / job / PARITY / _file_name(number)
        room = ParityRoom(job, plan_id, view, path, number, self, mapping)
        self._taken[key] = room
        return room

    def publish(self, job: str, envelope: bytes) -> None:
        """Say what the room of a plan holds: from then on it is in `manifests`.

        An older copy of the same plan is removed. The room is still to be closed.

        Args:
            job: The job.
            envelope: The manifest's plain envelope; it names the plan.

        Raises:
            FormatInvalid: If the manifest is not of this job, of a plan that has no room, or of
                another length. Nothing was published.
            OutOfSpace: If tmpfs is full. Nothing was published.
        """
        where = f"the parity manifest of job {checked_name('job', job)}"
        manifest = parse_manifest(envelope, where)
        plan_id = manifest.plan.plan_id
        check_plan(manifest, job, plan_id, where)
        room = self._taken.get((job, plan_id))
        if not isinstance(room, ParityRoom):
            raise FormatInvalid(where, f"no memory is reserved for plan {plan_id}")
        check_parity_bytes(manifest, room.view.nbytes, where)
        with self._folder(job) as folder, self._lock:
            if folder is None or not folder.exists(room.path.name):
                raise FormatInvalid(str(room.path), "it was removed while it was written")
            name = f"{room.number:06d}-{plan_id}.manifest"
            folder.publish(name, envelope, "manifest")
            with contextlib.suppress(OSError):
                _withdraw(folder, plan_id, keep=name)

    def given_back(self, room: ParityRoom, *, in_use: bool) -> None:
        """Called by a room that is closed."""
        with self._lock:
            if self._taken.get((room.job, room.plan_id)) is not room:
                return
            del self._taken[room.job, room.plan_id]
            if not in_use:
                return
            # Never given to another plan while somebody may write to it. The memory goes with
            # the last view.
            with self._folder(room.job) as folder:
                if folder is not None and room.number in self._free(folder, room.job):
                    folder.discard(room.path.name)

    def release_unused(self, job: str) -> None:
        """Give memory back: remove the files that hold no parity and are not being written."""
        with self._folder(job) as folder, self._lock, _writing(folder):
            if folder is None:
                return
            for number in self._free(folder, job):
                failpoint("storage.unused.before_unlink")
                folder.unlink(_file_name(number))

    def manifests(self, job: str) -> list[state_pb2.ParityManifest]:
        """See `ParityStore.manifests`."""
        found = {one.manifest.plan.plan_id: one.manifest for one in self._scan(job)[0]}
        return sorted(found.values(), key=by_snapshot)

    def open(self, job: str, plan_id: str) -> ParityImage:
        """See `ParityStore.open`."""
        stored = self._stored(job, plan_id)
        view, mapping = self._mapped(job, stored.number, parity_bytes(stored.manifest), write=False)
        path = self.root / job / PARITY / stored.file_name
        return ParityImage(view.toreadonly(), stored.envelope, path, 0, mapping, stored.manifest)

    def verify(self, job: str, plan_id: str) -> list[int]:
        """See `ParityStore.verify`."""
        with self.open(job, plan_id) as parity:
            return verify_units(parity.image, UNIT_BYTES, parity.manifest.unit_digests)

    def delete(self, job: str, plan_id: str) -> None:
        """See `ParityStore.delete`. The file stays in the pool, free to be used again."""
        checked_name("plan", plan_id)
        with self._folder(job) as folder, self._lock, _writing(folder):
            if folder is not None:
                _withdraw(folder, plan_id)

    def sweep(self, job: str) -> list[str]:
        """See `ParityStore.sweep`. Free files stay: the next plans use them."""
        with self._folder(job) as folder:
            return [] if folder is None else sweep_partial(folder)

    def problems(self, job: str) -> list[Problem]:
        """See `ParityStore.problems`."""
        try:
            return self._scan(job)[1]
        except FormatInvalid as error:
            return [Problem(error.where, error.problem)]
        except (OutOfSpace, WriteFailed) as error:
            return [Problem(error.where, str(error))]

    @contextmanager
    def _folder(self, job: str, *, create: bool = False) -> Iterator[Directory | None]:
        """The job's parity directory; None if there is none and it is not to be made."""
        directory = self._jobs.create(job) if create else self._jobs.open(job)
        if directory is None:
            yield None
            return
        with directory:
            try:
                folder = directory.child(PARITY, create=create)
            except FileNotFoundError:
                yield None
                return
            except OSError as error:
                raise storage_error(str(directory.path / PARITY), 4096, error) from error
            with folder:
                yield folder

    def _file_for(self, folder: Directory, job: str, length_bytes: int) -> int:
        """A free file that is large enough: one of the pool, one that is made longer, or new."""
        wanted_bytes = max(1, -(-length_bytes // _PAGE_BYTES)) * _PAGE_BYTES
        free = {number: folder.size(_file_name(number)) for number in self._free(folder, job)}
        fitting = [number for number, held_bytes in free.items() if held_bytes >= wanted_bytes]
        if fitting:
            return min(fitting, key=lambda number: (free[number], number))
        if free:
            number = max(free, key=lambda number: (free[number], number))
            grow_file(folder, _file_name(number), wanted_bytes, self._keep_free_bytes)
            return number
        names = folder.names()
        if sum(bool(_FILE.fullmatch(name)) for name in names) >= MAX_FILES:
            if self._withdraw_damaged(folder, job):
                return self._file_for(folder, job, length_bytes)
            raise OutOfSpace(
                str(folder.path),
                wanted_bytes,
                None,
                f"All {MAX_FILES} parity files of the job are in use: an older plan's parity must "
                "be deleted before another is encoded.",
            )
        # Also past manifests and rooms whose file is gone, or they would seem to be of the new one.
        number = max({*map(_number, names), *self._taken_numbers(job)}, default=0) + 1
        reserve_file(folder, _file_name(number), wanted_bytes, self._keep_free_bytes)
        return number

    def _withdraw_damaged(self, folder: Directory, job: str) -> bool:
        """Remove the manifests that say nothing: else they would hold their files for ever."""
        damaged = []
        for name in folder.names():
            match = _MANIFEST.fullmatch(name)
            if match:
                try:
                    _read(folder, job, name, match[2])
                except FormatInvalid:
                    damaged.append(name)
        before = self._free(folder, job)
        for name in damaged:
            folder.unlink(name)
        return self._free(folder, job) != before

    def _free(self, folder: Directory, job: str) -> list[int]:
        """The files that no manifest claims, readable or not, and that nobody writes to."""
        names = folder.names()
        claimed = {_number(name) for name in names if _MANIFEST.fullmatch(name)}
        files = {_number(name) for name in names if _FILE.fullmatch(name)}
        return sorted(files - claimed - self._taken_numbers(job))

    def _taken_numbers(self, job: str) -> set[int]:
        return {
            taken.number if isinstance(taken, ParityRoom) else taken
            for (owner, _), taken in self._taken.items()
            if owner == job
        }

    def _mapped(
        self, job: str, number: int, length_bytes: int, *, write: bool = True
    ) -> tuple[memoryview, mmap.mmap | None]:
        name = _file_name(number)
        where = str(self.root / job / PARITY / name)
        with self._folder(job) as folder:
            try:
                if folder is None:
                    raise FileNotFoundError(where)
                descriptor = folder.open_file(name, os.O_RDWR if write else os.O_RDONLY)
            except OSError as error:
                raise FormatInvalid(where, f"it cannot be opened: {error}") from error
            try:
                # A mapping beyond the end of a file is a SIGBUS, so look before mapping.
                if os.fstat(descriptor).st_size < length_bytes:
                    raise FormatInvalid(where, "it is shorter than when it was found")
                return map_range(descriptor, 0, length_bytes, writable=write)
            finally:
                os.close(descriptor)

    def _stored(self, job: str, plan_id: str) -> _Stored:
        checked_name("plan", plan_id)
        found, problems = self._scan(job, plan_id)
        if found:
            # Two while `publish` replaces one: both are whole.
            return found[-1]
        if problems:
            raise FormatInvalid(problems[0].where, problems[0].reason)
        where = str(self.root / job / PARITY)
        raise FormatInvalid(where, f"the parity of plan {plan_id} is not in memory here")

    def _scan(self, job: str, plan_id: str | None = None) -> tuple[list[_Stored], list[Problem]]:
        """The manifests that can be used, of one plan if given, and why others cannot."""
        found, problems = [], []
        with self._folder(job) as folder:
            for name in folder.names() if folder is not None else []:
                match = _MANIFEST.fullmatch(name)
                if folder is None or not match or plan_id not in (None, match[2]):
                    continue
                try:
                    found.append(_read(folder, job, name, match[2]))
                except FormatInvalid as error:
                    problems.append(Problem(error.where, error.problem))
                except FileNotFoundError:
                    continue
                except OSError as error:
                    problems.append(Problem(str(folder.path / name), str(error)))
        return found, problems


@contextmanager
def _writing(folder: Directory | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(str(folder.path) if folder else "", 0, error) from error


def _file_name(number: int) -> str:
    return f"{number:06d}.parity"


def _number(name: str) -> int:
    match = _FILE.fullmatch(name) or _MANIFEST.fullmatch(name)
    return int(match[1]) if match else 0


def _withdraw(folder: Directory, plan_id: str, keep: str = "") -> None:
    """Remove the manifests of a plan, damaged ones too, but for one."""
    for name in folder.names():
        match = _MANIFEST.fullmatch(name)
        if match and match[2] == plan_id and name != keep:
            failpoint("storage.withdraw.before_unlink")
            folder.unlink(name)
            failpoint("storage.withdraw.after_unlink")


def _read(folder: Directory, job: str, name: str, plan_id: str) -> _Stored:
    """A manifest, checked against its name and the file it describes."""
    where = str(folder.path / name)
    data = folder.read(name)
    manifest = parse_manifest(data, where)
    check_plan(manifest, job, plan_id, where)
    number = _number(name)
    file_name = _file_name(number)
    try:
        held_bytes = folder.size(file_name)
    except FileNotFoundError as error:
        if not folder.exists(name):
            raise
        raise FormatInvalid(where, f"its parity, {file_name}, is missing") from error
    if held_bytes < parity_bytes(manifest):
        raise FormatInvalid(
            str(folder.path / file_name),
            f"it has {held_bytes} bytes, its manifest says {parity_bytes(manifest)}",
        )
    envelope = seal("parity_manifest", open_envelope("parity_manifest", data, where))
    return _Stored(name, number, file_name, envelope, manifest)
