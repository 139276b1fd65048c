"""Parameters that ranks share (DTensor), as optimizers see them.

Owns what is local of a parameter, and state of which each rank holds the part that goes with its
part of the parameter. Promises that codes and scales of a parameter that is sharded by rows are the
rows of those of the whole, so that they can be spread anew by rows; other shardings are taken where
blocks lie wholly within a rank's part, and refused otherwise.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from everstep.client.optim.codecs import Codec, rows_of
from everstep.client.optim.codecs.codec import Form
from everstep.proto.errors import InvalidConfiguration
from everstep.snapshot.placement import is_distributed, local_of


def row_is_split(parameter: torch.Tensor) -> bool:
    """Whether ranks have parts of a parameter's only row."""
    return is_distributed(parameter) and parameter.dim() == 1 and bool(_sharded(parameter))


def check_spread(parameter: torch.Tensor, codec: Codec, block: int, name: str) -> None:
    """Refuse a parameter whose blocks would lie across ranks.

    Raises:
        InvalidConfiguration: If they would.
    """
    if not is_distributed(parameter):
        return
    for placement in _placements(parameter):
        if placement.is_partial():
            raise InvalidConfiguration(name, f"its placement {placement!r} is a sum to be made")
    if not codec.by_rows and _sharded(parameter):
        raise InvalidConfiguration(
            name,
            f"ranks have parts of it, and codec {codec.name!r} has scales of whole columns; choose "
            "codec='4bit'",
        )
    across = [(dim, count) for dim, count in _sharded(parameter) if dim > 0]
    if not block or not across:
        return
    row = rows_of(parameter.shape)[1]
    ranks = prod(count for _, count in across)
    if parameter.dim() != 2 or row % (ranks * block):
        raise InvalidConfiguration(
            name,
            f"it has the shape {tuple(parameter.shape)} and is sharded by dimension "
            f"{across[0][0]} over {ranks} ranks, so that blocks of {block} elements of codec "
            f"{codec.name!r} would lie across ranks; shard it by dimension 0, choose a block that "
            f"divides its part of a row, or put it into a group with codec='bf16' or 'fp32'",
        )


def spread_like(local: torch.Tensor, form: Form, parameter: torch.Tensor) -> torch.Tensor:
    """State whose part on this rank is `local`, spread as its parameter is."""
    if not is_distributed(parameter):
        return local
    from torch.distributed.tensor import DTensor

    made: torch.Tensor = DTensor.from_local(
        local,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size(form.shape),
        stride=_strides(form.shape),
    )
    return made


def local_gradient(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient."""
    if is_distributed(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local_of(gradient)


def offset_of(parameter: torch.Tensor) -> int:
    """A number for this rank's part that is the same on ranks that have the same part."""
    if not is_distributed(parameter):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        parameter.shape,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
    )
    place = 0
    for size, offset in zip(parameter.shape, offsets, strict=True):
        place = place * int(size) + int(offset)
    return place


def groups_of(parameter: torch.Tensor) -> list[Any]:
    """Process groups over which a sum of this rank's part makes the whole's."""
    if not is_distributed(parameter):
        return []
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return [
        mesh.get_group(dimension)
        for dimension, placement in enumerate(_placements(parameter))
        if _is_sharding(placement) and mesh.size(dimension) > 1
    ]


def _is_sharding(placement: Any) -> bool:
    """Also of strided shards, which torch does not count among them."""
    return getattr(placement, "dim", None) is not None and not placement.is_partial()


def _placements(parameter: torch.Tensor) -> Sequence[Any]:
    placements: Sequence[Any] = parameter.placements  # type: ignore[attr-defined]
    return placements


def _sharded(parameter: torch.Tensor) -> list[tuple[int, int]]:
    """Dimension of the tensor and number of ranks, for each sharding."""
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return [
        (placement.dim % max(1, parameter.dim()), mesh.size(dimension))
        for dimension, placement in enumerate(_placements(parameter))
        if _is_sharding(placement)
    ]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[place + 1 :]) for place in range(len(shape)))


def summed(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks that have parts of a parameter; in place."""
    for group in groups_of(parameter):
        torch.distributed.all_reduce(local, group=group)
    return local


def summed_rows(
    local: torch.Tensor, parameter: torch.Tensor, *, largest: bool = False
) -> torch.Tensor:
    """The sum over ranks that have parts of the same rows; in place.

    Args:
        local: A number for each of this rank's rows.
        parameter: Theirs.
        largest: The maximum over all ranks instead.
    """
    if not is_distributed(parameter):
        return local
    if largest:
        for group in groups_of(parameter):
            torch.distributed.all_reduce(local, torch.distributed.ReduceOp.MAX, group=group)
        return local
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    for dimension, placement in enumerate(_placements(parameter)):
        if _is_sharding(placement) and placement.dim != 0 and mesh.size(dimension) > 1:
            torch.distributed.all_reduce(local, group=mesh.get_group(dimension))
    return local


def gathered(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """All of what this rank has a part of, as it has of a parameter."""
    if not is_distributed(parameter):
        return local
    whole = spread_like(local, Form(tuple(parameter.shape), local.dtype), parameter)
    full: torch.Tensor = whole.full_tensor()  # type: ignore[attr-defined]
    return full


def own_part(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that all ranks have."""
    if not is_distributed(parameter):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placed = everywhere.redistribute(placements=_placements(parameter))
    return local_of(placed)
