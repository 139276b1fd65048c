"""The whole exception tree, split by what the caller can do about it.

    EverstepError
    ├── Retryable                  try again, same arguments
    │   ├── AgentUnavailable       the agent is dead, stopped or not there yet
    │   ├── DeadlineExceeded       a bounded wait ended; names who is late
    │   ├── PeerUnavailable        another agent did not answer, or stopped in mid-transfer
    │   ├── PeerBusy               another agent has no room for it right now
    │   ├── CoordinatorUnknown     no agent coordinates yet
    │   ├── ArenaLost              a rank has no arena, or not any more: declare again
    │   ├── NotPersisted           a snapshot is in memory, but could not be flushed
    │   └── WriteFailed            a level could not store; what it held before is untouched
    ├── Refused                    change the call, the configuration or the environment
    │   ├── InvalidName            a job or node name that could not be a path component
    │   ├── InvalidConfiguration   an option is unknown, malformed or contradicts another
    │   ├── RankClaimed            another living process holds this rank
    │   ├── StaleIncarnation       this process belongs to an incarnation that has ended
    │   ├── StaleEpoch             an agent spoke for a place that is not its own any more
    │   ├── Fenced                 this agent's place was taken: it writes nothing any more
    │   ├── OutOfSpace             memory or disk does not hold what was asked; nothing was written
    │   ├── NotCapturable          a leaf cannot be expressed without pickle; names path and type
    │   │   └── Misplaced          tensors cannot lie where they are said to; lists all of them
    │   ├── NotCompressible        an optimizer has state that codes cannot hold; the reason
    │   ├── StateMismatch          model and snapshot differ; lists missing, unexpected, reshaped
    │   └── PermissionRefused      the peer's uid may not talk to this agent
    ├── AgentFault                 the agent has a bug; report it
    └── Damaged                    these bytes cannot be used; take another copy
        ├── ShardCorrupt           a unit's digest does not match
        ├── FormatInvalid          not one of our files, truncated, or a version from the future
        ├── TooFewSymbols          more of a parity group is lost than its parities replace
        └── NothingRecoverable     no copy of any wanted step is whole

Each error says what happened, what it means for the user's data, and what to do. Facts are
attributes. This module imports nothing, so that it can be imported from anywhere.
"""


class EverstepError(Exception):
    """Anything Everstep raises on purpose.

    Attributes:
        arguments: What the constructor was given, so that the wire can carry the error whole.
        named: What it was given by name; likewise.
    """

    arguments: tuple[object, ...]
    named: dict[str, object]

    def __new__(cls, *arguments: object, **named: object) -> "EverstepError":
        """Keep the arguments before a subclass turns them into a message."""
        self = super().__new__(cls, *arguments)
        self.arguments, self.named = arguments, named
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """So that a trainer's own collectives can tell its other ranks."""
        return _remade, (type(self), self.arguments, self.named)


def _remade(
    kind: type[EverstepError], arguments: tuple[object, ...], named: dict[str, object]
) -> EverstepError:
    return kind(*arguments, **named)


class Retryable(EverstepError):
    """The same call may succeed later."""


class AgentUnavailable(Retryable):
    """The agent could not be reached.

    Attributes:
        address: Where it was looked for.
    """

    def __init__(self, address: str, detail: str) -> None:
        self.address, self.detail = address, detail
        super().__init__(
            f"no agent answers at {address}: {detail}. Training is not affected and committed "
            f"snapshots are safe; look at it with `everstep status --agent {address}`."
        )


class DeadlineExceeded(Retryable):
    """A bounded wait ended before what it waited for.

    Attributes:
        waited_for: What.
        timeout_s: How long.
        late: Who had not answered, e.g. ranks.
    """

    def __init__(self, waited_for: str, timeout_s: float, late: tuple[str, ...] = ()) -> None:
        self.waited_for, self.timeout_s, self.late = waited_for, timeout_s, late
        who = f"; still missing: {', '.join(late)}" if late else ""
        super().__init__(f"{waited_for} did not happen within {timeout_s:g} s{who}.")


