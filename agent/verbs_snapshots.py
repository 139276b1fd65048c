"""The verbs on one snapshot or its files: `inspect`, `export`, `gc`.

Owns their options. What a verb does is in the modules it imports, late.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from everstep.agent.flags import Address, Directory, JobName, Json, Level, Step
from everstep.agent.verbs import address_named, app, examples, job_named, level_named, place_named
from everstep.proto.errors import Refused

_KEEP_NEWEST = 2


@app.command(
    epilog=examples(
        "inspect --job gpt",
        "inspect --job gpt --step 1200 --rank 3",
        "inspect /nvme/gpt/step-000000001200/rank-00003.safetensors",
        "inspect /nvme/gpt --json",
    )
)
def inspect(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PATH]",
            help="A shard file, or a step, job or level directory: no agent is asked.",
        ),
    ] = None,
    job: JobName = "",
    step: Step = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Default: the lowest there is.")] = None,
    level: Level = "",
    everything: Annotated[bool, typer.Option("--all", help="Every leaf and value.")] = False,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Describe one shard of a snapshot.

    Its layout (parts, leaves, aliases), its record (step, producer, values), its digests.
    """
    from everstep.agent import display, showing
    from everstep.agent.inspecting import inspected

    def place() -> Any:
        return place_named(path, job_named(job), address)

    report = inspected(path, place, step=step, rank=rank, level=level)
    if as_json:
        display.document(report)
    else:
        showing.show_shard(report, everything=everything)


@app.command(
    epilog=examples(
        "export --job gpt --to safetensors --part model model.safetensors",
        "export --job gpt --step 1200 --to torch checkpoint.pt",
        "export /nvme/gpt --to dcp checkpoint-directory",
        "export --job gpt --to safetensors --part model --shard-bytes 5000000000 model-directory",
    )
)
def export(
    words: Annotated[
        list[Path],
        typer.Argument(
            metavar="[DIRECTORY] OUTPUT", help="What to export, unless --job; and where to."
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="safetensors, torch or dcp.")],
    job: JobName = "",
    step: Step = None,
    rank: Annotated[int, typer.Option(min=0, help="Whose state, where ranks differ.")] = 0,
    part: Annotated[
        list[str] | None,
        typer.Option(help="Only this part; a single one's names lose its prefix in safetensors."),
    ] = None,
    shard_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="safetensors: files of about so many bytes, and their index."),
    ] = None,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="A file for each rank (safetensors, dcp).")
    ] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="torch: optimizer state in fp32, not in codes.")
    ] = False,
    level: Level = "",
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT.")] = False,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Write a snapshot as files that others read.

    The newest that is whole, unless --step is given. Every digest is checked before a byte is
    written.
    """
    from everstep.agent import choosing, display, exporting, showing

    if to not in exporting.FORMATS or len(words) > 2:
        known = ", ".join(exporting.FORMATS)
        raise Refused(f"say `export [DIRECTORY] --to FORMAT OUTPUT`, FORMAT one of: {known}.")
    directory, output = (words[0], words[1]) if len(words) == 2 else (None, words[0])
    if directory is None and not job:
        raise Refused("name what to export: --job JOB, or a directory before the output.")
    parts = part or []
    exporting.check_options(to, parts, shard_bytes, sharded=sharded, decode=decode)
    exporting.check_output(output, force=force)
    with place_named(directory, job_named(job), address) as place:
        there = place.at(level_named(level))
        chosen = choosing.choose(there, there.one_job(), step, display.meter())
    for reason in chosen.rejected:
        display.note(f"warning: not used: {reason}")
    how = {"force": force, "sharded": sharded}
    if to == "safetensors":
        written = exporting.export_safetensors(
            chosen, rank, parts, output, display.meter(), shard_bytes=shard_bytes, **how
        )
    else:
        written = exporting.export_by_child(chosen, rank, parts, output, to, decode=decode, **how)
    report = showing.export_report(chosen, to, output, written)
    if as_json:
        display.document(report)
    else:
        showing.show_export(report)


@app.command(
    epilog=examples(
        "gc --dry-run",
        "gc --job old-run --all --yes",
        "gc /nvme --keep-newest 3",
        "gc --json --yes",
    )
)
def gc(
    directory: Directory = None,
    job: JobName = "",
    everything: Annotated[
        bool, typer.Option("--all", help="The whole job that --job names, arenas included.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what and why.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    keep_newest: Annotated[
        int | None, typer.Option(min=1, help="Steps to keep in a bare directory; default 2.")
    ] = None,
    keep_every_steps: Annotated[
        int | None, typer.Option(min=1, help="Keep there also every step that this divides.")
    ] = None,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Free what retention does not keep, or a job.

    Works through the agent, by its own retention rule; or on a bare directory, where what is kept
    is verified first.
    """
    from everstep.agent import collecting, display, showing
    from everstep.storage.retention import Rule

    if everything and not job and directory is None:
        raise Refused("--all frees a whole job: name it with --job. Nothing was freed.")
    if as_json and not (dry_run or yes):
        raise Refused("with --json nobody can be asked: say --yes or --dry-run. Nothing was freed.")
    if directory is None and (keep_newest or keep_every_steps):
        raise Refused("the agent keeps its own rule: --keep-... are for a bare directory.")
    where = address_named(address)
    task: collecting.AgentTask | collecting.BareTask
    if directory is None:
        task = collecting.AgentTask(where, job_named(job), everything=everything)
    else:
        rule = Rule(keep_newest or _KEEP_NEWEST, keep_every_steps)
        place = place_named(directory, job_named(job), address)
        meter = display.meter()
        task = collecting.BareTask(place, rule, where, meter, everything=everything)
    with task:
        items = task.planned()
        if not as_json:
            showing.show_items(items)
        agreed = bool(items) and not dry_run
        if agreed and not yes:
            agreed = typer.confirm("Free all of this?", err=True)
        report = showing.gc_report(task.free() if agreed else items, freed=agreed)
    if as_json:
        display.document(report)
    else:
        showing.show_gc(report)
