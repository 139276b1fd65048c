"""Large files on disk, whole or not there: how they are put in place and how they are read back.

Owns what shards' images and parity have in common on NVMe. Promises that a file appears under its
name only once all its bytes were verified and are durable, and that reading a bad sector back is a
bad unit, not the end of the process. Does not know what the bytes mean.
"""

import os

from everstep.kernels.digest import verify_units
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES
from everstep.storage.direct import ImageWriter
from everstep.storage.directory import Directory, partial_name, storage_error
from everstep.storage.identity import DIGEST_BYTES


def publish_image(
    writer: ImageWriter, directory: Directory, name: str, image: memoryview, unit_digests: bytes
) -> None:
    """Put an image under `name`, durably, replacing what was there in one move.

    Raises:
        ShardCorrupt: If the image does not match its digests; what was there stays.
        OutOfSpace: If it does not fit; what was there stays.
        WriteFailed: If the device fails; what was there stays, or is already the new bytes.
    """
    partial = partial_name(name)
    where = str(directory.path / name)
    try:
        failpoint("storage.shard.before_write")
        directory.unlink(partial)
        descriptor = directory.open_file(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            writer.write(descriptor, image.cast("B"), unit_digests, where)
        finally:
            os.close(descriptor)
        failpoint("storage.shard.before_rename")
        directory.rename(partial, name)
        failpoint("storage.shard.after_rename")
        directory.sync()
    except OSError as error:
        directory.discard(partial)
        raise storage_error(where, image.nbytes, error) from error
    except BaseException:
        directory.discard(partial)
        raise


def damaged_units(descriptor: int, image_bytes: int, unit_digests: bytes) -> list[int]:
    """The units of an open file that do not match their digest or cannot be read.

    Reads rather than maps: a bad sector is a bad unit then, not a SIGBUS.
    """
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    units = range(len(unit_digests) // DIGEST_BYTES)
    return [unit for unit in units if not _intact(descriptor, image_bytes, unit_digests, unit)]


def _intact(descriptor: int, image_bytes: int, unit_digests: bytes, unit: int) -> bool:
    expected = unit_digests[unit * DIGEST_BYTES : (unit + 1) * DIGEST_BYTES]
    offset = unit * UNIT_BYTES
    wanted_bytes = min(UNIT_BYTES, image_bytes - offset)
    try:
        data = os.pread(descriptor, wanted_bytes, offset)
    except OSError:
        return False
    return len(data) == wanted_bytes and not verify_units(data, UNIT_BYTES, expected)
