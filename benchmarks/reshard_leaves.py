"""The host time of `snapshot()` for a model of many small leaves, its layout unchanged.

Plain modules with AdamW, the same under `fully_shard`, and DTensors in a plain module. Every round
is one snapshot, the one before it committed. What the time goes into is
measured apart: seeing that nothing has changed, copying at once what is small (leaves below
16 KiB) and sampling the rest, and asking the agent for a slot.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from benchmarks.report import Report
from benchmarks.workload import agent

LIMIT_S = 0.005
SMALL = 64
"""Elements of a small leaf: 256 bytes."""
LARGE = 8192
"""Elements of a leaf that is copied lazily: 32 KiB."""
PER_MODULE = 25


def measure(report: Report, leaves: int, rounds: int) -> None:
    """Add the rows and targets."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder, 'store')}"
        distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        with agent() as address:
            for name, make in _KINDS.items():
                found = _rounds(address, name, *make(leaves), rounds)
                report.seconds(f"{leaves} leaves, {name}: snapshot()", found["all"], f"{name}_all")
                for part in ("collect", "copy", "slot"):
                    key = f"{name}_{part}"
                    report.seconds(f"  {name}: {_PARTS[part]}", found[part], key)
                median = statistics.median(found["all"])
                report.target(f"snapshot() of {leaves} leaves, {name}, ms", median * 1e3, 5)
        distributed.destroy_process_group()


_PARTS = {
    "collect": "seeing that nothing changed",
    "copy": "copying and sampling at once",
    "slot": "asking for a slot",
}


def _rounds(
    address: str, name: str, model: torch.nn.Module, optimizer: Any, rounds: int
) -> dict[str, list[float]]:
    import everstep
    from everstep.client.recollecting import Recollecting
    from everstep.client.snapshotting import Snapshotting
    from everstep.snapshot.capture import Capture

    client = everstep.connect(name.replace(", ", "-"), agent=address, rank=0, world=1)
    objects = {"model": model} | ({"optimizer": optimizer} if optimizer else {})
    client.attach(**objects)
    parts: dict[str, float] = {}
    found: dict[str, list[float]] = {"all": [], "collect": [], "copy": [], "slot": []}
    undo = [
        _timed(parts, "collect", Recollecting, "collect"),
        _timed(parts, "slot", Snapshotting, "_offer"),
        _timed(parts, "copy", Capture, "begin"),
    ]
    for step in range(1, rounds + 4):
        begun = time.perf_counter()
        handle = client.snapshot(step)
        taken = time.perf_counter() - begun
        assert handle.wait(), handle
        if step > 3:  # the first arranges the layout
            found["all"].append(taken)
            for part, seconds in parts.items():
                found[part].append(seconds)
    for restore in undo:
        restore()
    client.close(timeout=0)
    return found


def _timed(parts: dict[str, float], part: str, owner: Any, method: str) -> Callable[[], None]:
    inner = getattr(owner, method)

    def timed(*args: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        try:
            return inner(*args, **named)
        finally:
            parts[part] = time.perf_counter() - begun

    setattr(owner, method, timed)
    return lambda: setattr(owner, method, inner)


def _model(leaves: int, elements: int) -> torch.nn.Module:
    model = torch.nn.Module()
    for index in range(-(-leaves // PER_MODULE)):
        inner = torch.nn.Module()
        for number in range(min(PER_MODULE, leaves - index * PER_MODULE)):
            inner.register_parameter(f"p{number}", torch.nn.Parameter(torch.ones(elements)))
        model.add_module(f"m{index}", inner)
    return model


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    optimizer.step()
    return optimizer


def _small(leaves: int) -> tuple[torch.nn.Module, Any]:
    return _model(leaves, SMALL), None


def _trained(leaves: int) -> tuple[torch.nn.Module, Any]:
    """A quarter of the leaves are parameters, the rest what AdamW keeps of them."""
    model = _model(leaves // 4, SMALL)
    return model, _adamw(model)


def _lazy(leaves: int) -> tuple[torch.nn.Module, Any]:
    model = _model(leaves // 4, LARGE)
    return model, _adamw(model)


def _fsdp(leaves: int) -> tuple[torch.nn.Module, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _model(leaves // 4, SMALL)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, _adamw(model)


def _spread(leaves: int) -> tuple[torch.nn.Module, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (1,))
    model = _model(leaves // 4, SMALL)
    for module in model.children():
        for key, parameter in list(module.named_parameters()):
            spread = DTensor.from_local(parameter.detach(), mesh, [Shard(0)], run_check=False)
            module.register_parameter(key, torch.nn.Parameter(spread))
    return model, _adamw(model)


_KINDS: dict[str, Callable[[int], tuple[torch.nn.Module, Any]]] = {
    "module": _small,
    "AdamW": _trained,
    "AdamW, large": _lazy,
    "DTensor": _spread,
    "FSDP2": _fsdp,
}
