"""The verbs about what is safe: `status`, `list`, `verify`, `recover`.

Owns their options. What a verb does is in the modules it imports, late.
"""

from everstep.agent.exits import FAILED, FINE
from everstep.agent.flags import Address, Directory, JobName, Json, Level, Step
from everstep.agent.verbs import (
    address_named,
    agent_named,
    app,
    examples,
    job_named,
    level_named,
    place_named,
)


@app.command(
    epilog=examples(
        "status", "status --job gpt", "status --agent unix:/run/user/1000/a.sock --json"
    )
)
def status(job: JobName = "", address: Address = "", as_json: Json = False) -> None:
    """Show what an agent holds and does.

    For each job: its ranks, its newest steps, its counters and its last error.
    """
    from everstep.agent import display, showing
    from everstep.agent.asking import Agent

    job_named(job)
    with Agent(address_named(address)) as asked:
        report = showing.status_report(asked.status(job), asked.address)
    if as_json:
        display.document(report)
    else:
        showing.show_status(report)


@app.command(
    "list",
    epilog=examples("list", "list --job gpt", "list ~/.local/state/everstep/nvme", "list --json"),
)
def list_snapshots(
    directory: Directory = None, job: JobName = "", address: Address = "", as_json: Json = False
) -> None:
    """List the snapshots at each level.

    Those that an agent holds or, without one, those that lie in a directory.
    """
    from everstep.agent import display, showing
    from everstep.agent.bare import held, held_by_agent, problems, problems_of_agent

    job_named(job)
    if directory is not None:
        with place_named(directory, job, address) as place:
            report = showing.list_report(place.name, held(place), problems(place))
    else:
        with agent_named(address) as asked:
            known = asked.status(job)
            rows = held_by_agent(known, asked.address)
            report = showing.list_report(asked.address, rows, problems_of_agent(known))
    if as_json:
        display.document(report)
    else:
        showing.show_list(report)


@app.command(
    epilog=examples(
        "verify", "verify --job gpt --step 1200", "verify --level nvme", "verify /nvme/gpt --json"
    )
)
def verify(
    directory: Directory = None,
    job: JobName = "",
    step: Step = None,
    level: Level = "",
    address: Address = "",
    as_json: Json = False,
) -> int:
    """Check the digests of what is committed.

    Exit status 1 if anything is damaged: then it says what, and what can still be restored.
    """
    from everstep.agent import display, showing, verifying

    job_named(job)
    if directory is not None:
        with place_named(directory, job, address) as place:
            verdict = verifying.by_directory(place.at(level_named(level)), step, display.meter())
    else:
        with agent_named(address) as asked:
            known = asked.status(job)
            verdict = verifying.by_agent(asked, known, step, level_named(level), display.meter())
    report = showing.verify_report(verdict)
    if as_json:
        display.document(report)
    else:
        showing.show_verify(report)
    return FINE if verdict.intact else FAILED
