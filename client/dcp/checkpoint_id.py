"""Which step a `checkpoint_id` of `torch.distributed.checkpoint` means.

Owns the spelling. Promises that what names no step is refused, never guessed at.
"""

import os
import re
from pathlib import PurePath

from everstep.proto.errors import Refused

CheckpointId = int | str | os.PathLike[str]
_MOST = (1 << 63) - 1
_NAMED = re.compile(r"(?:[A-Za-z]+[-_.]?)?([0-9]{1,19})")


def step_of(checkpoint_id: CheckpointId) -> int:
    """The step that is meant.

    Args:
        checkpoint_id: The step itself, or a path whose last component is a number, or one word and
            a number: ``7``, ``"7"``, ``"step-7"``, ``"runs/gpt/checkpoint_7"``, ``"out/step007/"``.

    Raises:
        Refused: If it is none of these.
    """
    step = _step(checkpoint_id)
    if step is None:
        raise Refused(
            f"checkpoint_id={checkpoint_id!r} names no step. Give the step, or a path that ends in "
            "one: 7, 'step-7', 'runs/gpt/step-7'. The job is named by the writer or the reader."
        )
    return step


def names_step(checkpoint_id: object) -> bool:
    """Whether `step_of` takes it."""
    return isinstance(checkpoint_id, int | str | os.PathLike) and _step(checkpoint_id) is not None


def _step(checkpoint_id: CheckpointId) -> int | None:
    if isinstance(checkpoint_id, bool):
        return None
    if isinstance(checkpoint_id, int):
        return checkpoint_id if 0 <= checkpoint_id <= _MOST else None
    found = _NAMED.fullmatch(PurePath(checkpoint_id).name)
    if found is None or int(found[1]) > _MOST:
        return None
    return int(found[1])