class PeerUnavailable(Retryable):
    """Another agent did not answer, or stopped in the middle of a transfer.

    Attributes:
        peer: Its node id or address.
        detail: What happened.
    """

    def __init__(self, peer: str, detail: str) -> None:
        self.peer, self.detail = peer, detail
        super().__init__(
            f"the agent of {peer} did not deliver: {detail}. Nothing was changed here; what it "
            "holds counts as lost until it answers again. See `everstep status`."
        )


class PeerBusy(Retryable):
    """Another agent does as much at one time as it may.

    Attributes:
        peer: Its node id.
        detail: What there is too much of.
    """

    def __init__(self, peer: str, detail: str) -> None:
        self.peer, self.detail = peer, detail
        super().__init__(
            f"the agent of {peer} has no room for more right now: {detail}. It is asked again."
        )


class CoordinatorUnknown(Retryable):
    """No agent coordinates yet: a new one is still asking the others what they hold.

    Attributes:
        waiting_for: The nodes that have not answered it.
    """

    def __init__(self, waiting_for: tuple[str, ...]) -> None:
        self.waiting_for = waiting_for
        super().__init__(
            "the agents have not agreed on a coordinator yet; still silent: "
            f"{', '.join(waiting_for) or 'all'}. Snapshots are safe where they are."
        )


class ArenaLost(Retryable):
    """A rank's arena is not there: not yet, or somebody emptied the directory.

    Attributes:
        job: The job.
        rank: The rank.
    """

    def __init__(self, job: str, rank: int) -> None:
        self.job, self.rank = job, rank
        super().__init__(
            f"the arena of rank {rank} of job {job!r} is gone: its directory was emptied. What "
            "was only in memory is lost, snapshots on NVMe are untouched. The next snapshot "
            "reserves it anew; keep clean-up jobs away from the agent's memory_dir."
        )


class NotPersisted(Retryable):
    """A snapshot is committed in memory, but could not be flushed to NVMe.

    Attributes:
        step: Its step.
        reason: What the agent said.
    """

    def __init__(self, step: int, reason: str) -> None:
        self.step, self.reason = step, reason
        super().__init__(
            f"step {step} is committed in memory but not on NVMe: {reason} The next flush tries "
            "again."
        )


class WriteFailed(Retryable):
    """A level could not store a snapshot; what it held before is untouched.

    Attributes:
        where: The file.
        cause: The operating system's error.
    """

    def __init__(self, where: str, cause: OSError) -> None:
        self.where, self.cause = where, cause
        super().__init__(
            f"writing {where} failed: {cause}. The file was discarded, since after a failed write "
            "or fsync its bytes cannot be trusted; older snapshots are untouched, and the next "
            "flush starts a new file. Check the device if this repeats."
        )


class Refused(EverstepError):
    """The request itself must change."""


class InvalidName(Refused):
    """A name that is not safe as a path component.

    Attributes:
        kind: What it was to name.
        name: As given.
    """

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name
        super().__init__(
            f"{name!r} is no valid {kind} name: use 1 to 128 of letters, digits, '.', '_' and "
            "'-', not starting with a dot. Nothing was written."
        )


class InvalidConfiguration(Refused):
    """An option is unknown, malformed, or contradicts another.

    Attributes:
        option: Its name as written.
        source: The file or flag it came from.
    """

    def __init__(self, option: str, problem: str, source: str = "") -> None:
        self.option, self.source = option, source
        where = f" in {source}" if source else ""
        super().__init__(f"{option}{where}: {problem}.")


class RankClaimed(Refused):
    """Another living process holds this rank of this job.

    Attributes:
        job: The job.
        rank: The rank.
        pid: The process that holds it.
    """

    def __init__(self, job: str, rank: int, pid: int) -> None:
        self.job, self.rank, self.pid = job, rank, pid
        super().__init__(
            f"rank {rank} of job {job!r} is held by process {pid}, which is alive. Its state is "
            "untouched. Use another job name, or end that process first if it is a leftover."
        )


