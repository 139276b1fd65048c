"""The demo's command line: ``python -m everstep.client.demo``.

Owns the demo's own home, where the agents, their files and all logs are. Promises to remove it, and
what the agents held in memory, unless something went wrong: then it says where to look. Ends with
status 0 only if the interrupted run equals the one left alone, 1 otherwise, 2 for wrong options.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from everstep.client.demo import losing, losses, losses_report, scenario
from everstep.client.demo.picture import FILE_NAME, can_draw, draw
from everstep.client.demo.processes import end_agent
from everstep.client.demo.report import Shown, Silent, as_document, as_table
from everstep.proto.errors import EverstepError

_STEPS, _SHORT_STEPS, _FEWEST_STEPS = 400, 60, 40
_INTERVAL = 4
_CLUSTER_STEPS, _SHORT_CLUSTER_STEPS, _FEWEST_CLUSTER_STEPS = 120, 24, 16
_CLUSTER_INTERVAL, _NVME_INTERVAL = 2, 8
_MOST_NODES = 8
_INTERRUPTED = 130
"""What shells report for Ctrl-C."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="everstep demo",
        description="Train a small model, kill it with SIGKILL, later together with the agent, and "
        "compare every loss and the final weights with those of a run that was left alone. With "
        "--nodes: as many agents, each with a rank of one job; some are killed, their memory and "
        "their disks wiped, and what they held is decoded from the others' memory.",
    )
    parser.add_argument("--short", action="store_true", help="few steps only")
    parser.add_argument(
        "--steps", type=int, help=f"default: {_STEPS}, with --nodes {_CLUSTER_STEPS}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the kills")
    parser.add_argument("--nodes", type=int, help=f"agents, 2 to {_MOST_NODES}")
    parser.add_argument(
        "--lose", type=int, help="nodes that are lost; more than --parity: back from disk"
    )
    parser.add_argument(
        "--parity", type=int, help="nodes that may be lost at one time; default: --lose, at most 2"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help=f"where {FILE_NAME} goes"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _options() -> argparse.Namespace:
    """Read the options; ends the process with status 2 if they are wrong."""
    parser = _parser()
    options = parser.parse_args()
    cluster = options.nodes is not None
    fewest = _FEWEST_CLUSTER_STEPS if cluster else _FEWEST_STEPS
    if options.steps is not None and not fewest <= options.steps <= 1_000_000:
        parser.error(f"--steps: {options.steps} is not between {fewest} and 1000000")
    if not cluster:
        if options.lose is not None or options.parity is not None:
            parser.error("--lose and --parity need --nodes: how many there are")
        return options
    options.lose = 1 if options.lose is None else options.lose
    if not 2 <= options.nodes <= _MOST_NODES:
        parser.error(f"--nodes: {options.nodes} is not between 2 and {_MOST_NODES}")
    if options.parity is None:
        options.parity = max(1, min(options.lose, 2, options.nodes - 1))
    for flag in ("lose", "parity"):
        if not 1 <= getattr(options, flag) < options.nodes:
            parser.error(f"--{flag}: {getattr(options, flag)} is not between 1 and --nodes less 1")
    return options


def main() -> int:
    """Run the demo; return the exit status."""
    options = _options()
    # As Ctrl-C: so that no agent and no trainer stays behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    home = Path(tempfile.mkdtemp(prefix="everstep-demo-"))
    keep = True
    try:
        equal = _several(options, home) if options.nodes else _one(options, home)
        keep = not equal
        return 0 if equal else 1
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
            text = f"Logs, diaries and the agents' files are kept in {home}; delete it when done."
            Console(stderr=True).print(text, markup=False, soft_wrap=True)
        else:
            shutil.rmtree(home)


def _one(options: argparse.Namespace, home: Path) -> bool:
    """One node; whether everything was equal."""
    options.output.mkdir(parents=True, exist_ok=True)
    steps = options.steps or (_SHORT_STEPS if options.short else _STEPS)
    plan = scenario.Plan(steps, options.seed, _INTERVAL)
    if options.json:
        outcome = scenario.play(plan, home, Silent())
    else:
        runs = (scenario.LEFT_ALONE, scenario.KILLED)
        with Shown(Console(stderr=True), steps, runs) as watcher:
            outcome = scenario.play(plan, home, watcher)
    _show(outcome, options.output / FILE_NAME, as_json=options.json)
    return outcome.equal


def _several(options: argparse.Namespace, home: Path) -> bool:
    """Several nodes; whether everything was equal."""
    steps = options.steps or (_SHORT_CLUSTER_STEPS if options.short else _CLUSTER_STEPS)
    plan = losses.Losses(
        nodes=options.nodes,
        lose=options.lose,
        parity=options.parity,
        steps=steps,
        seed=options.seed,
        interval=_CLUSTER_INTERVAL,
        nvme_interval=_NVME_INTERVAL,
    )
    if options.json:
        outcome = losing.play(plan, home, Silent())
        _print_document(losses_report.as_document(outcome))
        return outcome.equal
    runs = (scenario.LEFT_ALONE, losing.LOST)
    with Shown(Console(stderr=True), steps, runs) as watcher:
        outcome = losing.play(plan, home, watcher)
    Console().print(losses_report.as_table(outcome))
    return outcome.equal


def _print_document(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")


def _show(outcome: scenario.Outcome, image: Path, *, as_json: bool) -> None:
    drawn = can_draw()
    if drawn:
        draw(outcome, image)
    if as_json:
        document = as_document(outcome, str(image) if drawn else None)
        _print_document(document)
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
