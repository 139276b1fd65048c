"""From what a verb raises to a message and an exit status.

Owns the exit status: 0 fine, 1 nothing recoverable or verification failed, 2 usage, 3 an agent
could not be reached. Promises that every error raised on purpose, and every usage error, is one
message on standard error or, with ``--json``, the one document on standard output. A bug keeps its
traceback.
"""

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from everstep.proto.errors import AgentUnavailable, DeadlineExceeded, EverstepError, Refused

FINE, FAILED, USAGE, UNREACHABLE = 0, 1, 2, 3
INTERRUPTED = 130

# typer carries a click of its own, or an installed one, by version; this is the one it raises.
_UsageError: Any = typer.BadParameter.__mro__[1]


def exit_status(error: EverstepError) -> int:
    """The exit status that an error stands for."""
    if isinstance(error, Refused):
        return USAGE
    return UNREACHABLE if isinstance(error, AgentUnavailable | DeadlineExceeded) else FAILED


class Verbs(TyperGroup):
    """Turns what a verb raises into a message and an exit status."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's `main`: ends the process if `standalone_mode`, returns a status if not."""
        words = list(sys.argv[1:] if args is None else args)
        status = self._status(words, extra)
        if not standalone_mode:
            return status
        sys.exit(status)

    def _status(self, words: list[str], extra: dict[str, Any]) -> int:
        as_json = "--json" in words
        try:
            returned = super().main(words, "everstep", standalone_mode=False, **extra)
            return returned if isinstance(returned, int) else FINE
        except EverstepError as error:
            _say(type(error).__name__, str(error), as_json=as_json)
            return exit_status(error)
        except _UsageError as error:
            if as_json:
                _say("Usage", error.format_message(), as_json=True)
            else:
                error.show()
            return int(error.exit_code)
        except OSError as error:
            _say(type(error).__name__, str(error), as_json=as_json)
            return FAILED
        except typer.Abort as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                return INTERRUPTED
            _say("Aborted", "nobody answered the question; nothing was done", as_json=as_json)
            return USAGE


def _say(kind: str, message: str, *, as_json: bool) -> None:
    from everstep.agent.display import failure

    failure(kind, message, as_json=as_json)
