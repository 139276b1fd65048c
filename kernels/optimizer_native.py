"""The fused optimizer step on the CPU: a table of works in native memory, stepped range by range.

Owns the table's layout (`everstep_optimizer_tensor` in abi.h) and the check of what goes into it.
Promises the same bits on every instruction set and however the chunks are split into ranges, and
that no thread is started: callers may share a table's ranges among theirs. Does not keep tensors
alive: addresses are those of the last `refresh`, and the caller holds the tensors until `step`
returns.
"""

from collections.abc import Sequence
from typing import Any

import numpy

from everstep.kernels.native import library
from everstep.kernels.optimizer_checks import TYPES, UNBLOCKED, check, check_tensor, type_name
from everstep.kernels.optimizer_work import (
    CHUNK_ELEMENTS,
    CODECS,
    METHODS,
    SCALARS_AT_MOST,
    STATES_AT_MOST,
    Work,
)

_STATE = numpy.dtype(
    [
        ("codes", numpy.uint64),
        ("scales", numpy.uint64),
        ("correction", numpy.uint64),
        ("codec", numpy.uint32),
        ("block", numpy.uint32),
    ]
)
_TENSOR = numpy.dtype(
    [
        ("parameter", numpy.uint64),
        ("gradient", numpy.uint64),
        ("correction", numpy.uint64),
        ("direction", numpy.uint64),
        ("rows", numpy.uint64),
        ("row", numpy.uint64),
        ("first_chunk", numpy.uint64),
        ("seed", numpy.uint64),
        ("parameter_type", numpy.uint32),
        ("gradient_type", numpy.uint32),
        ("states", _STATE, STATES_AT_MOST),
        ("scalars", numpy.float32, SCALARS_AT_MOST),
    ]
)
_METHOD_NUMBERS = {name: number for number, name in enumerate(METHODS)}


class Table:
    """Some parameters that are stepped by one method.

    Args:
        works: The parameters. They are checked here.
        method: One of `optimizer_work.METHODS`.

    Raises:
        ValueError: If a work does not fit the method, its codecs or its tensors.

    Attributes:
        chunk_count: Of all works; ranges are cut from these.
    """

    __slots__ = ("_address", "_gradients", "_method", "_records", "_sizes", "chunk_count")

    def __init__(self, works: Sequence[Work], method: str) -> None:
        if method not in METHODS:
            raise ValueError(f"method: {method!r} is none of {', '.join(METHODS)}")
        self._method = _METHOD_NUMBERS[method]
        self._gradients = method != "apply"
        self._records = numpy.zeros(len(works), _TENSOR)
        self._address = int(self._records.ctypes.data)
        self._sizes = [work.rows * work.row for work in works]
        self.chunk_count = 0
        for number, (work, record) in enumerate(zip(works, self._records, strict=True)):
            check(work, method, f"works[{number}]")
            self._describe(work, record)
        self._fill(works)

    def refresh(self, works: Sequence[Work]) -> None:
        """Take the addresses, scalars and seeds of the same parameters, with the same codecs.

        Raises:
            ValueError: If there are more or fewer works than the table has, or a gradient is of
                another size or type, or not contiguous.
        """
        if len(works) != len(self._sizes):
            raise ValueError(f"works: {len(works)}, where the table has {len(self._sizes)}")
        self._fill(works)

    def step(
        self,
        grad_scale_address: int,
        found_inf_address: int,
        first: int,
        count: int,
        isa: int = 0,
    ) -> None:
        """Step the chunks [first, first + count).

        Args:
            grad_scale_address: Of the fp32 by which gradients are multiplied; 0 means 1.
            found_inf_address: Of an fp32; if it is not 0, nothing is written. 0: there is none.
            first: The first chunk.
            count: How many.
            isa: Which code runs, see `native.Isa`.

        Raises:
            ValueError: If the table has no such chunks.
        """
        if first < 0 or count < 0 or first + count > self.chunk_count:
            raise ValueError(
                f"first, count: chunks {first} to {first + count} of {self.chunk_count}"
            )
        library.everstep_optimizer_step(
            self._address,
            len(self._sizes),
            self._method,
            grad_scale_address,
            found_inf_address,
            first,
            count,
            isa,
        )

    def _describe(self, work: Work, record: Any) -> None:
        """Fill in what does not change between steps."""
        rows, row = _shape(work)
        record["rows"], record["row"] = rows, row
        record["first_chunk"] = self.chunk_count
        record["parameter_type"] = TYPES[type_name(work.parameter.dtype)]
        for state, place in zip(work.states, record["states"], strict=False):
            place["codec"] = CODECS.index(state.codec)
            place["block"] = state.block
        self.chunk_count += rows * -(-row // CHUNK_ELEMENTS)

    def _fill(self, works: Sequence[Work]) -> None:
        """Fill in what may have changed, column by column: a record each is ten times as slow."""
        if not works:
            return
        records = self._records
        records["parameter"] = [work.parameter.data_ptr() for work in works]
        if self._gradients:
            self._fill_gradients(works)
        for name in ("correction", "direction"):
            records[name] = [_address(getattr(work, name)) for work in works]
        records["seed"] = [work.seed for work in works]
        for index, columns in enumerate(zip(*(work.states for work in works), strict=True)):
            place = records["states"][:, index]
            place["codes"] = [state.codes.data_ptr() for state in columns]
            place["scales"] = [_address(state.scales) for state in columns]
            place["correction"] = [_address(state.correction) for state in columns]
        scalars = works[0].scalars
        if any(work.scalars is not scalars for work in works):
            records["scalars"][:, : len(scalars)] = [work.scalars for work in works]
        else:
            records["scalars"][:, : len(scalars)] = scalars

    def _fill_gradients(self, works: Sequence[Work]) -> None:
        gradients = [work.gradient for work in works]
        fit = (
            gradient is not None and gradient.numel() == size and gradient.is_contiguous()
            for gradient, size in zip(gradients, self._sizes, strict=True)
        )
        if not all(fit) or any(type_name(gradient.dtype) not in TYPES for gradient in gradients):
            for number, (gradient, size) in enumerate(zip(gradients, self._sizes, strict=True)):
                check_tensor(gradient, f"works[{number}].gradient", size, tuple(TYPES))
        numbers = {kind: TYPES[type_name(kind)] for kind in {g.dtype for g in gradients}}
        self._records["gradient_type"] = [numbers[gradient.dtype] for gradient in gradients]
        self._records["gradient"] = [gradient.data_ptr() for gradient in gradients]


def _shape(work: Work) -> tuple[int, int]:
    """Rows and elements of a row; one row where that gives the same blocks and larger chunks."""
    for state in work.states:
        if state.codec not in UNBLOCKED and work.row % state.block:
            return work.rows, work.row
    return 1, work.rows * work.row


def _address(tensor: Any) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())
