"""Jobs of several ranks in one process: distributed tensors that torch has dealt, no collectives.

Each rank has meshes that see it as that rank, its own model, optimizer and client; ranks run in
threads where they wait for each other. Gradients follow from the weights element by element, so
that every mesh trains the same global tensors, and one process without any mesh says what they are.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn, optim
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import everstep
from everstep.client.client import Client

WORLD_LIMIT = 8
SIZES: dict[str, tuple[int, ...]] = {
    "0.column.weight": (22, 13),
    "0.column.bias": (22,),
    "0.row.weight": (13, 22),
    "0.norm": (13,),
    "1.column.weight": (5, 16),
    "1.row.weight": (33, 40),
    "1.scale": (),
    "1.norm": (3,),
}
"""Leaves by stage; some are smaller than the mesh, none is a multiple of it."""


@dataclass(frozen=True)
class Plan:
    """How a job is spread: fully sharded data parallel, replicas of that, tensors, stages."""

    shards: int = 1
    tensors: int = 1
    stages: int = 1
    replicas: int = 1

    @property
    def world(self) -> int:
        return self.shards * self.tensors * self.stages * self.replicas

    def __str__(self) -> str:
        return f"fsdp{self.shards}-tp{self.tensors}-pp{self.stages}-r{self.replicas}"


class Sharded(nn.Module):
    """Parameters by dotted name, as a model has them."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            *way, last = name.split(".")
            module: nn.Module = self
            for part in way:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(tensor))


def globals_at_start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=generator).bfloat16()
        if name.endswith("norm")
        else torch.randn(shape, generator=generator)
        for name, shape in SIZES.items()
    }


def placements_of(name: str, shape: tuple[int, ...], plan: Plan) -> list[Placement]:
    """For (replicas, shards, tensors)."""
    if not shape:
        return [Replicate(), Replicate(), Replicate()]
    if "column" in name:
        strided = _StridedShard(0, split_factor=plan.tensors) if plan.tensors > 1 else Shard(0)
        return [Replicate(), strided, Shard(0)]
    if "row" in name:
        return [Replicate(), Shard(0), Shard(1)]
    return [Replicate(), Shard(0), Replicate()]


