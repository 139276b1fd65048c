"""The norm of gradients and the coefficient that clips them, without a look at it from the host.

Promises the same bits whatever the number of threads: sums are made of pieces of a fixed size. The
coefficient is min(1, clip_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it.
"""

from collections.abc import Sequence

import torch

from everstep.client.optim.slots import Slot
from everstep.client.optim.spread import groups_of

_PIECE = 1 << 14
_LEAST = 1e-6


@torch.no_grad()
def total_norm(slots: Sequence[Slot], grad_scale: torch.Tensor) -> torch.Tensor:
    """The 2-norm of all gradients, times a scale, over all ranks; on the scale's device.

    Args:
        slots: Whose works have their gradients.
        grad_scale: One fp32.
    """
    by_groups: dict[tuple[int, ...], list[Slot]] = {}
    for slot in slots:
        key = tuple(id(group) for group in groups_of(slot.parameter))
        by_groups.setdefault(key, []).append(slot)
    squares = []
    for same in by_groups.values():
        norms = [norm for slot in same for norm in _pieces(slot.work.gradient)]
        if norms:
            local = torch.linalg.vector_norm(torch.cat(norms).to(grad_scale.device))
        else:
            local = torch.zeros((), device=grad_scale.device)
        square = local * local
        for group in groups_of(same[0].parameter):
            torch.distributed.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt() * grad_scale.abs().reshape(())


def coefficient(norm: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """What gradients are multiplied with."""
    limit = torch.full_like(norm, clip_norm)
    return torch.div(limit, norm + _LEAST).clamp(max=1.0)


def _pieces(gradient: torch.Tensor) -> list[torch.Tensor]:
    """Norms of pieces. A reduction to several numbers is cut between them, never within one."""
    flat = gradient.reshape(-1)
    whole = flat.numel() // _PIECE * _PIECE
    norms = []
    if whole:
        pieces = flat[:whole].reshape(-1, _PIECE)
        norms.append(torch.linalg.vector_norm(pieces, dim=1, dtype=torch.float32))
    if whole < flat.numel():
        rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
        norms.append(rest.reshape(1))
    return norms
