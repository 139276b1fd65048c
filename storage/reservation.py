"""Taking memory for a file: whole and early, or not at all.

Owns the check before and the allocation itself. Promises that a file which `reserve_file` made
has every page: writing to a mapping of it cannot raise SIGBUS for want of memory; and so for the
ranges of `reserve_ranges`. Promises nothing about a cgroup limit that is lowered later.
"""

import os
import threading
from collections.abc import Sequence

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
    ranges = [(0, total_bytes)] if total_bytes else []
    reserve_ranges(directory, name, total_bytes, ranges, keep_free_bytes)


def reserve_ranges(
    directory: Directory,
    name: str,
    length_bytes: int,
    ranges: Sequence[tuple[int, int]],
    keep_free_bytes: int,
) -> None:
    """Make a sparse file of `length_bytes` under `name`, of which only some ranges are allocated.

    Args:
        directory: Where, on a tmpfs.
        name: The file's name; appears only once everything is allocated, in place of an earlier
            file of that name.
        length_bytes: Its length.
        ranges: Offset and length of what is to be written to; they do not overlap.
        keep_free_bytes: Memory that must remain available.

    Raises:
        OutOfSpace: As `reserve_file`.
    """
    needed_bytes = sum(length for _, length in ranges)
    with _reserving:
        _check_room(directory, needed_bytes, keep_free_bytes)
        partial = partial_name(name)
        made = partial
        try:
            _allocate(directory, partial, length_bytes, ranges)
            failpoint("storage.reserve.before_rename")
            directory.rename(partial, name)
            made = name
            failpoint("storage.reserve.after_rename")
        except OSError as error:
            directory.discard(made)
            raise _refused(directory, needed_bytes, error) from error


def grow_file(directory: Directory, name: str, total_bytes: int, keep_free_bytes: int) -> None:
    """Make a reserved file longer, keeping the pages that it has.

    Args:
        directory: Where, on a tmpfs.
        name: A file that `reserve_file` made.
        total_bytes: Its new length, not below the present one.
        keep_free_bytes: Memory that must remain available.

    Raises:
        OutOfSpace: As `reserve_file`. The file is as long as before.
    """
    with _reserving:
        added_bytes = total_bytes
        try:
            descriptor = directory.open_file(name, os.O_RDWR)
            try:
                held_bytes = os.fstat(descriptor).st_size
                added_bytes = total_bytes - held_bytes
                _check_room(directory, added_bytes, keep_free_bytes)
                _extend(descriptor, held_bytes, total_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _refused(directory, added_bytes, error) from error


def allocate_ranges(
    directory: Directory,
    descriptor: int,
    ranges: Sequence[tuple[int, int]],
    keep_free_bytes: int,
) -> None:
    """Allocate more ranges of a sparse file that `reserve_ranges` made.

    Args:
        directory: Where it lies, on a tmpfs.
        descriptor: The file, open for writing.
        ranges: Offset and length; within its length.
        keep_free_bytes: Memory that must remain available.

    Raises:
        OutOfSpace: As `reserve_file`, but ranges that were allocated by then stay so.
    """
    needed_bytes = sum(length for _, length in ranges)
    with _reserving:
        try:
            _check_room(directory, needed_bytes, keep_free_bytes)
            for offset, allocated_bytes in ranges:
                os.posix_fallocate(descriptor, offset, allocated_bytes)
        except OSError as error:
            raise _refused(directory, needed_bytes, error) from error


def _extend(descriptor: int, held_bytes: int, total_bytes: int) -> None:
    try:
        failpoint("storage.grow.before_allocate")
        os.posix_fallocate(descriptor, held_bytes, total_bytes - held_bytes)
        failpoint("storage.grow.after_allocate")
    except OSError:
        os.ftruncate(descriptor, held_bytes)
        raise


def _refused(directory: Directory, needed_bytes: int, error: OSError) -> OutOfSpace:
    return OutOfSpace(
        str(directory.path),
        needed_bytes,
        _room_bytes(directory),
        f"The kernel said: {error}. {_LARGER_DIRECTORY}",
    )


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


def _allocate(
    directory: Directory, name: str, length_bytes: int, ranges: Sequence[tuple[int, int]]
) -> None:
    directory.unlink(name)
    descriptor = directory.open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        failpoint("storage.reserve.before_allocate")
        os.ftruncate(descriptor, length_bytes)
        for offset, allocated_bytes in ranges:
            os.posix_fallocate(descriptor, offset, allocated_bytes)
        failpoint("storage.reserve.after_allocate")
    finally:
        os.close(descriptor)
