"""Everstep keeps a training run alive.

    import everstep

    client = everstep.connect(job="gpt", interval=10)
    client.attach(model=model, optimizer=optimizer)
    start = client.restore() or 0
    for step in range(start, total):
        ...
        optimizer.step()
        client.snapshot(step + 1)
    client.close()

Importing this module imports nothing else; the client (and with it torch) comes at first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everstep import dcp as dcp
    from everstep.client import Client, Extent, FlatExtent, Limits, Snapshot, Stats, connect
    from everstep.client import optim as optim
    from everstep.client.adapters.accelerate import AccelerateCheckpointer as AccelerateCheckpointer
    from everstep.client.adapters.deepspeed import (
        DeepSpeedCheckpointEngine as DeepSpeedCheckpointEngine,
    )
    from everstep.client.adapters.huggingface import HuggingFaceCallback as HuggingFaceCallback
    from everstep.client.adapters.lightning import LightningCallback as LightningCallback
    from everstep.client.adapters.torchtitan import (
        TorchTitanCheckpointManager as TorchTitanCheckpointManager,
    )

_ADAPTERS = {
    "AccelerateCheckpointer": "accelerate",
    "DeepSpeedCheckpointEngine": "deepspeed",
    "HuggingFaceCallback": "huggingface",
    "LightningCallback": "lightning",
    "TorchTitanCheckpointManager": "torchtitan",
}
"""Each imports its host, so they are not in `__all__`: a star would import them."""

__all__ = [
    "Client",
    "Extent",
    "FlatExtent",
    "Limits",
    "Snapshot",
    "Stats",
    "__version__",
    "connect",
    "errors",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("everstep")
        except PackageNotFoundError:
            return "source"
    if name == "errors":
        return importlib.import_module("everstep.proto.errors")
    if name == "dcp":
        return importlib.import_module("everstep.dcp")
    if name == "optim":
        return importlib.import_module("everstep.client.optim")
    if name in __all__:
        return getattr(importlib.import_module("everstep.client"), name)
    if name in _ADAPTERS:
        adapter = importlib.import_module(f"everstep.client.adapters.{_ADAPTERS[name]}")
        return getattr(adapter, name)
    raise AttributeError(f"module 'everstep' has no attribute {name!r}")
