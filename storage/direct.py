"""Writing a shard's image past the page cache, verified on the way.

Owns the O_DIRECT writer: a few threads write chunks of a page-aligned view to a preallocated file,
each chunk checked against its unit digests just before it goes out. Promises that once
`ImageWriter.write` returned, the file's bytes were right in memory, have the right length and
were fsynced. Does not name, publish or remove files. Where the file system refuses O_DIRECT the
same bytes go through the page cache, a bounded amount at a time.
"""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from everstep.kernels.digest import verify_units
from everstep.proto.errors import ShardCorrupt
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES
from everstep.storage.identity import DIGEST_BYTES

ALIGNMENT_BYTES = 4096
"""Of memory, offset and length: covers every logical block size that Linux file systems use."""

_DIRTY_BYTES = 64 << 20
_UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}


class ImageWriter:
    """A bounded pool of writer threads, shared by all images written through it.

    Args:
        threads: How many.
        chunk_bytes: How much one thread writes at a time; rounded down to whole units.
        direct: Whether to try O_DIRECT.
    """

    def __init__(self, *, threads: int, chunk_bytes: int, direct: bool) -> None:
        self._threads = threads
        self._chunk_bytes = max(UNIT_BYTES, chunk_bytes // UNIT_BYTES * UNIT_BYTES)
        self._direct = direct
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="everstep-nvme")

    def close(self) -> None:
        """End the threads, once what they write is written."""
        self._pool.shutdown()

    def write(self, descriptor: int, image: memoryview, unit_digests: bytes, where: str) -> None:
        """Fill an empty file with an image, durably.

        Args:
            descriptor: The file, open for writing.
            image: The bytes; fastest from a page-aligned mapping.
            unit_digests: Of all units of the image.
            where: Names the shard in errors.

        Raises:
            ShardCorrupt: If the image does not match its digests. The file is worthless.
            OSError: If it does not fit or the device fails. The file is worthless.
        """
        _preallocate(descriptor, _rounded_up(image.nbytes))
        transfer = _Transfer(
            descriptor,
            image,
            unit_digests,
            self._chunk_bytes,
            direct=self._direct and _switch_direct(descriptor, on=True),
        )
        # As many tasks as threads, each taking chunk after chunk: the pool's queue stays short
        # however large the image is.
        tasks: list[Future[None]] = [
            self._pool.submit(transfer.run) for _ in range(min(self._threads, transfer.chunk_count))
        ]
        wait(tasks)
        for task in tasks:
            task.result()
        if transfer.bad_units:
            raise ShardCorrupt(where, tuple(sorted(transfer.bad_units)))
        os.ftruncate(descriptor, image.nbytes)
        failpoint("storage.shard.after_write")
        os.fsync(descriptor)
        if not transfer.direct:
            # Nobody reads it back soon; the trainer's host memory is better used otherwise.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class _Transfer:
    """One image on its way: which chunk is next, and whether to go on."""

    def __init__(
        self,
        descriptor: int,
        image: memoryview,
        unit_digests: bytes,
        chunk_bytes: int,
        *,
        direct: bool,
    ) -> None:
        self.descriptor = descriptor
        self.image = image
        self.unit_digests = memoryview(unit_digests)
        self.chunk_bytes = chunk_bytes
        self.direct = direct
        self.chunk_count = -(-image.nbytes // chunk_bytes)
        self.bad_units: set[int] = set()
        self._next = 0
        self._stopped = False
        self._lock = threading.Lock()

    def run(self) -> None:
        """Write chunks until there are none left or one of the threads gave up."""
        try:
            for offset in self._offsets():
                chunk = self.image[offset : offset + self.chunk_bytes]
                if not self._verified(chunk, offset):
                    return
                failpoint("storage.shard.before_chunk")
                self._write(chunk, offset)
        except BaseException:
            self._stopped = True
            raise

    def _offsets(self) -> Iterator[int]:
        while True:
            with self._lock:
                index = self._next
                self._next += 1
            if self._stopped or index >= self.chunk_count:
                return
            yield index * self.chunk_bytes

    def _verified(self, chunk: memoryview, offset: int) -> bool:
        first = offset // UNIT_BYTES
        units = -(-chunk.nbytes // UNIT_BYTES)
        expected = self.unit_digests[first * DIGEST_BYTES : (first + units) * DIGEST_BYTES]
        bad = verify_units(chunk, UNIT_BYTES, expected)
        if bad:
            self.bad_units.update(first + index for index in bad)
            self._stopped = True
        return not bad

    def _write(self, chunk: memoryview, offset: int) -> None:
        if not self.direct:
            self._write_buffered(chunk, offset)
            return
        if _address(chunk) % ALIGNMENT_BYTES or chunk.nbytes % ALIGNMENT_BYTES:
            with mmap.mmap(-1, _rounded_up(chunk.nbytes)) as bounce:
                with memoryview(bounce) as padded:
                    np.copyto(
                        np.frombuffer(padded[: chunk.nbytes], np.uint8),
                        np.frombuffer(chunk, np.uint8),
                    )
                    self._write_direct(padded, chunk, offset)
        else:
            self._write_direct(chunk, chunk, offset)

    def _write_direct(self, aligned: memoryview, chunk: memoryview, offset: int) -> None:
        done = 0
        while done < aligned.nbytes:
            try:
                written = os.pwrite(self.descriptor, aligned[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Some file systems accept the flag and refuse the write.
                self.direct = False
                _switch_direct(self.descriptor, on=False)
                self._write_buffered(chunk, offset)
                return
            # What is left after a short write must start on a block again.
            step = written // ALIGNMENT_BYTES * ALIGNMENT_BYTES
            if step == 0:
                raise OSError(errno.EIO, f"{written} bytes written of {aligned.nbytes - done}")
            done += step

    def _write_buffered(self, chunk: memoryview, offset: int) -> None:
        done = 0
        while done < chunk.nbytes:
            written = os.pwrite(self.descriptor, chunk[done:], offset + done)
            if written == 0:
                raise OSError(errno.EIO, f"0 bytes written of {chunk.nbytes - done}")
            done += written
        if offset // _DIRTY_BYTES != (offset + chunk.nbytes) // _DIRTY_BYTES:
            os.fdatasync(self.descriptor)


def _preallocate(descriptor: int, length_bytes: int) -> None:
    """Learn now, not after half an hour of writing, that the disk is too small."""
    if length_bytes == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, length_bytes)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _switch_direct(descriptor: int, *, on: bool) -> bool:
    """Turn O_DIRECT on or off for an open file; False if the file system refuses."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _rounded_up(length_bytes: int) -> int:
    return -(-length_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _address(view: memoryview) -> int:
    # ctypes gives the address of writable buffers only, and arenas are mapped read-only.
    return int(np.frombuffer(view, np.uint8).ctypes.data)
