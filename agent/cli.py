"""The command line: `everstep VERB`."""

from pathlib import Path
from typing import Annotated

import typer

from everstep.agent.config import load

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def everstep() -> None:
    """Everstep."""


@app.command()
def agent(
    node_id: Annotated[str | None, typer.Option()] = None,
    socket: Annotated[Path | None, typer.Option()] = None,
    listen: Annotated[str | None, typer.Option()] = None,
    memory_dir: Annotated[Path | None, typer.Option()] = None,
    nvme_dir: Annotated[Path | None, typer.Option()] = None,
    config: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Run the agent in the foreground."""
    from everstep.agent.daemon import run

    overrides = {
        "agent.node_id": node_id,
        "agent.socket": socket,
        "agent.listen": listen,
        "agent.memory_dir": memory_dir,
        "agent.nvme_dir": nvme_dir,
    }
    run(load(config, overrides))


def main() -> None:
    """Run the CLI."""
    app()
