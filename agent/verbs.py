"""What the verbs of the command line share: the application, and what an option's text means.

Owns the agent, the directory, the job and the level that an option names. Promises that a wrong
name is refused before anything is asked. Imports late, so that the agent's own process carries
nothing that only other verbs need. The verbs are in `agent.verbs_host`, `agent.verbs_import`,
`agent.verbs_safety` and `agent.verbs_snapshots`.
"""

from pathlib import Path
from typing import Any

import typer

from everstep.agent.exits import Verbs
from everstep.proto.errors import AgentUnavailable, Refused

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def examples(*lines: str) -> str:
    """The end of a verb's help."""
    # "\b" keeps the line breaks of the paragraph it begins.
    return "\b\nExamples:\n" + "\n".join(f"  everstep {line}" for line in lines)


def job_named(job: str) -> str:
    """The name, if it is one: a wrong one must not look like an absent job."""
    from everstep.proto.ids import checked_name

    return checked_name("job", job) if job else job


def level_named(level: str) -> str:
    """The level, if there is one of that name; empty for all."""
    if level not in ("", "memory", "nvme"):
        raise Refused(f"there is no level {level!r}: say memory or nvme.")
    return level


def place_named(directory: Path | None, job: str, address: str) -> Any:
    """The named directory, or those of the agent."""
    from everstep.agent.bare import place_of, place_of_agent

    if directory is not None:
        if address:
            raise Refused("a directory is looked at without an agent: leave --agent out.")
        return place_of(directory, job)
    with agent_named(address) as asked:
        return place_of_agent(asked.status(job), asked.address, job)


def agent_named(address: str) -> Any:
    """The agent that is named, or the advice to do without one."""
    from everstep.agent.asking import Agent
    from everstep.agent.config import load

    try:
        return Agent(address_named(address))
    except AgentUnavailable as error:
        nvme_dir = load().agent.nvme_dir or "/nvme"
        detail = f"{error.detail}; with no agent running, name a directory, such as {nvme_dir}"
        raise AgentUnavailable(error.address, detail) from error


def address_named(address: str) -> str:
    """The address of the agent to ask."""
    from everstep.agent.config import agent_address

    return agent_address(address)
