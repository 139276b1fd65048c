"""The command line: `everstep VERB`.

Owns the order of the verbs and the exit status: 0 fine, 1 nothing recoverable or verification
failed, 2 usage, 3 an agent could not be reached. Promises that a verb ends in a table or, with
``--json``, in exactly one JSON document on standard output, and that what goes wrong is one clear
message.
"""

from typing import Annotated

import typer

from everstep.agent import verbs_host, verbs_import, verbs_safety, verbs_snapshots
from everstep.agent.verbs import app
from everstep.agent.version import installed_version

__all__ = ["app", "main"]

_ORDER = (
    verbs_host.agent,
    verbs_safety.status,
    verbs_safety.list_snapshots,
    verbs_safety.recover,
    verbs_safety.verify,
    verbs_snapshots.inspect,
    verbs_snapshots.export,
    verbs_import.import_checkpoint,
    verbs_snapshots.gc,
    verbs_host.doctor,
    verbs_host.demo,
)
app.registered_commands.sort(key=lambda command: _ORDER.index(command.callback))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"everstep {installed_version()}")
        raise typer.Exit


@app.callback()
def everstep(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Everstep keeps a training run alive: what it holds, and whether it is whole.

    Exit status: 0 fine, 1 nothing recoverable or verification failed, 2 usage, 3 an agent could
    not be reached.
    """


def main() -> None:
    """Run the CLI."""
    app(prog_name="everstep")
