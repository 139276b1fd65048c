"""Intel's ISA-L through ctypes, as the reference that `benchmarks.erasure` is measured against.

Owns the search for the library and its four functions. It is never a dependency: what finds none
goes without.
"""

import ctypes
import ctypes.util
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy
from numpy.typing import NDArray

Rows = Sequence[Sequence[int]]
Arrays = Sequence[NDArray[numpy.uint8]]


class Isal:
    """One loaded libisal.

    Args:
        path: Of the library, or a name that the loader finds.

    Raises:
        OSError: If it cannot be loaded.

    Attributes:
        version: As it says itself, or the name of its file where it does not.
    """

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self.version = self._find_version(path)

    @classmethod
    def find(cls) -> "Isal | None":
        """The one that an installed pyeclib brings, which knows GFNI, or else the system's."""
        name = ctypes.util.find_library("isal")
        candidates = [*_in_pyeclib(), *([name] if name else [])]
        for candidate in candidates:
            try:
                return cls(candidate)
            except OSError:
                continue
        return None

    def cauchy_rows(self, data_symbols: int, parities: int) -> list[list[int]]:
        """The parities' rows of its Cauchy matrix."""
        symbols = data_symbols + parities
        matrix = ctypes.create_string_buffer(symbols * data_symbols)
        self._library.gf_gen_cauchy1_matrix(matrix, symbols, data_symbols)
        flat = matrix.raw[data_symbols * data_symbols :]
        return [list(flat[at : at + data_symbols]) for at in range(0, len(flat), data_symbols)]

    def sums(self, rows: Rows, sources: Arrays, targets: Arrays) -> "Sums":
        """Everything for a call that does what `gf256.dots` does, so that only it is timed."""
        return Sums(self._library, rows, sources, targets)

    def _find_version(self, path: str) -> str:
        if hasattr(self._library, "isal_get_version_str"):
            self._library.isal_get_version_str.restype = ctypes.c_char_p
            return str(self._library.isal_get_version_str().decode())
        for line in Path("/proc/self/maps").read_text().splitlines():
            if Path(path).name in line:
                return f"in {Path(line.split()[-1]).name}"
        return f"in {path}"


class Sums:
    """Arguments of ec_encode_data, which call it."""

    def __init__(self, library: ctypes.CDLL, rows: Rows, sources: Arrays, targets: Arrays) -> None:
        self._encode = library.ec_encode_data
        flat = b"".join(map(bytes, rows))
        tables = ctypes.create_string_buffer(32 * len(flat) + 64)
        # 64-byte alignment: its kernels may load whole tables.
        self._kept = (tables, sources, targets)
        aligned = ctypes.c_void_p(-(-ctypes.addressof(tables) // 64) * 64)
        library.ec_init_tables(len(sources), len(rows), flat, aligned)
        self._arguments = (
            ctypes.c_int(targets[0].nbytes),
            ctypes.c_int(len(sources)),
            ctypes.c_int(len(rows)),
            aligned,
            (ctypes.c_void_p * len(sources))(*(array.ctypes.data for array in sources)),
            (ctypes.c_void_p * len(targets))(*(array.ctypes.data for array in targets)),
        )

    def write(self) -> None:
        """Do it."""
        self._encode(*self._arguments)


def _in_pyeclib() -> list[str]:
    try:
        files = metadata.files("pyeclib") or []
    except metadata.PackageNotFoundError:
        return []
    return [str(file.locate()) for file in files if file.name.startswith("libisal")]
