"""Arithmetic over GF(2^8) with the polynomial 0x11D, the field of the Reed-Solomon codes.

Owns the field (`multiply`, `inverse`) and its two bulk operations: `multiply_accumulate` adds
a multiple of one buffer to another; `dot`, `dots` and `Dots` write sums of multiples of several.
Promises the same bytes on every machine, and that sources are only read and nothing but the
targets is written. Knows no code: which coefficients make one is for the caller to say.

A target must not overlap a source or another target; this is not checked. A buffer that is not
contiguous raises BufferError.
"""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
from numpy.typing import NDArray

from everstep.kernels.native import Bytes, Isa, library

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

POLYNOMIAL = 0x11D
MAX_SOURCES = 255


def _make_products() -> NDArray[numpy.uint8]:
    """All products: row a, column b."""
    factor = numpy.arange(256, dtype=numpy.uint16)
    products = numpy.zeros((256, 256), dtype=numpy.uint16)
    for bit in range(8):
        products ^= numpy.where(numpy.arange(256)[:, None] >> bit & 1, factor, 0).astype("u2")
        factor = (factor << 1) ^ numpy.where(factor & 0x80, POLYNOMIAL, 0).astype("u2")
    return products.astype(numpy.uint8)


PRODUCTS = _make_products()
"""PRODUCTS[a, b] is a times b."""
INVERSES: NDArray[numpy.uint8] = (PRODUCTS == 1).argmax(axis=1).astype(numpy.uint8)
"""INVERSES[a] is 1 over a; that of 0 means nothing."""
PRODUCTS.flags.writeable = INVERSES.flags.writeable = False


def multiply(a: int, b: int) -> int:
    """The product of two elements.

    Raises:
        ValueError: If one is not in 0 to 255.
    """
    return int(PRODUCTS[_element(a), _element(b)])


def inverse(a: int) -> int:
    """The element whose product with `a` is 1.

    Raises:
        ZeroDivisionError: If `a` is 0.
        ValueError: If it is not in 0 to 255.
    """
    if _element(a) == 0:
        raise ZeroDivisionError("0 has no inverse in GF(2^8)")
    return int(INVERSES[a])


def multiply_accumulate(
    coefficient: int, source: "ReadableBuffer", target: "WriteableBuffer", isa: Isa = 0
) -> None:
    """Add `coefficient` times `source` to `target`, byte by byte.

    Args:
        coefficient: 0 to 255.
        source: Any contiguous buffer.
        target: A writable one of the same length.
        isa: Which code to run, see `native.Isa`.

    Raises:
        ValueError: If the lengths differ, the target is read-only, or the coefficient is none.
    """
    taken, written = Bytes(source), Bytes(target, writable=True)
    if taken.bytes != written.bytes:
        raise ValueError(f"a source of {taken.bytes} bytes for a target of {written.bytes}")
    factor = _element(coefficient)
    if isa == "reference":
        _reference_add(factor, source, target)
        return
    library.everstep_gf256_accumulate(factor, taken.address, written.address, taken.bytes, isa)


def dot(
    coefficients: Sequence[int],
    sources: "Sequence[ReadableBuffer]",
    target: "WriteableBuffer",
    isa: Isa = 0,
) -> None:
    """Write the sum of the sources' multiples to `target`, whatever it held.

    Args:
        coefficients: One for each source, 0 to 255.
        sources: At most 255 contiguous buffers. One that is shorter than the target goes on as
            zeros; without any the target becomes zeros.
        target: A writable contiguous buffer.
        isa: Which code to run, see `native.Isa`.

    Raises:
        ValueError: If the arguments do not fit together, or the target is read-only.
    """
    dots([coefficients], sources, [target], isa)


