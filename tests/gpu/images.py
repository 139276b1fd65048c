"""What the agent holds of a step, read from the arena and compared leaf by leaf, as bytes."""

from typing import Any

import safetensors.torch
import torch

from everstep.kernels.digest import digest_units
from everstep.proto.ids import UNIT_BYTES
from tests.integration.conftest import AgentProcess


def image_of(agent: AgentProcess, job: str, step: int, rank: int = 0) -> bytes | None:
    """The image of a committed step, its digests checked; None if its slot was used again."""
    held = _held(agent, job, step, rank)
    if held is None:
        return None
    with held.arena.path.open("rb") as arena:
        arena.seek(held.slot * held.arena.slot_bytes)
        image = arena.read(held.record.image_bytes)
    if _held(agent, job, step, rank) is None:
        return None
    assert digest_units(image, UNIT_BYTES) == held.record.unit_digests
    return image


def _held(agent: AgentProcess, job: str, step: int, rank: int) -> Any:
    for one in agent.memory.records(job):
        if (one.snapshot.step, one.rank) == (step, rank):
            return one
    return None


def differing(image: bytes, expected: dict[str, torch.Tensor]) -> list[str]:
    """The names of leaves that are not, bit for bit, what they should be, or not there."""
    found = safetensors.torch.load(image)
    missing = expected.keys() - found.keys()
    wrong = [
        name
        for name, tensor in expected.items()
        if name not in missing and as_bytes(tensor) != as_bytes(found[name])
    ]
    return [*sorted(missing), *wrong]


def as_bytes(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Type, shape and value."""
    plain = tensor.detach().cpu().contiguous()
    flat = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
    return (str(plain.dtype), tuple(plain.shape), flat.numpy().tobytes())
