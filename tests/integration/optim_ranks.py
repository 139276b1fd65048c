"""One of several ranks that step distributed parameters in codes; see test_optim_ranks.py.

Arguments: rank, world, a file for the ranks to meet, a folder for a checkpoint. It ends with 0 if
every rank's parts are those of the same training without ranks.
"""

import sys
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from everstep.client import optim
from everstep.proto.errors import InvalidConfiguration

PLACED = {"rows": ((65, 256), 0), "conv": ((5, 40, 33), 0), "vector": ((200,), 0)}
ACROSS = ((64, 512), 1)
SUMMED = ("AdamP", "SGDSaI", "Muon")
"""What looks at whole tensors: sums over ranks are bracketed otherwise."""


class Twins:
    """The same parameters and gradients, once spread over a mesh and once whole."""

    def __init__(self, mesh: Any, placed: list[tuple[tuple[int, ...], int]]) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._mesh = mesh
        self._placements = [[Shard(dim)] for _, dim in placed]
        wholes = [torch.randn(shape, generator=self._generator) for shape, _ in placed]
        self.alone = [torch.nn.Parameter(whole.clone()) for whole in wholes]
        self.spread = [
            torch.nn.Parameter(distribute_tensor(whole, mesh, placement))
            for whole, placement in zip(wholes, self._placements, strict=True)
        ]

    def step(self, optimizers: list[Any]) -> None:
        for (here, there), placement in zip(self.pairs(), self._placements, strict=True):
            there.grad = torch.randn(there.shape, generator=self._generator)
            here.grad = distribute_tensor(there.grad, self._mesh, placement)
        for optimizer in optimizers:
            optimizer.step()

    def pairs(self) -> list[tuple[Any, torch.nn.Parameter]]:
        return list(zip(self.spread, self.alone, strict=True))


def train(method: str, codec: str, mesh: Any, **options: Any) -> None:
    placed = [*PLACED.values(), ACROSS]
    twins = Twins(mesh, [(s, dim) for s, dim in placed if method != "Muon" or len(s) > 1])
    optimizers = [
        optim.METHODS[method](held, lr=1e-2, codec=codec, **options)
        for held in (twins.spread, twins.alone)
    ]
    for _ in range(3):
        twins.step(optimizers)
    exact = method not in SUMMED and "clip_norm" not in options
    for here, there in twins.pairs():
        whole = here.detach().full_tensor()
        near = torch.equal(whole, there) if exact else torch.allclose(whole, there, atol=2e-3)
        assert near, (method, codec, options, tuple(there.shape))
        for key, value in optimizers[0].state[here].items():
            if exact and isinstance(value, DTensor) and there.dim() > 1:
                assert torch.equal(value.full_tensor(), optimizers[1].state[there][key]), key


def wrap(make: Any, mesh: Any) -> None:
    """`compress` holds the rows' codes of what is sharded, in the parameter's placement."""
    twins = Twins(mesh, [*PLACED.values(), ACROSS])
    # Of the vector's only row ranks have parts: it stays as it is, though it is large enough.
    held = (twins.spread, twins.alone)
    optimizers = [optim.compress(make(parameters), min_elements=100) for parameters in held]
    for _ in range(3):
        twins.step(optimizers)
        # As from a checkpoint of the same ranks.
        optimizers[0].load_state_dict(optimizers[0].state_dict())
    for here, there in twins.pairs():
        spread, alone = optimizers[0].state[here], optimizers[1].state[there]
        coded = there.dim() > 1
        assert coded == any(key.endswith(".codes") for key in spread), tuple(there.shape)
        assert isinstance(spread["exp_avg.codes" if coded else "exp_avg"], DTensor)
        if coded:
            assert torch.equal(here.detach().full_tensor(), there), tuple(there.shape)
            for key, value in alone.items():
                if key.endswith((".codes", ".scales")):
                    assert torch.equal(spread[key].full_tensor(), value), key


def checkpoint(mesh: Any, folder: str) -> None:
    """Codes go through torch.distributed.checkpoint, whose chunks are the ranks' rows."""
    whole = torch.randn(65, 256, generator=torch.Generator().manual_seed(0))
    held = [torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])) for _ in range(2)]
    first, second = (optim.AdamW([parameter], codec="int8") for parameter in held)
    held[0].grad = distribute_tensor(whole, mesh, [Shard(0)])
    first.step()
    second.prepare()
    tensors = {k: v for k, v in first.state[held[0]].items() if isinstance(v, DTensor)}
    dcp.save(tensors, checkpoint_id=folder)
    empty = {k: v for k, v in second.state[held[1]].items() if isinstance(v, DTensor)}
    dcp.load(empty, checkpoint_id=folder)
    assert set(empty) == set(tensors) != set()
    for key, value in tensors.items():
        assert torch.equal(value.to_local(), second.state[held[1]][key].to_local()), key


def refused(mesh: Any, world: int) -> None:
    whole = torch.randn(64, 100 * world)
    parameter = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)]))
    parameter.grad = distribute_tensor(whole, mesh, [Shard(1)])
    for step in (
        lambda: optim.AdamW([parameter], codec="int8").step(),
        lambda: optim.compress(torch.optim.AdamW([parameter])),
    ):
        try:
            step()
        except InvalidConfiguration as error:
            said = str(error)
        else:
            said = "nothing"
        assert "would lie across ranks; shard it by dimension 0" in said


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world
    )
    mesh = init_device_mesh("cpu", (world,))
    for method in optim.METHODS:
        train(method, "int8", mesh)
    for codec in ("4bit", "fp8"):
        train("AdamW", codec, mesh)
    train("AdamW", "int8", mesh, clip_norm=1.0)
    wrap(torch.optim.AdamW, mesh)
    wrap(torch.optim.NAdam, mesh)
    checkpoint(mesh, sys.argv[4])
    refused(mesh, world)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