def dots(
    rows: Sequence[Sequence[int]],
    sources: "Sequence[ReadableBuffer]",
    targets: "Sequence[WriteableBuffer]",
    isa: Isa = 0,
) -> None:
    """`dot` for several targets of one length, in one pass over the sources for up to four.

    Args:
        rows: For each target the sources' coefficients.
        sources: As for `dot`.
        targets: Writable contiguous buffers of the same length.
        isa: Which code to run, see `native.Isa`.

    Raises:
        ValueError: If the arguments do not fit together, or a target is read-only.
    """
    Dots(rows, sources, targets).write(isa)


class Dots:
    """The arguments of one `dots`, made ready once for the same buffers over and over.

    The buffers can neither move nor be freed while this object lives.

    Args:
        rows: For each target the sources' coefficients.
        sources: As for `dot`.
        targets: Writable contiguous buffers of the same length.

    Raises:
        ValueError: If the arguments do not fit together, or a target is read-only.
    """

    __slots__ = ("_arguments", "_held", "_rows", "_sources", "_targets")

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        sources: "Sequence[ReadableBuffer]",
        targets: "Sequence[WriteableBuffer]",
    ) -> None:
        taken = [Bytes(source) for source in sources]
        written = [Bytes(target, writable=True) for target in targets]
        size = written[0].bytes if written else 0
        _check_shape(rows, taken, written, size)
        # bytes() refuses what is no element; a list, since it takes arrays as they lie.
        self._rows = [bytes([*row]) for row in rows]
        self._sources, self._targets = sources, targets
        self._held = (taken, written)
        self._arguments = (
            b"".join(self._rows),
            len(written),
            len(taken),
            (ctypes.c_void_p * len(taken))(*[source.address for source in taken]),
            (ctypes.c_uint64 * len(taken))(*[source.bytes for source in taken]),
            (ctypes.c_void_p * len(written))(*[target.address for target in written]),
            size,
        )

    def write(self, isa: Isa = 0) -> None:
        """Write the sums of what the sources hold now, whatever the targets held.

        Args:
            isa: Which code to run, see `native.Isa`.
        """
        if isa != "reference":
            library.everstep_gf256_dots(*self._arguments, isa)
            return
        for row, target in zip(self._rows, self._targets, strict=True):
            _reference_dot(row, self._sources, target)


def _element(value: int) -> int:
    if not 0 <= value <= 255:
        raise ValueError(f"{value} is no element of GF(2^8): 0 to 255 are")
    return value


def _check_shape(
    rows: Sequence[Sequence[int]], sources: list[Bytes], targets: list[Bytes], size: int
) -> None:
    if len(rows) != len(targets):
        raise ValueError(f"{len(rows)} rows of coefficients for {len(targets)} targets")
    if len(sources) > MAX_SOURCES:
        raise ValueError(f"{len(sources)} sources, and {MAX_SOURCES} are the most")
    for row in rows:
        if len(row) != len(sources):
            raise ValueError(f"{len(row)} coefficients for {len(sources)} sources")
    for target in targets:
        if target.bytes != size:
            raise ValueError(f"targets of {size} and of {target.bytes} bytes")
    for source in sources:
        if source.bytes > size:
            raise ValueError(f"a source of {source.bytes} bytes for targets of {size}")


def _reference_add(coefficient: int, source: "ReadableBuffer", target: "WriteableBuffer") -> None:
    taken, written = memoryview(source), memoryview(target)
    if not taken.nbytes:
        return
    values = numpy.frombuffer(taken, dtype=numpy.uint8)
    sums = numpy.frombuffer(written, dtype=numpy.uint8)[: len(values)]
    sums ^= PRODUCTS[coefficient][values]


def _reference_dot(
    row: Sequence[int], sources: "Sequence[ReadableBuffer]", target: "WriteableBuffer"
) -> None:
    if memoryview(target).nbytes:
        numpy.frombuffer(memoryview(target), dtype=numpy.uint8)[:] = 0
    for coefficient, source in zip(row, sources, strict=True):
        _reference_add(coefficient, source, target)
