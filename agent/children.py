"""Work that needs torch, done by a child process of the client package.

Owns how the command line starts it and understands its answer: one JSON document, either a report
or an error. Promises that an error keeps the group that decides the exit status. The agent's side
never imports torch.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from everstep.proto import errors
from everstep.proto.errors import AgentUnavailable, EverstepError, FormatInvalid, Refused


def report_of(
    module: str, arguments: Sequence[str], purpose: str, instead: str = "", data: bytes = b""
) -> dict[str, Any]:
    """Run a module of the client package, and return what it says it has done.

    Args:
        module: Its name.
        arguments: For it.
        purpose: What it is for, for the message if there is no torch.
        instead: What does without torch, for that message.
        data: On its standard input.

    Raises:
        Refused: If torch is not installed here, or the child refused.
        EverstepError: Whatever else the child ran into.
    """
    if importlib.util.find_spec("torch") is None:
        raise Refused(
            f"{purpose} needs torch, which {sys.executable} does not have. Use an environment "
            f"that has it{instead}. Nothing was written."
        )
    command = [sys.executable, "-P", "-m", module, *arguments]
    ended = subprocess.run(command, input=data, stdout=subprocess.PIPE, check=False)
    return _reply(ended.stdout, ended.returncode)


def _reply(stdout: bytes, status: int) -> dict[str, Any]:
    try:
        reply = json.loads(stdout)
        error = reply.get("error")
    except (ValueError, AttributeError):
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        raise FormatInvalid("the child process", f"it ended {how}, see above") from None
    if error is None:
        return dict(reply)
    raise _as_raised(error)


def _as_raised(error: dict[str, Any]) -> EverstepError:
    """The child's error, of the group that its class belongs to: that decides our exit status."""
    message = str(error.get("message"))
    kind = getattr(errors, str(error.get("type")), EverstepError)
    if kind is AgentUnavailable and "address" in error:
        return AgentUnavailable(str(error["address"]), str(error.get("detail")))
    for group in (errors.Refused, errors.Retryable):
        if isinstance(kind, type) and issubclass(kind, group):
            return group(message)
    return errors.Damaged(message)
