"""The verb that takes another program's checkpoint in: `import`.

Owns its options. The work is done by a child process of the client package, which has torch.
"""

from pathlib import Path
from typing import Annotated

import typer

from everstep.agent.flags import Address, Json
from everstep.agent.verbs import app, examples, job_named


@app.command(
    "import",
    epilog=examples(
        "import model.safetensors --job gpt",
        "import hf-model-directory --job gpt --step 120",
        "import checkpoint.pt --job gpt --part model=state_dict",
        "import dcp-directory --job gpt --part model --part ema=ema_model",
    ),
)
def import_checkpoint(
    source: Annotated[
        Path,
        typer.Argument(
            help="A safetensors or torch.save file, an index, or a directory with one, or of dcp."
        ),
    ],
    job: Annotated[str, typer.Option("--job", metavar="JOB", help="It has no snapshot yet.")],
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Default: what an export of Everstep's says, else 0."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="auto, dcp, safetensors or torch.")
    ] = "auto",
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=KEY]",
            help="Only this, under this name; KEY says where it is: state/model.",
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="For the snapshot.")] = 3600.0,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Make a checkpoint of another program's the first snapshot of a job.

    A model's tensors become the part "model". Nothing that the checkpoint says is executed.
    """
    from everstep.agent import display, importing, showing

    report = importing.import_by_child(
        source,
        job_named(job),
        form=importing.format_named(form),
        parts=part or [],
        step=step,
        timeout_s=timeout_s,
        address=address,
    )
    if as_json:
        display.document(report)
    else:
        showing.show_import(report)
