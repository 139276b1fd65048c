"""The jobs under a level's root: one directory each, with the layouts in it.

Owns ``<root>/<job>`` and ``<root>/<job>/layouts/<id>``, which are the same for every level kept in
files. Promises that a layout's bytes are those its id was made from. What else lies in a job's
directory is the level's.
"""

import hashlib
import re
from pathlib import Path

from everstep.proto.envelope import MAX_REPAIRABLE_BYTES, open_envelope, seal
from everstep.proto.errors import FormatInvalid, InvalidName
from everstep.proto.ids import checked_name
from everstep.storage.directory import Directory, is_partial, storage_error
from everstep.storage.level import Problem

PARITY = "parity"
"""In memory: the directory in a job's that holds its parity; see `parity_memory`."""

STAGED = "staged"
"""In memory: the directory in a job's that holds shards of other ranks; see `staging`."""

_LAYOUTS = "layouts"
_REMOVED = ".removed-"
_LAYOUT_ID = re.compile(r"[0-9a-f]{32}")


class Jobs:
    """The directories of all jobs under one root."""

    def __init__(self, root: Path, *, repairable: bool) -> None:
        self.root = root
        self._repairable = repairable

    def names(self) -> list[str]:
        """The jobs that have a directory, sorted."""
        try:
            with Directory.open(self.root) as root:
                found = root.directories()
        except FileNotFoundError:
            return []
        return [name for name in found if _is_job_name(name)]

    def create(self, job: str) -> Directory:
        """Open a job's directory, made first if need be.

        Raises:
            InvalidName: If the name is not harmless.
            OutOfSpace: If there is no room even for a directory.
            WriteFailed: If the device fails.
        """
        checked_name("job", job)
        try:
            with Directory.open(self.root, create=True) as root:
                return root.child(job, create=True)
        except OSError as error:
            raise storage_error(str(self.root / job), 4096, error) from error

    def open(self, job: str) -> Directory | None:
        """Open a job's directory, or None if it has none.

        Raises:
            InvalidName: If the name is not harmless.
        """
        checked_name("job", job)
        try:
            with Directory.open(self.root) as root:
                return root.child(job)
        except FileNotFoundError:
            return None

    def remove(self, job: str) -> None:
        """Remove a job's directory with all in it. It disappears in one move."""
        checked_name("job", job)
        try:
            with Directory.open(self.root) as root:
                hidden = _REMOVED + job
                root.remove_tree(hidden)
                if root.exists(job):
                    root.rename(job, hidden)
                    root.sync()
                    root.remove_tree(hidden)
        except FileNotFoundError:
            return
        except OSError as error:
            raise storage_error(str(self.root / job), 0, error) from error

    def sweep(self, job: str) -> list[str]:
        """Finish an interrupted `remove` of this job, and clear what is half-written in it."""
        hidden = _REMOVED + checked_name("job", job)
        done = []
        try:
            with Directory.open(self.root) as root:
                if root.exists(hidden):
                    root.remove_tree(hidden)
                    done.append(f"finished removing {self.root / job}")
        except FileNotFoundError:
            return []
        directory = self.open(job)
        if directory is None:
            return done
        with directory:
            done += sweep_partial(directory)
            for name in directory.directories():
                if name in (_LAYOUTS, PARITY, STAGED):
                    with directory.child(name) as folder:
                        done += sweep_partial(folder)
        return done

    def finish_removals(self) -> list[str]:
        """Finish every interrupted `remove`, also of jobs of which nothing else is left."""
        try:
            with Directory.open(self.root) as root:
                hidden = [name for name in root.directories() if name.startswith(_REMOVED)]
                for name in hidden:
                    root.remove_tree(name)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(str(self.root), 0, error) from error
        return [f"finished removing {self.root / name.removeprefix(_REMOVED)}" for name in hidden]

    def put_layout(self, job: str, layout_id: str, envelope: bytes) -> None:
        """See `Level.put_layout`."""
        where = str(self.root / checked_name("job", job) / _LAYOUTS / layout_id)
        body = _checked_body(layout_id, envelope, where)
        try:
            self.layout(job, layout_id)
        except FormatInvalid:
            pass
        else:
            return
        repairable = self._repairable and len(body) <= MAX_REPAIRABLE_BYTES
        data = seal("layout", body, repairable=repairable)
        with self.create(job) as directory:
            try:
                layouts = directory.child(_LAYOUTS, create=True)
            except OSError as error:
                raise storage_error(where, len(data), error) from error
            with layouts:
                layouts.publish(layout_id, data, "layout")

    def layout(self, job: str, layout_id: str) -> bytes:
        """See `Level.layout`."""
        where = str(self.root / checked_name("job", job) / _LAYOUTS / layout_id)
        if not _LAYOUT_ID.fullmatch(layout_id):
            raise FormatInvalid(where, f"{layout_id!r} is no layout id")
        directory = self.open(job)
        if directory is None:
            raise FormatInvalid(where, "there is no such layout here")
        with directory:
            try:
                with directory.child(_LAYOUTS) as layouts:
                    data = layouts.read(layout_id)
            except FileNotFoundError as error:
                raise FormatInvalid(where, "there is no such layout here") from error
            except OSError as error:
                raise FormatInvalid(where, f"it cannot be read: {error}") from error
        return seal("layout", _checked_body(layout_id, data, where))

    def layout_problems(self, job: str) -> list[Problem]:
        """The layouts that cannot be used."""
        directory = self.open(job)
        if directory is None:
            return []
        found = []
        with directory:
            if not directory.exists(_LAYOUTS):
                return []
            try:
                with directory.child(_LAYOUTS) as layouts:
                    names = [name for name in layouts.names() if not is_partial(name)]
            except FormatInvalid as error:
                return [Problem(error.where, error.problem)]
        for name in names:
            try:
                self.layout(job, name)
            except FormatInvalid as error:
                found.append(Problem(error.where, error.problem))
        return found


def sweep_partial(directory: Directory) -> list[str]:
    """Remove half-written files, and say which."""
    kept = set(directory.directories())
    partial = [name for name in directory.names() if is_partial(name) and name not in kept]
    for name in partial:
        directory.unlink(name)
    return [f"removed half-written {directory.path / name}" for name in partial]


def _checked_body(layout_id: str, envelope: bytes, where: str) -> bytes:
    body = open_envelope("layout", envelope, where)
    found = hashlib.blake2b(body, digest_size=16).hexdigest()
    if found != layout_id:
        raise FormatInvalid(where, f"its bytes are those of layout {found}")
    return body


def _is_job_name(name: str) -> bool:
    try:
        checked_name("job", name)
    except InvalidName:
        return False
    return True