class StaleIncarnation(Refused):
    """The calling process belongs to an incarnation of the job that has ended.

    Attributes:
        job: The job.
        mine: The caller's incarnation.
        current: The one that replaced it.
    """

    def __init__(self, job: str, mine: int, current: int) -> None:
        self.job, self.mine, self.current = job, mine, current
        what = f"was restarted: incarnation {current} has replaced {mine}"
        if mine == current:
            what = f"goes on as incarnation {current}, but another process has taken this rank over"
        super().__init__(f"job {job!r} {what}. Nothing of this process is stored any more; end it.")


class StaleEpoch(Refused):
    """An agent spoke for a place in the membership that is not its own any more.

    Attributes:
        node_id: The place.
        epoch: The epoch that the agent knows.
        current: The epoch it would need.
    """

    def __init__(self, node_id: str, epoch: int, current: int) -> None:
        self.node_id, self.epoch, self.current = node_id, epoch, current
        super().__init__(
            f"{node_id} speaks at epoch {epoch}, the membership is at epoch {current} and its "
            "place is held by another agent. Nothing of it was taken. If this host shall take "
            "part again, restart its agent; if it was replaced, stop it."
        )


class Fenced(Refused):
    """This agent's place in the membership was taken: it writes nothing any more.

    Attributes:
        node_id: This node.
        by: Who holds its place now.
    """

    def __init__(self, node_id: str, by: str) -> None:
        self.node_id, self.by = node_id, by
        super().__init__(
            f"the place of {node_id} in the cluster is held by {by} now, so this agent takes no "
            "snapshots. What it held is kept and not used. Stop it, or restart it to join anew."
        )


class OutOfSpace(Refused):
    """Memory or disk does not hold what was asked for.

    Attributes:
        where: The directory.
        needed_bytes: What was asked for.
        available_bytes: What there is, if known.
    """

    def __init__(
        self, where: str, needed_bytes: int, available_bytes: int | None, advice: str = ""
    ) -> None:
        self.where, self.needed_bytes, self.available_bytes = where, needed_bytes, available_bytes
        has = "" if available_bytes is None else f" and has {available_bytes / 1e6:,.1f} MB"
        super().__init__(
            f"{where} needs {needed_bytes / 1e6:,.1f} MB more{has}. Snapshots already committed "
            f"are untouched. {advice or 'Free space there, or name a larger directory.'}"
        )


class NotCapturable(Refused):
    """A leaf cannot be expressed without pickle.

    Attributes:
        path: Where in the state.
        type_name: What was found there.
        detail: What about it; may be empty.
    """

    def __init__(self, path: str, type_name: str, detail: str = "") -> None:
        self.path, self.type_name, self.detail = path, type_name, detail
        more = f" ({detail})" if detail else ""
        super().__init__(
            f"the state at {path!r} is of type {type_name}{more}, which is not stored, because "
            "Everstep never pickles. Turn it into tensors, numbers, strings, lists and dicts in "
            "its state_dict()."
        )


def _listed(names: tuple[str, ...]) -> str:
    more = f"\n    and {len(names) - 20} more" if len(names) > 20 else ""
    return "".join(f"\n    {name}" for name in names[:20]) + more


class Misplaced(NotCapturable):
    """Tensors are said to lie where they cannot, or two are called the same.

    Attributes:
        problems: All that were found, each as "name: what".
    """

    def __init__(self, *problems: str) -> None:
        self.problems, self.type_name = problems, "tensor"
        self.path, _, self.detail = problems[0].partition(": ")
        summary = "what is attached is not what placements say. Nothing was captured or loaded."
        EverstepError.__init__(self, summary + _listed(problems))


class NotCompressible(Refused):
    """The optimizer has state, or works in a way, that codes between steps cannot hold.

    Attributes:
        optimizer: Its class.
        problem: What it is.
    """

    def __init__(self, optimizer: str, problem: str) -> None:
        self.optimizer, self.problem = optimizer, problem
        super().__init__(
            f"{optimizer} cannot be compressed: {problem}. Nothing was changed; use it as it is."
        )


