"""Putting an output in its place.

Owns the partial output beside it, the checks that nothing is overwritten unasked, and the words for
a write that failed.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from everstep.proto.errors import EverstepError, OutOfSpace, Refused, WriteFailed


def partial_of(output: Path) -> Path:
    """What is written before it takes its place."""
    return output.parent / f".{output.name}.{os.getpid()}.partial"


def check_absent(output: Path, *, force: bool) -> None:
    """See that nothing is overwritten unasked.

    Raises:
        Refused: If something is there.
    """
    if output.exists() and not force:
        raise Refused(f"{output} exists by now. Say --force to replace it; nothing was written.")


def put_directory(partial: Path, output: Path, *, force: bool, marks: Sequence[str]) -> None:
    """Give a directory its place.

    Args:
        partial: The directory.
        output: Its place.
        force: Replace one that is there.
        marks: Files of which an older one has one; anything else is not ours to delete.

    Raises:
        Refused: If the place is taken.
    """
    sync_directory(partial)
    check_absent(output, force=force)
    if output.exists():
        if not any((output / mark).is_file() for mark in marks):
            raise Refused(
                f"{output} is there and is no distributed checkpoint, so --force does not replace "
                "it. Nothing was written."
            )
        shutil.rmtree(output)
    partial.rename(output)
    sync_directory(output.parent)


def sync_directory(path: Path) -> None:
    """Have a directory's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(output: Path, needed_bytes: int, error: BaseException) -> EverstepError:
    """The error of this package's tree for a failed write of torch's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    free = shutil.disk_usage(output.parent).free
    # torch's writer reports a full disk as a RuntimeError without a cause.
    if free < needed_bytes:
        return OutOfSpace(str(output), needed_bytes, free)
    return WriteFailed(str(output), cause if isinstance(cause, OSError) else OSError(str(error)))