def dealt(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """This rank's part, by torch's own splitting."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    local = whole
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Shard | _StridedShard):
            parts, _ = placement._split_tensor(
                local, mesh.size(dimension), with_padding=False, contiguous=True
            )
            local = parts[coordinate[dimension]]
    return DTensor.from_local(
        local.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def update(optimizer: optim.Optimizer) -> None:
    """One step, of gradients that every element makes for itself."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = gradient(parameter.detach())
    optimizer.step()


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Of each element, by itself: of a distributed tensor on the part, which spares torch to find
    out, for each mesh anew, that it needs no collective."""
    if not isinstance(tensor, DTensor):
        return (tensor * 1.7).sin()
    return DTensor.from_local(
        gradient(tensor._local_tensor),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@dataclass
class Rank:
    """One rank of a job."""

    number: int
    plan: Plan
    model: nn.Module
    optimizer: optim.Optimizer
    own: dict[str, Any]
    client: Client | None = None

    @classmethod
    def build(cls, number: int, plan: Plan, values: Mapping[str, torch.Tensor]) -> "Rank":
        per_stage = plan.world // plan.stages
        stage = number // per_stage
        ranks = torch.arange(stage * per_stage, (stage + 1) * per_stage)
        mesh = DeviceMesh(
            "cpu",
            ranks.reshape(plan.replicas, plan.shards, plan.tensors),
            mesh_dim_names=("replica", "shard", "tensor"),
            _rank=number,
        )
        # Part of the mesh's identity: equal meshes of two ranks would be one in torch's caches.
        mesh._thread_id = number
        mine = {
            name: dealt(whole, mesh, placements_of(name, tuple(whole.shape), plan))
            for name, whole in values.items()
            if plan.stages == 1 or int(name[0]) == stage
        }
        model = Sharded(mine)
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        return cls(number, plan, model, optimizer, {"error": torch.full((3,), number + 1.0)})

    def held(self) -> dict[str, DTensor]:
        """The distributed tensors of model and optimizer, by global name."""
        found: dict[str, Any] = dict(self.model.named_parameters())
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = value
        return found


class Job:
    """All ranks of a plan, connected to one agent, or each to that of its node."""

    def __init__(
        self,
        plan: Plan,
        name: str,
        *,
        zeros: bool = False,
        attach: Any = None,
        agent_of: Callable[[int], str] | None = None,
        **connect: Any,
    ) -> None:
        values = globals_at_start()
        if zeros:
            values = {n: torch.zeros_like(value) for n, value in values.items()}
        self.plan = plan
        self.ranks = [Rank.build(number, plan, values) for number in range(plan.world)]
        attach = attach or (lambda rank: {"model": rank.model, "optimizer": rank.optimizer})
        for rank in self.ranks:
            if agent_of is not None:
                connect["agent"] = agent_of(rank.number)
            rank.client = everstep.connect(
                job=name, interval=1, rank=rank.number, world=plan.world, **connect
            )
            rank.client.attach(**attach(rank))

    def each(self, work: Callable[[Rank], Any]) -> list[Any]:
        """On all ranks at one time; raises what the first that failed raised."""
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            return list(pool.map(work, self.ranks))

    def train(self, steps: int = 1) -> None:
        for rank in self.ranks:
            for _ in range(steps):
                update(rank.optimizer)

    def snapshot(self, step: int, level: str = "memory") -> None:
        handles = self.each(lambda rank: rank.client.snapshot(step))
        assert [handle.skipped for handle in handles] == [""] * len(handles)
        for handle in handles:
            assert handle.wait(level=level), handle

    def restore(self, **options: Any) -> list[int | None]:
        return self.each(lambda rank: rank.client.restore(**options))

    def close(self) -> None:
        self.each(lambda rank: rank.client.close(timeout=0))

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def whole(self) -> dict[str, bytes]:
        """The global tensors, put together from all ranks' parts by torch's own splitting; every
        replica must be equal."""
        found: dict[str, torch.Tensor] = {}
        seen: dict[str, torch.Tensor] = {}
        for rank in self.ranks:
            for name, tensor in rank.held().items():
                self._put(found, seen, name, tensor)
        assert all(bool(there.all()) for there in seen.values())
        return {name: digest(tensor) for name, tensor in sorted(found.items())}

    def _put(
        self,
        found: dict[str, torch.Tensor],
        seen: dict[str, torch.Tensor],
        name: str,
        tensor: torch.Tensor,
    ) -> None:
        if not isinstance(tensor, DTensor):
            known = found.setdefault(name, tensor)
            assert torch.equal(known, tensor), name
            return
        whole = found.setdefault(name, torch.zeros(tensor.shape, dtype=tensor.dtype))
        there = seen.setdefault(name, torch.zeros(whole.numel(), dtype=torch.bool))
        index = torch.arange(whole.numel()).reshape(whole.shape)
        mine = dealt(index, tensor.device_mesh, tensor.placements)._local_tensor.flatten()
        local = tensor._local_tensor.flatten()
        flat = whole.view(-1)
        before = flat[mine]
        assert bool(((before == local) | ~there[mine]).all()), f"replicas of {name} differ"
        flat[mine] = local
        there[mine] = True


@dataclass
class Reference:
    """The same training without any mesh."""

    steps: int
    state: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = Sharded(globals_at_start())
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(self.steps):
            update(optimizer)
        found: dict[str, torch.Tensor] = dict(model.named_parameters())
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state[parameter].items():
                found[f"{name}/{key}"] = value
        self.state = {name: digest(tensor) for name, tensor in sorted(found.items())}


def digest(tensor: torch.Tensor) -> bytes:
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()
