"""State that torch would wait for the device to tell: what lies there, and its gradient scaler's.

Owns the question whether a tensor's values can be looked at for nothing, and the way around
`torch.amp.GradScaler.state_dict`, which reads the scale from the device and so waits for everything
that was enqueued before: `captured` has the tensors themselves in the places of the numbers, and
`loadable` turns them into numbers again. Promises the keys of `state_dict`, and that what was
captured before the scaler's first use, or by `state_dict` itself, is loadable too.
"""

from collections.abc import Mapping
from typing import Any

import torch


def on_device(tensor: torch.Tensor) -> bool:
    """Whether to look at the tensor's values is to wait for a device."""
    return tensor.device.type not in ("cpu", "meta")


def is_scaler(target: object) -> bool:
    """Whether this is torch's scaler, or one with its state."""
    own = torch.amp.GradScaler.state_dict
    return isinstance(target, torch.amp.GradScaler) and type(target).state_dict is own


def captured(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """What `state_dict` returns, with tensors for what lies on a device."""
    if not scaler.is_enabled():
        return {}
    return {
        "scale": _held(scaler._scale, scaler._init_scale),
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
        "_growth_tracker": _held(scaler._growth_tracker, scaler._init_growth_tracker),
    }


def loadable(state: Mapping[str, Any]) -> dict[str, Any]:
    """What was captured, as `load_state_dict` takes it."""
    return {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }


def _held(tensor: torch.Tensor | None, initial: float) -> object:
    """Where the number is now: the scaler makes its tensors when it is first used."""
    if tensor is None:
        return initial
    return tensor if on_device(tensor) else tensor.item()
