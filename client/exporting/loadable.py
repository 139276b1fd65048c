"""A state without what ``torch.load(weights_only=True)`` refuses.

Owns what becomes of the other types: something equal, of torch's own or Python's plain types.
Promises that tensors stay the same objects.
"""

from collections import OrderedDict
from typing import Any

import numpy as np
import torch


def loadable(thing: Any) -> Any:
    """The same with arrays as tensors, ranges as lists, and so on."""
    if isinstance(thing, dict):
        mapping: type[dict[Any, Any]] = OrderedDict if isinstance(thing, OrderedDict) else dict
        return mapping((key, loadable(value)) for key, value in thing.items())
    if type(thing) in (list, tuple, set, frozenset):
        kind = set if isinstance(thing, frozenset) else type(thing)
        return kind(loadable(item) for item in thing)
    if isinstance(thing, range):
        return list(thing)
    if isinstance(thing, slice):
        return (thing.start, thing.stop, thing.step)
    if isinstance(thing, np.generic):
        return loadable(np.asarray(thing)).item()
    return _from_numpy(thing) if isinstance(thing, np.ndarray) else thing


def _from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array as a tensor: times as their counts, and long floats, which torch lacks, rounded."""
    if array.dtype.kind in "mM":
        array = array.astype(np.int64)
    elif array.dtype.kind in "fc":
        longest = np.float64 if array.dtype.kind == "f" else np.complex128
        array = array.astype(min(array.dtype.newbyteorder("="), np.dtype(longest)))
    native = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))
