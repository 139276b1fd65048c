"""What the demo of lost nodes shows in the end: a table, or one JSON document.

Owns the words and the layout. Promises that the table and the document say the same. Measures and
judges nothing: that is `losses`.
"""

from typing import Any

from rich.table import Table

from everstep.client.demo.losses import Outcome
from everstep.client.demo.report import duration, verdict
from everstep.client.demo.words import listed

_MIB = 1 << 20
_PARTS = {
    "notice_s": "the others notice the loss",
    "replace_s": "replacement agents start and join",
    "start_s": "new processes, import torch",
    "connect_s": "find the agents",
    "restore_s": "restore: decode, verify, load",
    "first_step_s": "first step",
}


def as_document(outcome: Outcome) -> dict[str, Any]:
    """The outcome as what ``--json`` prints."""
    plan, back, held = outcome.plan, outcome.back, outcome.held
    return {
        "equal": outcome.equal,
        "losses_equal": outcome.losses_equal,
        "first_different_step": outcome.first_difference,
        "weights_equal": outcome.weights_equal,
        "restored_as_promised": outcome.as_promised,
        "weights_sha256": [run.digest for run in outcome.survived],
        "final_losses": [run.losses()[-1][1] for run in outcome.survived],
        "parameters": outcome.parameters,
        "nodes": plan.nodes,
        "lose": plan.lose,
        "parity": plan.parity,
        "steps": plan.steps,
        "seed": plan.seed,
        "snapshot_interval_steps": plan.interval,
        "nvme_interval_steps": plan.nvme_interval,
        "shard_bytes_per_node": held.shard_bytes // plan.nodes,
        "parity_bytes_per_node": held.parity_bytes // plan.nodes,
        "parity_share": held.parity_bytes / held.shard_bytes,
        "parity_share_by_formula": plan.parity_share,
        "full_copies_share": float(plan.parity),
        "round_sent_bytes_per_node": held.round_sent_bytes // plan.nodes,
        "recovery_sent_bytes": held.recovery_sent_bytes,
        "step_median_s": outcome.survived[0].step_s,
        "step_median_left_alone_s": outcome.reference[0].step_s,
        "loss": {
            "nodes": back.lost,
            "replaced_by": back.replaced_by,
            "step": back.step,
            "protected_step": back.protected_step,
            "disk_step": back.disk_step,
            "restored_step": back.restored_step,
            "lost_steps": back.lost_steps,
            "decoded_ranks": back.decoded_ranks,
            "parity_levels": back.parity_levels,
            "levels": back.levels,
            "protected_again_s": back.protected_again_s,
            "recovery_s": back.total_s,
            **back.parts,
        },
        "duration_s": outcome.duration_s,
    }


def as_table(outcome: Outcome) -> Table:
    """The outcome for people."""
    table = Table(title="everstep demo", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for rows in (_job(outcome), _protection(outcome), _way_back(outcome), _verdicts(outcome)):
        for row in rows:
            table.add_row(*row, end_section=row is rows[-1])
    return table


def _job(outcome: Outcome) -> list[tuple[str, str]]:
    plan = outcome.plan
    return [
        ("nodes, each with an agent and a rank", str(plan.nodes)),
        ("model, each rank has one part", f"byte-level GPT, {outcome.parameters / 1e6:.2f} M"),
        ("steps", f"{plan.steps} of {duration(outcome.survived[0].step_s)}"),
        ("a snapshot every", f"{plan.interval} steps; to disk every {plan.nvme_interval}"),
    ]


def _protection(outcome: Outcome) -> list[tuple[str, str]]:
    plan, held = outcome.plan, outcome.held
    each = plan.nodes * _MIB
    share, sent = held.parity_bytes / held.shard_bytes, held.round_sent_bytes / held.shard_bytes
    return [
        ("a node's part of a snapshot", f"{held.shard_bytes / each:.1f} MiB"),
        (
            f"parity beside it, for any {plan.parity} lost",
            f"{held.parity_bytes / each:.1f} MiB, {share:.0%} "
            f"(m / (p - m) is {plan.parity_share:.0%})",
        ),
        (
            "full copies instead",
            f"{plan.parity * held.shard_bytes / each:.1f} MiB, {plan.parity:.0%}",
        ),
        (
            "a node sends for a snapshot's parity",
            f"{held.round_sent_bytes / each:.1f} MiB, {sent:.2g} of its part",
        ),
    ]


def _way_back(outcome: Outcome) -> list[tuple[str, str]]:
    plan, back = outcome.plan, outcome.back
    if plan.decodable:
        where = listed(back.parity_levels)
        source = f"rank {listed(back.decoded_ranks)} decoded from {where}"
    else:
        source = f"from disk: {plan.lose} are more than parity {plan.parity}"
    rows = [
        ("kill -9 and wipe", f"[bold]{listed(back.lost)}[/bold] after step {back.step}"),
        ("in its place", listed(back.replaced_by)),
        ("restored", f"step {back.restored_step}; steps lost: {back.lost_steps}"),
        ("", source),
    ]
    if plan.decodable:
        rows.append(("on disk by then", f"step {back.disk_step}" if back.disk_step else "nothing"))
    rows += [
        ("sent to bring it back", f"{outcome.held.recovery_sent_bytes / _MIB:.1f} MiB"),
        ("from the kill to the first new step", duration(back.total_s)),
    ]
    rows += [(f"    {_PARTS[part]}", duration(took)) for part, took in back.parts.items()]
    return [*rows, ("a new step protected from the next loss", duration(back.protected_again_s))]


def _verdicts(outcome: Outcome) -> list[tuple[str, str]]:
    return [
        ("every loss equals the run left alone", verdict(outcome.losses_equal)),
        ("final weights and optimizer state do", verdict(outcome.weights_equal)),
    ]
