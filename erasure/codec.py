"""Bytes in, bytes out: encodes and decodes the symbols of a row.

Owns which buffers are multiplied by what. Promises that a decoded symbol equals the lost one byte
for byte if the symbols it was given are right: it computes and does not verify, so callers check
the result's digests. A buffer shorter than the target is followed by virtual zeros; an empty one
is the symbol of a member that has nothing in this row. Copies nothing and allocates nothing of
the size of its input. Any part of a row can be coded alone, as long as all buffers begin at the
same offset of their symbols.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from everstep.erasure.matrix import decoding_row, encoding_row
from everstep.kernels import gf256

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_BLOCK_BYTES = 128 << 10
"""What is changed at once, so that it is still in the cache when it is changed again."""


class Codec:
    """The code of one group size: k data symbols, m parities."""

    def __init__(self, data_symbols: int, parities: int) -> None:
        """Choose the code.

        Raises:
            ValueError: If there is no such code.
        """
        encoding_row(data_symbols, parities, 0)
        self.data_symbols = data_symbols
        self.parities = parities

    def encode(
        self, parity: int, sources: "Sequence[ReadableBuffer | None]", target: "WriteableBuffer"
    ) -> None:
        """Compute one parity of a row.

        Args:
            parity: Which one, 0..m-1.
            sources: The k data symbols in order; None for one that is empty.
            target: Is overwritten whole.

        Raises:
            ValueError: If there is no such parity, or a source is longer than the target.
        """
        row = self._parity_row(parity)
        if len(sources) != len(row):
            raise ValueError(f"{len(sources)} data symbols where the code has {len(row)}")
        views = [_bytes(b"" if source is None else source) for source in sources]
        target_bytes = _bytes(target).nbytes
        if any(view.nbytes > target_bytes for view in views):
            raise ValueError(f"a data symbol is longer than the parity's {target_bytes} bytes")
        _combine(row, views, target)

    def encode_changed(
        self,
        parity: int,
        symbol: int,
        old: "ReadableBuffer",
        new: "ReadableBuffer",
        target: "WriteableBuffer",
    ) -> None:
        """Bring one parity up to date with one data symbol, without reading the others.

        Args:
            parity: Which one, 0..m-1.
            symbol: The data symbol that changed, 0..k-1.
            old: What it held when `target` was computed.
            new: What it holds now.
            target: The parity; is changed in place, and holds neither state if this is cut short.

        Raises:
            ValueError: If there is no such parity or symbol, or a source is longer than the target.
        """
        row = self._parity_row(parity)
        if not 0 <= symbol < len(row):
            raise ValueError(f"data symbol {symbol} of {len(row)}")
        before, after, parity_bytes = _bytes(old), _bytes(new), _bytes(target)
        changed_bytes = max(before.nbytes, after.nbytes)
        if changed_bytes > parity_bytes.nbytes:
            raise ValueError(f"a data symbol is longer than the parity's {parity_bytes.nbytes}")
        for first in range(0, changed_bytes, _BLOCK_BYTES):
            # c * (old ^ new) is c * old ^ c * new: no scratch, and the lengths may differ.
            for source in (before, after):
                block = source[first : first + _BLOCK_BYTES]
                if block.nbytes:
                    gf256.multiply_accumulate(
                        row[symbol], block, parity_bytes[first : first + block.nbytes]
                    )

    def needed(self, present: Collection[int], wanted: int) -> dict[int, int]:
        """Which of the symbols that are there it takes to compute one, and their coefficients.

        Args:
            present: The symbols that are there, in order of preference.
            wanted: Any symbol; if it is there itself, it alone is needed.

        Raises:
            TooFewSymbols: If fewer than k are there.
            ValueError: If there is no such symbol.
        """
        symbols = [wanted] if wanted in present else []
        symbols += [symbol for symbol in dict.fromkeys(present) if symbol != wanted]
        used = tuple(symbols[: self.data_symbols])
        row = decoding_row(self.data_symbols, self.parities, used, wanted)
        return {symbol: factor for symbol, factor in zip(used, row, strict=True) if factor}

    def decode(
        self, present: "Mapping[int, ReadableBuffer]", wanted: int, target: "WriteableBuffer"
    ) -> None:
        """Compute one symbol from k or more others.

        Args:
            present: The symbols that are there: 0..k-1 data, k + t parity t. More than k may be
                given; of those, data is used before parity. A lost symbol that is known to be
                empty is as good as one that is there: give it as ``b""``.
            wanted: The symbol to compute, data or parity.
            target: Is overwritten whole. If it is shorter than the symbol, it gets the beginning.

        Raises:
            TooFewSymbols: If fewer than k are present; `target` is untouched.
            ValueError: If there is no such symbol.
        """
        factors = self.needed(sorted(present), wanted)
        target_bytes = _bytes(target).nbytes
        views = [_bytes(present[symbol])[:target_bytes] for symbol in factors]
        _combine(tuple(factors.values()), views, target)

    def _parity_row(self, parity: int) -> tuple[int, ...]:
        if not 0 <= parity < self.parities:
            raise ValueError(f"parity {parity} of {self.parities}")
        return encoding_row(self.data_symbols, self.parities, self.data_symbols + parity)


def _combine(
    coefficients: Sequence[int], sources: Sequence[memoryview], target: "WriteableBuffer"
) -> None:
    """The sum of the sources times their coefficients, empty ones left out."""
    terms = [(c, s) for c, s in zip(coefficients, sources, strict=True) if s.nbytes]
    gf256.dot([c for c, _ in terms], [s for _, s in terms], target)


def _bytes(buffer: "ReadableBuffer") -> memoryview:
    """The buffer as bytes, not copied."""
    view = memoryview(buffer)
    # A view with a zero in its shape cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")
