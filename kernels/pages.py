"""What this process tells the kernel about pages of mapped files.

Owns two calls of `madvise` on ranges of addresses, for memory of any size. Promises that other
threads run Python meanwhile (the `mmap` module's own methods hold the GIL: an agent that let go of
15 GB did not answer for 0.15 s), and that what the memory holds stays as it is. Best effort: a
kernel that does not know the call, or has no memory left, changes nothing, which costs time later.
Starts no threads. Nobody may unmap the range during a call.
"""

import ctypes
import mmap

_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not name it yet
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def populate(address: int, size: int) -> bool:
    """Map every page of a writable range now: one by one, as they are touched, takes longer.

    Args:
        address: Of the first byte, on a page's border.
        size: In bytes.

    Returns:
        Whether all of them are.
    """
    return bool(_libc.madvise(address, size, _POPULATE_WRITE) == 0)


def let_go(address: int, size: int) -> bool:
    """Forget where the pages of a shared file are: to unmap them takes no time any more.

    They are found again if the range is still used.

    Args:
        address: Of the first byte, on a page's border.
        size: In bytes.

    Returns:
        Whether that was done.
    """
    return bool(_libc.madvise(address, size, mmap.MADV_DONTNEED) == 0)
