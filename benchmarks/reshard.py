"""Restoring into another layout, beside dcp.load from tmpfs and the same layout.

``python -m benchmarks.reshard [--rounds N] [--parameters P] [--short]``. Four ranks with FSDP2, or
two by two with tensor parallelism, snapshot once and save with dcp.save to tmpfs. Then every round
starts ranks of each layout anew, which build their model and optimizer (as dcp.load demands) and
do both, in turns: ``client.restore()`` from memory and ``dcp.load``, each from a barrier to the
last rank's end, and compare the bytes. One launch more looks at the ranks' anonymous memory
instead: what it grows by over the live shards; mapped arenas are shared pages of a file and not
among it. Last, the time that ``snapshot()`` takes of a model with 5000 leaves
(`benchmarks/reshard_leaves.py`).
"""

import argparse
import logging
import statistics
import warnings
from typing import Any

from benchmarks import reshard_leaves
from benchmarks.report import Report
from benchmarks.reshard_ranks import Task, launch
from benchmarks.workload import agent, scratch

PARAMETERS = 75_000_000
LEAVES = 5000
SAVED = ("dp4", "tp2-dp2")
CASES = (("dp4", "dp4"), ("dp4", "dp3"), ("dp4", "dp8"), ("tp2-dp2", "dp4"))
MIB = 1 << 20


def run(rounds: int, parameters: int, leaves: int) -> Report:
    """Measure; the table's rows are medians over the rounds."""
    report = Report("reshard")
    answers: dict[tuple[str, str], list[list[dict[str, Any]]]] = {case: [] for case in CASES}
    watched: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with agent() as address, scratch("/dev/shm") as base:
        directories = {saved: base / saved for saved in SAVED}
        launches = 0

        def launched(role: str, saved: str, layout: str, ours_first: bool) -> list[dict[str, Any]]:
            nonlocal launches
            launches += 1
            where = (f"bench-{saved}", launches, address, str(directories[saved]))
            return launch(Task(role, layout, *where, parameters, ours_first))

        for saved, directory in directories.items():
            directory.mkdir()
            ranks = launched("save", saved, saved, True)
        state = sum(rank["bytes"] for rank in ranks)
        report.add("state", state, f"{state / 1e6:9.1f} MB", "state_bytes")
        for round_ in range(rounds):
            for case in CASES:
                answers[case].append(launched("restore", *case, round_ % 2 == 0))
        for case in CASES:
            watched[case] = launched("memory", *case, True)
            answers[case] = answers[case] or [watched[case]]  # a short run times these
    _times(report, answers)
    _memory(report, watched)
    reshard_leaves.measure(report, leaves, max(5, 3 * rounds))
    return report


def _times(report: Report, answers: dict[tuple[str, str], list[list[dict[str, Any]]]]) -> None:
    medians = {}
    for (saved, layout), launches in answers.items():
        label, key = f"{saved} to {layout}", f"{saved}_{layout}"
        for way, name in (("ours", "restore()"), ("dcp", "dcp.load")):
            samples = [_wall(ranks, way) for ranks in launches]
            found = report.seconds(f"{label}, {name}", samples, f"{key}_{way}")
            medians[saved, layout, way] = found
    unchanged = medians["dp4", "dp4", "ours"]
    for (saved, layout), launches in answers.items():
        label, ours = f"{saved} to {layout}", medians[saved, layout, "ours"]
        ratio = medians[saved, layout, "dcp"] / ours
        report.target(f"{label}, dcp.load over restore", ratio, 2, at_least=True)
        if saved != layout:
            report.target(f"{label}, over the unchanged layout", ours / unchanged, 1.5)
        moved = [
            sum(r["moved"] for r in ranks) / sum(r["bytes"] for r in ranks) for ranks in launches
        ]
        report.target(f"{label}, bytes moved over needed", statistics.median(moved), 1.1)


def _wall(ranks: list[dict[str, Any]], way: str) -> float:
    """From the first to begin, after a barrier, to the last one's end; one clock for all."""
    return float(max(rank[way][1] for rank in ranks) - min(rank[way][0] for rank in ranks))


def _memory(report: Report, watched: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    for (saved, layout), ranks in watched.items():
        for way, name in (("ours", "restore()"), ("dcp", "dcp.load")):
            most = max(rank[f"{way}_growth"] for rank in ranks) / MIB
            label = f"{saved} to {layout}, {name}: MiB over the local shards"
            if way == "ours":
                report.target(label, most, 256)
            else:
                report.add(label, most, f"{most:9.1f}", f"{saved}_{layout}_{way}_growth_mib")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--leaves", type=int, default=LEAVES)
    parser.add_argument("--short", action="store_true", help="see that it works, in under a minute")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    if options.short:
        options.rounds, options.parameters, options.leaves = 0, 1, 200
    run(options.rounds, options.parameters, options.leaves).print()


if __name__ == "__main__":
    main()
