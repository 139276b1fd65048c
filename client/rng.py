"""The random number generators that a training step may draw from.

Owns their capture and restore: Python's `random`, NumPy's global generator if it was imported,
torch's CPU generator and those of every visible CUDA device. Promises the next draw of each after
`restore` is the one that would have followed `capture`, and that capture neither waits for a device
(the state of a CUDA generator is kept on the host) nor initialises CUDA where nothing else has:
nothing can have been drawn there. Generators that the user made are state like any other: attach
them.
"""

import random
import struct
import sys
from typing import Any

import torch

from everstep.proto.errors import FormatInvalid

RNG_PATH = "rng"
"""Of the generators' states among the values of a record."""


def capture() -> dict[str, Any]:
    """All generators' states as plain values."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, struct.pack(f"<{len(words)}I", *words), gauss],
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        states["numpy"] = [kind, keys.tobytes(), int(position), int(has_gauss), float(cached)]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    return states


def restore(states: dict[str, Any]) -> list[str]:
    """Set all generators.

    Args:
        states: What `capture` returned.

    Returns:
        What could not be set here and is left as it was, for the user to know.

    Raises:
        FormatInvalid: If the states are not of this form.
    """
    left: list[str] = []
    try:
        version, words, gauss = states["python"]
        random.setstate((version, struct.unpack(f"<{len(words) // 4}I", words), gauss))
        torch.set_rng_state(_bytes_tensor(states["torch"]))
        if "numpy" in states:
            import numpy

            kind, keys, *rest = states["numpy"]
            numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
        devices = states.get("cuda", [])
        if devices and torch.cuda.is_available() and torch.cuda.device_count() == len(devices):
            torch.cuda.set_rng_state_all([_bytes_tensor(state) for state in devices])
        elif devices:
            left.append(f"generators of {len(devices)} CUDA device(s), which are not here")
    except (KeyError, ValueError, TypeError, RuntimeError, struct.error) as error:
        raise FormatInvalid("the random number generators", f"state not usable: {error}") from error
    return left


def derive(seed: int, states: dict[str, Any]) -> None:
    """Set all generators of a rank that has no state of its own.

    Args:
        seed: For all of them; each makes a stream of its own of it.
        states: What `capture` returned on another rank: says which generators there are.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in states:
        import numpy

        numpy.random.seed(seed & 0xFFFFFFFF)


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
