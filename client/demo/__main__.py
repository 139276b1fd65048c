"""The demo's command line: ``python -m everstep.client.demo``.

Owns the demo's own home, where the agent, its files and all logs are. Promises to remove it, and
what the agent held in memory, unless something went wrong: then it says where to look. Ends with
status 0 only if the killed run equals the one left alone, 1 otherwise, 2 for wrong options.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from everstep.client.demo.picture import FILE_NAME, can_draw, draw
from everstep.client.demo.processes import end_agent
from everstep.client.demo.report import Shown, Silent, as_document, as_table
from everstep.client.demo.scenario import Outcome, Plan, play
from everstep.proto.errors import EverstepError

_STEPS, _SHORT_STEPS, _FEWEST_STEPS = 400, 60, 40
_INTERVAL = 4
_INTERRUPTED = 130
"""What shells report for Ctrl-C."""


def _steps(text: str) -> int:
    steps = int(text)
    if not _FEWEST_STEPS <= steps <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{steps} is not between {_FEWEST_STEPS} and 1000000")
    return steps


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="everstep demo",
        description="Train a small model, kill it with SIGKILL, later together with the agent, and "
        "compare every loss and the final weights with those of a run that was left alone.",
    )
    parser.add_argument("--short", action="store_true", help=f"{_SHORT_STEPS} steps only")
    parser.add_argument("--steps", type=_steps, help=f"default: {_STEPS}")
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the kills")
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help=f"where {FILE_NAME} goes"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main() -> int:
    """Run the demo; return the exit status."""
    options = _parser().parse_args()
    steps = options.steps or (_SHORT_STEPS if options.short else _STEPS)
    plan = Plan(steps, options.seed, _INTERVAL)
    # As Ctrl-C: so that no agent and no trainer stays behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    home = Path(tempfile.mkdtemp(prefix="everstep-demo-"))
    keep = True
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        outcome = _play(plan, home, quiet=options.json)
        _show(outcome, options.output / FILE_NAME, as_json=options.json)
        keep = not outcome.equal
        return 0 if outcome.equal else 1
    except (EverstepError, OSError) as error:
        Console(stderr=True).print(
            f"The demo failed: {error}", style="red", markup=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        keep = False
        return _INTERRUPTED
    finally:
        end_agent(home)
        if keep:
            text = f"Logs, diaries and the agent's files are kept in {home}; delete it when done."
            Console(stderr=True).print(text, markup=False, soft_wrap=True)
        else:
            shutil.rmtree(home)


def _play(plan: Plan, home: Path, *, quiet: bool) -> Outcome:
    if quiet:
        return play(plan, home, Silent())
    with Shown(Console(stderr=True), plan.steps) as watcher:
        return play(plan, home, watcher)


def _show(outcome: Outcome, image: Path, *, as_json: bool) -> None:
    drawn = can_draw()
    if drawn:
        draw(outcome, image)
    if as_json:
        document = as_document(outcome, str(image) if drawn else None)
        sys.stdout.write(json.dumps(document) + "\n")
        return
    console = Console()
    console.print(as_table(outcome))
    if drawn:
        console.print(f"Both loss curves: {image}", markup=False, soft_wrap=True)
    else:
        console.print(
            "For a picture of both loss curves: pip install 'everstep[demo]'", markup=False
        )


if __name__ == "__main__":
    sys.exit(main())
