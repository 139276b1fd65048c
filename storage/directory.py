"""Files beneath an open directory, published whole or not at all.

Owns the one way in which this package touches names: every file and directory is opened beneath
a directory descriptor, one component at a time, never through a symbolic link, and everything
made is 0600 or 0700. Promises that `publish` leaves the old bytes or the new ones under a name,
and that the new ones survive power loss once it returned. Does not know what the files mean.
"""

import errno
import os
import shutil
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from everstep.proto.errors import (
    FormatInvalid,
    InvalidConfiguration,
    OutOfSpace,
    WriteFailed,
)
from everstep.proto.failpoint import failpoint

MAX_METADATA_BYTES = 1 << 28
"""No record, layout or commit is larger; a larger file is not read into memory."""

_OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def storage_error(where: str, needed_bytes: int, cause: OSError) -> OutOfSpace | WriteFailed:
    """The error of this package's tree for a failed write.

    Args:
        where: The file or directory written to.
        needed_bytes: How much was to be written.
        cause: What the operating system said.
    """
    if cause.errno in _NO_SPACE:
        return OutOfSpace(where, needed_bytes, _available_bytes(where))
    return WriteFailed(where, cause)


def _available_bytes(where: str) -> int | None:
    for path in (Path(where), *Path(where).parents):
        try:
            status = os.statvfs(path)
        except OSError:
            continue
        return status.f_bavail * status.f_frsize
    return None


class Directory:
    """An open directory. Use as a context manager."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path

    @classmethod
    def open(cls, path: Path, *, create: bool = False) -> Self:
        """Open `path` itself; links in the path leading to it are followed, it is the user's.

        Raises:
            FileNotFoundError: If it is missing and not to be created.
            InvalidConfiguration: If it, or something on the way to it, is a file.
        """
        try:
            if create:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path)
        except (FileExistsError, NotADirectoryError) as error:
            raise InvalidConfiguration(
                str(path), "not a directory; name another storage directory"
            ) from error

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
        """Close it; what was opened beneath it stays open."""
        os.close(self.descriptor)

    def child(self, name: str, *, create: bool = False) -> "Directory":
        """Open the directory `name`, durably made first if asked for.

        Raises:
            FileNotFoundError: If it is missing and not to be created.
            FormatInvalid: If it is a file or a link.
            InvalidConfiguration: If it belongs to another user, who could swap what is in it.
        """
        if create:
            try:
                os.mkdir(name, mode=0o700, dir_fd=self.descriptor)
            except FileExistsError:
                pass
            else:
                self.sync()
        flags = os.O_RDONLY | os.O_DIRECTORY | _OPEN_FLAGS
        try:
            descriptor = os.open(name, flags, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                where = str(self.path / name)
                raise FormatInvalid(where, "not a directory; links are not followed") from error
            raise
        owner = os.fstat(descriptor).st_uid
        if os.geteuid() not in (0, owner):
            os.close(descriptor)
            raise InvalidConfiguration(
                str(self.path / name),
                f"the directory belongs to user id {owner}, this process is user id "
                f"{os.geteuid()}; use another storage directory, or run as that user",
            )
        return Directory(descriptor, self.path / name)

    def names(self) -> list[str]:
        """The names in it, sorted."""
        return sorted(os.listdir(self.descriptor))

    def directories(self) -> list[str]:
        """The names of directories in it, sorted; links are not followed."""
        return [name for name in self.names() if self._is_directory(name)]

    def exists(self, name: str) -> bool:
        """Whether `name` is there."""
        try:
            os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """The length of a file; FileNotFoundError if there is none."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_size

    def open_file(self, name: str, flags: int) -> int:
        """Open a file beneath this directory and return its descriptor."""
        return os.open(name, flags | _OPEN_FLAGS, 0o600, dir_fd=self.descriptor)

    def read(self, name: str) -> bytes:
        """A small file's bytes.

        Raises:
            FormatInvalid: If it is no regular file, or larger than any of ours.
            OSError: If it cannot be read.
        """
        # A pipe left under our name would otherwise hold the open up for ever.
        descriptor = self.open_file(name, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_METADATA_BYTES:
                raise FormatInvalid(str(self.path / name), "not a file of ours: too large")
            # Not more than there is: a buffer of the limit's size would be allocated first.
            return file.read(status.st_size)

    def publish(self, name: str, data: bytes, verb: str) -> None:
        """Put `data` under `name`, durably, replacing what was there in one move.

        Args:
            name: The file's name.
            data: Its bytes.
            verb: Names the failpoints: ``storage.VERB.before_write`` and so on.

        Raises:
            OutOfSpace: If it does not fit; what was there stays.
            WriteFailed: If the device fails; what was there stays, or is already the new bytes.
        """
        partial = partial_name(name)
        try:
            failpoint(f"storage.{verb}.before_write")
            self._write_new(partial, data, verb)
            failpoint(f"storage.{verb}.before_rename")
            self.rename(partial, name)
            failpoint(f"storage.{verb}.after_rename")
            self.sync()
            failpoint(f"storage.{verb}.after_sync")
        except OSError as error:
            self.discard(partial)
            raise storage_error(str(self.path / name), len(data), error) from error

    def _write_new(self, name: str, data: bytes, verb: str) -> None:
        self.unlink(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(self.open_file(name, flags), "wb") as file:
            file.write(data)
            file.flush()
            failpoint(f"storage.{verb}.after_write")
            os.fsync(file.fileno())

    def rename(self, source: str, target: str) -> None:
        """Rename within this directory, replacing a file of that name. Not durable by itself."""
        os.rename(source, target, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def sync(self) -> None:
        """Make what was renamed, made and removed in this directory durable."""
        os.fsync(self.descriptor)

    def unlink(self, name: str) -> None:
        """Remove a file if it is there. Not durable by itself."""
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            pass

    def discard(self, name: str) -> None:
        """Remove a file if that is possible: for clean-up while another error is on its way."""
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except OSError:
            pass

    def remove_tree(self, name: str) -> None:
        """Remove a directory and what is in it, if it is there, and make that durable."""
        try:
            shutil.rmtree(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            self.unlink(name)
        self.sync()

    def _is_directory(self, name: str) -> bool:
        try:
            status = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISDIR(status.st_mode)


def partial_name(name: str) -> str:
    """A hidden name of this thread's own for a file that is being written."""
    return f".{name}.{os.getpid()}-{threading.get_native_id()}.partial"


def is_partial(name: str) -> bool:
    """Whether a name is that of a file that was being written."""
    return name.startswith(".") and name.endswith(".partial")
