"""Taking memory for an arena: whole and early, or not at all.

Owns the check before and the allocation itself. Promises that a file which `reserve_file` made
has every page: writing to a mapping of it cannot raise SIGBUS for want of memory. Promises
nothing about a cgroup limit that is lowered later.
"""

import os
import threading

from everstep.proto.errors import OutOfSpace
from everstep.proto.failpoint import failpoint
from everstep.storage.directory import Directory, partial_name
from everstep.storage.headroom import available_memory_bytes

_LARGER_DIRECTORY = (
    "Make the directory larger (`mount -o remount,size=...`, for a container a larger /dev/shm "
    "such as `--shm-size`), name another one, or use fewer slots."
)
_MORE_MEMORY = (
    "It must also leave {keep_free:,.0f} MB free for everyone else. Give the machine or its "
    "memory cgroup more memory, use fewer slots, or keep less free."
)

# One at a time: two reservations that both saw room for one would meet in the OOM killer.
_reserving = threading.Lock()


def reserve_file(directory: Directory, name: str, total_bytes: int, keep_free_bytes: int) -> None:
    """Make a file of `total_bytes`, all of it allocated, under `name`.

    Args:
        directory: Where, on a tmpfs.
        name: The file's name; appears only once everything is allocated.
        total_bytes: Its length.
        keep_free_bytes: Memory that must remain available.

    Raises:
        OutOfSpace: If directory or memory do not hold it, or the kernel refuses. Nothing stays.
    """
    with _reserving:
        _check_room(directory, total_bytes, keep_free_bytes)
        partial = partial_name(name)
        try:
            _allocate(directory, partial, total_bytes)
            failpoint("storage.reserve.before_rename")
            directory.rename(partial, name)
            failpoint("storage.reserve.after_rename")
        except OSError as error:
            directory.discard(partial)
            directory.discard(name)
            raise OutOfSpace(
                str(directory.path),
                total_bytes,
                _room_bytes(directory),
                f"The kernel said: {error}. {_LARGER_DIRECTORY}",
            ) from error


def _check_room(directory: Directory, total_bytes: int, keep_free_bytes: int) -> None:
    room_bytes = _room_bytes(directory)
    if total_bytes > room_bytes:
        raise OutOfSpace(str(directory.path), total_bytes, room_bytes, _LARGER_DIRECTORY)
    spare_bytes = max(0, available_memory_bytes() - keep_free_bytes)
    if total_bytes > spare_bytes:
        advice = _MORE_MEMORY.format(keep_free=keep_free_bytes / 1e6)
        raise OutOfSpace(str(directory.path), total_bytes, spare_bytes, advice)


def _room_bytes(directory: Directory) -> int:
    status = os.fstatvfs(directory.descriptor)
    return status.f_bavail * status.f_frsize


def _allocate(directory: Directory, name: str, total_bytes: int) -> None:
    directory.unlink(name)
    descriptor = directory.open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        failpoint("storage.reserve.before_allocate")
        if total_bytes:
            os.posix_fallocate(descriptor, 0, total_bytes)
        failpoint("storage.reserve.after_allocate")
    finally:
        os.close(descriptor)
