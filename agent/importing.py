"""Taking another program's checkpoint into Everstep.

Owns `everstep import`, as far as it needs no torch: a child process of the client package reads the
checkpoint and makes the snapshot through the agent, as a trainer would.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everstep.agent.children import report_of
from everstep.proto.errors import Refused

FORMATS = ("auto", "dcp", "safetensors", "torch")


def format_named(form: str) -> str:
    """The format, if there is one of that name.

    Raises:
        Refused: If there is none.
    """
    if form not in FORMATS:
        raise Refused(f"there is no format {form!r}: say {', '.join(FORMATS)}.")
    return form


def import_by_child(
    source: Path,
    job: str,
    *,
    form: str,
    parts: Sequence[str],
    step: int | None,
    timeout_s: float,
    address: str,
) -> dict[str, Any]:
    """Have the client package make a snapshot of a checkpoint.

    Args:
        source: The checkpoint.
        job: That gets it as its first snapshot.
        form: One of `FORMATS`.
        parts: "NAME" or "NAME=KEY" each; empty for all.
        step: The snapshot's; None for what the checkpoint says.
        timeout_s: How long the snapshot may take.
        address: Of the agent; empty for this user's own, which is started if need be.

    Returns:
        What the child says it has imported.

    Raises:
        Refused: If torch is not installed here, or the child refused.
        AgentUnavailable: If no agent answers.
        EverstepError: Whatever else the child ran into.
    """
    if not source.exists():
        raise Refused(f"{source} is not there. Nothing was imported.")
    arguments = ["--source", str(source), "--job", job, "--format", form]
    arguments += ["--timeout-s", str(timeout_s)]
    arguments += [word for part in parts for word in ("--part", part)]
    arguments += [] if step is None else ["--step", str(step)]
    arguments += ["--agent", address] if address else []
    return report_of("everstep.client.importing", arguments, "import")
