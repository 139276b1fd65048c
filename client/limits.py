"""What the client is given: how long it waits for what, and what it counts.

Owns two records. Every wait of the client is bounded by one of these limits.
"""

from dataclasses import dataclass, field

from everstep.snapshot.device_part import CaptureStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long the client waits for what, in seconds."""

    agent_start_s: float = 20.0
    """For an embedded agent to answer."""
    offer_s: float = 0.25
    """For a slot, on the training thread; then the snapshot is skipped."""
    pause_s: float = 5.0
    """After an agent did not answer in time: no snapshot is tried meanwhile."""
    setup_s: float = 60.0
    """For the arena and the comparison of replicas; only when the state's form is new."""
    seal_s: float = 30.0
    """For the agent to take note of a complete shard, on the capture's thread."""
    restore_s: float = 660.0
    """For the agent to find and check what can be restored."""
    close_s: float = 60.0
    """For the last snapshot to reach the strongest level."""


@dataclass(slots=True)
class Stats:
    """What the snapshots of this process have cost and come to.

    Attributes:
        taken: Captures begun.
        committed: Of these, how many all ranks had sealed.
        dropped: Of these, how many will never commit.
        stall_s: Time that the training thread spent in `snapshot` and at the fence.
        last_stall_s: The same for the last snapshot alone.
        setup_s: The part of it that arranged new layouts and arenas.
        skipped: How often nothing was captured, by reason; "not due" is not counted.
        window_bytes: Copied off GPUs from the live leaves, before the updates.
        scratch_bytes: Cloned on GPUs at the updates.
        direct_bytes: Made updates wait on GPUs, for want of memory for clones.
        clone_bytes: Cloned on GPUs at the snapshots, as anybody may change them.
        skipped_units: Left out by `incremental`: the slot held them already.
        update_wait_s: For how long GPUs waited with updates for copies, all together.
    """

    taken: int = 0
    committed: int = 0
    dropped: int = 0
    stall_s: float = 0.0
    last_stall_s: float = 0.0
    setup_s: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    window_bytes: int = 0
    scratch_bytes: int = 0
    direct_bytes: int = 0
    clone_bytes: int = 0
    skipped_units: int = 0
    update_wait_s: float = 0.0

    def count(self, capture: CaptureStats) -> None:
        """Add what one capture did on GPUs."""
        self.window_bytes += capture.window_bytes
        self.scratch_bytes += capture.scratch_bytes
        self.direct_bytes += capture.direct_bytes
        self.clone_bytes += capture.clone_bytes
        self.skipped_units += capture.skipped_units
        self.update_wait_s += capture.update_wait_s
