"""A file that torch.save wrote, mapped.

Owns what is said of files that only pickle could load: nothing of them is executed here.
"""

from pathlib import Path
from typing import Any

import torch

from everstep.proto.errors import Refused


def read_torch(source: Path) -> Any:
    """What the file holds, its tensors mapped.

    Raises:
        Refused: If it holds what only pickle could load, or is of an older torch.
    """
    try:
        return torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # Whatever it is that torch's reader raises.
        raise Refused(
            f"torch.load(weights_only=True, mmap=True) refuses {source}: {_first_line(error)} "
            "Such a file can only be loaded by executing what it says, which Everstep does not. "
            "Load it with the program that wrote it, and save its state_dict() with torch.save, or "
            "as safetensors. Nothing was imported."
        ) from error


def _first_line(error: Exception) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()[0][:300]
    return text if text.endswith(".") else f"{text}."
