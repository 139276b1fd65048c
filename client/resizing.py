"""State that every rank has for itself, where the ranks are not those that saved it.

Owns the rules of `restore(on_resize=...)`: which ranks' copies of a tensor or a value a rank takes.
Promises that nothing which differs between ranks is merged, copied or left out unless a rule says
so, and that what was done is told. The rules, for rank r of `world` ranks now:

    refuse  the default: an error that names the state
    keep    r takes its own; a rank that is new takes that of rank r modulo the ranks then
    rank0   all take that of the lowest rank that has it
    sum     r takes the sum of the ranks that are r modulo `world`, or zeros if there are none: the
            sum over all ranks stays (error feedback of compressed gradients)
    drop    tensors begin as zeros; objects with a state of their own are left as they are
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from everstep.client.attachment import Attachment, decode_torch_value
from everstep.client.saved import Saved, differing
from everstep.client.terms import Terms
from everstep.proto.errors import FormatInvalid, StateMismatch
from everstep.snapshot import values

Reshard = Callable[[list[Any], int, int], Any]
"""`reshard_state_dict(states, rank, world)` of an attached object: from the states that all ranks
had to the one that this rank is to load."""


@dataclass(slots=True)
class Resizing:
    """Decides for one rank.

    Attributes:
        divergent: What no rule was given for.
        notes: What the rules have done, in words.
    """

    saved: Saved
    terms: Terms
    rank: int
    world: int
    divergent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def ranks_of(self, name: str) -> tuple[int | None, ...]:
        """Whose copies of a tensor this rank adds up; None stands for whoever has its bytes.

        Nothing: it begins as zeros.
        """
        tensor = self.saved.tensor(name)
        if not tensor.is_divergent or (not self.saved.resized and self.rank in tensor.leaves):
            return (None,)
        holders = sorted(tensor.leaves)
        rule = self.terms.rule(name)
        if rule == "refuse":
            self.divergent.append(name)
            return (None,)
        self.notes.append(f"{name}: {rule}")
        chosen: tuple[int, ...] = ()
        if rule == "keep":
            chosen = (self.rank if self.rank in holders else holders[self.rank % len(holders)],)
        elif rule == "rank0":
            chosen = (holders[0],)
        elif rule == "sum":
            chosen = tuple(rank for rank in holders if rank % self.world == self.rank)
        form = self.saved.forms[name]
        for rank in chosen:
            other = tensor.of(rank)
            if (other.dtype, other.shape) != (form.dtype, form.shape):
                what = (
                    f"{other.dtype}{list(other.shape)} on rank {rank}, {form} on {self.saved.rank}"
                )
                self.divergent.append(f"{name}: {what}")
                return (None,)
        return chosen

    def values_of(self, attached: Attachment) -> dict[str, str] | None:
        """The values of a part that this rank loads; None if it leaves the object as it is."""
        part = attached.part.name
        if not self.saved.resized:
            return self.saved.values
        by_rank = self.saved.values_of(part)
        paths = list(differing({r: _without_members(v, attached) for r, v in by_rank.items()}))
        if not paths:
            return self.saved.values
        rule = self.terms.rule(part)
        if rule not in ("keep", "rank0", "drop"):
            self.divergent += paths
            return self.saved.values
        self.notes.append(f"{part}: {rule}")
        if rule == "drop":
            return None
        holders = sorted(rank for rank, held in by_rank.items() if held)
        own = self.rank if self.rank in holders else holders[self.rank % len(holders)]
        return dict(by_rank[holders[0] if rule == "rank0" else own])

    def resharded(self, attached: Attachment) -> Any:
        """The state that an object makes of what all ranks had; None if it does not say how.

        Raises:
            StateMismatch: If its state has large tensors, which are not gathered for this.
        """
        reshard: Reshard | None = getattr(attached.target, "reshard_state_dict", None)
        if not self.saved.resized or reshard is None:
            return None
        part = attached.part.name
        large = self.saved.forms_of(part)
        if large:
            raise StateMismatch(
                f"{part} has reshard_state_dict(), which takes small states only, and has large "
                "tensors. Nothing was loaded.",
                divergent=tuple(large),
            )
        by_rank = self.saved.values_of(part)
        states = [self.saved.tree(part, {}, by_rank[rank]) for rank in sorted(by_rank)]
        self.notes.append(f"{part}: by its own reshard_state_dict() of {len(states)} states")
        return reshard(states, self.rank, self.world)


def members_of(held: Mapping[str, str], part: str) -> tuple[str, ...]:
    """For each group of an optimizer, which parameters one rank had in it: as a digest."""
    return tuple(group.get("params", "") for group in _groups(held, part))


def _groups(held: Mapping[str, str], part: str) -> list[dict[str, Any]]:
    json = held.get(f"{part}/param_groups")
    groups = values.decode(json, hook=decode_torch_value) if json is not None else []
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise FormatInvalid(f"{part}/param_groups", "it is not a list of groups")
    return groups


def _without_members(held: Mapping[str, str], attached: Attachment) -> dict[str, str]:
    """Values that should be the same on all ranks: stages have other parameters in their groups."""
    part = attached.part.name
    if attached.kind != "optimizer" or f"{part}/param_groups" not in held:
        return dict(held)
    options = [
        {key: value for key, value in group.items() if key != "params"}
        for group in _groups(held, part)
    ]
    return {**held, f"{part}/param_groups": repr(options)}


def derived_seed(record_of: Mapping[str, object], rank: int) -> int:
    """The seed of the generators of a rank that is new: of the snapshot and the rank alone."""
    text = "\n".join([*(f"{key}={value}" for key, value in record_of.items()), f"rank={rank}"])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