class StateMismatch(Refused):
    """What is attached and what was saved differ.

    Attributes:
        missing: Leaves that are attached but not in the snapshot.
        unexpected: Leaves of the snapshot that nothing attached takes.
        reshaped: Leaves whose dtype or shape differ, each as "name: saved -> attached".
        divergent: State that differs from rank to rank, where there are other ranks now.
        contradictory: What the ranks' shards say against each other.
    """

    def __init__(
        self,
        summary: str,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        reshaped: tuple[str, ...] = (),
        divergent: tuple[str, ...] = (),
        contradictory: tuple[str, ...] = (),
    ) -> None:
        self.missing, self.unexpected, self.reshaped = missing, unexpected, reshaped
        self.divergent, self.contradictory = divergent, contradictory
        lines = [summary]
        for title, names in (
            ("missing from the snapshot", missing),
            ("in the snapshot but not attached", unexpected),
            ("of another dtype or shape (saved -> attached)", reshaped),
            ("with a state of its own on each rank (see restore's on_resize)", divergent),
            ("said differently by different ranks of the snapshot", contradictory),
        ):
            if names:
                lines.append(f"  {title}, {len(names)}:{_listed(names)}")
        super().__init__("\n".join(lines))


class PermissionRefused(Refused):
    """The peer's uid may not talk to this agent.

    Attributes:
        uid: The peer's user id.
    """

    def __init__(self, uid: int) -> None:
        self.uid = uid
        super().__init__(f"user id {uid} may not talk to this agent; see `allowed_uids`.")


class AgentFault(EverstepError):
    """The agent failed in a way that is not foreseen: a bug of ours.

    Attributes:
        address: The agent.
        detail: What it said.
    """

    def __init__(self, address: str, detail: str) -> None:
        self.address, self.detail = address, detail
        super().__init__(
            f"the agent at {address} failed unexpectedly: {detail}. Committed snapshots are as "
            "they were. This is a bug: please report it with the agent's log."
        )


class Damaged(EverstepError):
    """These bytes cannot be used."""


class ShardCorrupt(Damaged):
    """A unit's digest does not match.

    Attributes:
        where: File or arena, with the shard's id.
        units: Indices of the units that differ.
    """

    def __init__(self, where: str, units: tuple[int, ...]) -> None:
        self.where, self.units = where, units
        shown = ", ".join(map(str, units[:8])) + (", ..." if len(units) > 8 else "")
        super().__init__(
            f"{where}: {len(units)} unit(s) of 1 MiB do not match their digest ({shown}). "
            "This copy is not used."
        )


class FormatInvalid(Damaged):
    """Not one of our files, truncated, or written by a newer version.

    Attributes:
        where: The file or message.
    """

    def __init__(self, where: str, problem: str) -> None:
        self.where, self.problem = where, problem
        super().__init__(f"{where}: {problem}. This copy is not used.")


class TooFewSymbols(Damaged):
    """More of a parity group is lost than its parities replace.

    Attributes:
        needed: How many symbols of a row it takes to compute the others.
        had: How many there are.
    """

    def __init__(self, needed: int, had: int) -> None:
        self.needed, self.had = needed, had
        super().__init__(
            f"rebuilding what is lost takes {needed} members of the parity group and {had} are "
            "left. Nothing was rebuilt and nothing changed; an agent that comes back with its "
            "memory makes up for it, else take another copy: NVMe, or an older step."
        )


class NothingRecoverable(Damaged):
    """No copy of any wanted step is whole.

    Attributes:
        job: The job.
        rejected: Each copy that was looked at, and why it was not taken.
    """

    def __init__(self, job: str, rejected: tuple[str, ...]) -> None:
        self.job, self.rejected = job, rejected
        detail = "".join(f"\n    {line}" for line in rejected)
        super().__init__(
            f"job {job!r} has snapshots, but none can be restored whole:{detail}\n"
            "Nothing was loaded. `everstep verify` lists the damage; `restore()` never falls back "
            "to part of a state. To start from nothing on purpose, use another job name, or free "
            f"this one with `everstep gc --job {job} --all`."
        )
