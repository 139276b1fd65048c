"""Which shard is each rank's: of every attempt at one snapshot that the nodes' copies tell of.

Owns the question of truth. Two runs may have taken the same incarnation and step (an agent's memory
was lost and a number taken again, a disk came back from elsewhere), and parts of both never make up
one snapshot. What was committed as one bears one commit id, and so each commit id is an attempt of
its own. A copy without one belongs to an attempt only if its record is the very one that the
attempt has of this rank, or if a parity plan that agrees with the attempt names it, or if with it
the records of all ranks add up to the commit id. A plan agrees with an attempt if it names one of
its records, contradicts none of them and names nothing of another attempt.

Copies that belong to no attempt make up one among themselves as long as nothing contradicts any of
them. Else no majority decides: only one whole set that is known to have been committed as one may
be used: that of a parity plan over all ranks, or that of all ranks on one node's NVMe. Plans of
several groups, or the disks of several nodes, could be of either. Whether copies are sound, or
enough, is for others to say: `agent.stock`.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import reduce
from operator import xor

import xxhash

from everstep.agent.inventory import DIGEST_BYTES, NVME, HeldShard, HeldSnapshot
from everstep.agent.plans import ParityPlan, PlannedShard

Identity = tuple[bytes, int, str]
"""Digest of the record, bytes of the image, layout: all that tells one shard from another."""
Named = tuple[int, Identity]
"""A rank's shard."""
Ones = Sequence[tuple[str, HeldSnapshot]]
"""What nodes hold of the snapshot, each with its name."""


def identity_of(shard: HeldShard | PlannedShard) -> Identity:
    """What tells a shard from another of the same rank."""
    return shard.record_digest, shard.image_bytes, shard.layout_id


def fingerprint(rank: int, record_digest: bytes) -> int:
    """What a rank's record adds to the commit id."""
    return int.from_bytes(xxhash.xxh3_128_digest(rank.to_bytes(4, "big") + record_digest), "big")


def commit_id_of(record_digests: Mapping[int, bytes]) -> bytes:
    """The commit id of a snapshot with these records, of all its ranks."""
    prints = (fingerprint(rank, digest) for rank, digest in record_digests.items())
    return reduce(xor, prints, 0).to_bytes(DIGEST_BYTES, "big")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One snapshot of perhaps several that go by one name."""

    commit_id: bytes
    """Empty if its copies bear none."""
    world: int
    shards: dict[int, Identity]
    """Which is each rank's, as far as is known."""
    problem: str = ""
    """Why nothing of it may be used; empty if it may."""

    def has(self, shard: HeldShard) -> bool:
        """Whether a copy belongs to it."""
        mine = shard.commit_id in (b"", self.commit_id)
        return mine and self.shards.get(shard.rank) == identity_of(shard)

    def agrees(self, plan: ParityPlan) -> bool:
        """Whether a plan is of its shards and of no others."""
        return plan.world == self.world and _planned(plan).items() <= self.shards.items()


def attempts(ones: Ones) -> list[Attempt]:
    """The attempts at a snapshot, at least one; the first has a problem if nothing may be used."""
    plans = {parity.plan for _, one in ones for parity in one.parities}
    bearers: dict[Named, set[bytes]] = defaultdict(set)
    for _, one in ones:
        for shard in one.shards:
            if shard.commit_id:
                bearers[shard.rank, identity_of(shard)].add(shard.commit_id)
    commit_ids = sorted({commit_id for ids in bearers.values() for commit_id in ids})
    found = [_committed(commit_id, ones, plans, bearers) for commit_id in commit_ids]
    rest = _unnamed(ones, plans, found)
    if rest is not None and (not found or not rest.problem):
        found.append(rest)
    return found


def _committed(
    commit_id: bytes,
    ones: Ones,
    plans: Collection[ParityPlan],
    bearers: Mapping[Named, Set[bytes]],
) -> Attempt:
    """What bears a commit id, and what belongs to it."""
    own = [one for _, one in ones if any(s.commit_id == commit_id for s in one.shards)]
    worlds = sorted({one.world for one in own})
    if len(worlds) != 1:
        return Attempt(commit_id, worlds[-1], {}, _of_worlds(worlds))
    claims: dict[int, set[Identity]] = defaultdict(set)
    for (rank, identity), ids in bearers.items():
        if commit_id in ids:
            claims[rank].add(identity)
    possible = []
    for plan in plans:
        named = _planned(plan)
        of_others = any(bearers.get(one) and commit_id not in bearers[one] for one in named.items())
        contradicts = any(
            identity not in claims.get(r, {identity}) for r, identity in named.items()
        )
        if plan.world == worlds[0] and not of_others and not contradicts:
            possible.append(named)
    _join(claims, possible)
    shards = {rank: next(iter(of)) for rank, of in claims.items() if len(of) == 1}
    if len(claims) == len(shards) < worlds[0]:
        shards = _added_up(commit_id, worlds[0], shards, ones, possible)
    return Attempt(commit_id, worlds[0], shards)


def _join(claims: dict[int, set[Identity]], plans: Sequence[Mapping[int, Identity]]) -> None:
    """Claim what plans name that share a shard with what is claimed, directly or by others."""
    apart, joined = list(plans), True
    while joined:
        near: list[Mapping[int, Identity]] = []
        far: list[Mapping[int, Identity]] = []
        for plan in apart:
            shares = any(identity in claims.get(rank, ()) for rank, identity in plan.items())
            (near if shares else far).append(plan)
        for rank, identity in (item for plan in near for item in plan.items()):
            claims[rank].add(identity)
        apart, joined = far, bool(near)


def _added_up(
    commit_id: bytes,
    world: int,
    shards: dict[int, Identity],
    ones: Ones,
    plans: Sequence[Mapping[int, Identity]],
) -> dict[int, Identity]:
    """With what bears no commit id of the other ranks, if all records then add up to this one."""
    others: dict[int, set[Identity]] = defaultdict(set)
    for _, one in ones:
        for shard in one.shards if one.world == world else ():
            if not shard.commit_id:
                others[shard.rank].add(identity_of(shard))
    for plan in plans:
        for rank, identity in plan.items():
            others[rank].add(identity)
    lone = {rank: next(iter(of)) for rank, of in others.items() if len(of) == 1}
    whole = lone | shards
    adds_up = commit_id_of({rank: digest for rank, (digest, _, _) in whole.items()}) == commit_id
    return whole if len(whole) == world and adds_up else shards


def _unnamed(
    ones: Ones, plans: Collection[ParityPlan], committed: Sequence[Attempt]
) -> Attempt | None:
    """What bears no commit id and belongs to none; None if there is nothing of the kind."""
    taken = {named for attempt in committed for named in attempt.shards.items()}
    claims: dict[int, set[Identity]] = defaultdict(set)
    for _, one in ones:
        for shard in one.shards:
            if not shard.commit_id and (shard.rank, identity_of(shard)) not in taken:
                claims[shard.rank].add(identity_of(shard))
    free = [p for p in plans if not any(attempt.agrees(p) for attempt in committed)]
    for plan in free:
        for rank, identity in _planned(plan).items():
            claims[rank].add(identity)
    if committed and not claims:
        return None
    worlds = sorted({one.world for _, one in ones if one.world})
    if len(worlds) != 1:
        problem = _of_worlds(worlds) if worlds else "nobody says how many ranks it has"
        return Attempt(b"", max(one.world for _, one in ones), {}, problem)
    disputed = sorted(rank for rank, of in claims.items() if len(of) > 1)
    if not disputed and not committed:
        return Attempt(b"", worlds[0], {rank: next(iter(of)) for rank, of in claims.items()})
    sets = [_planned(plan) for plan in free] + [_durable(one) for _, one in ones]
    whole = [one for one in sets if len(one) == worlds[0] and not one.items() <= taken]
    if whole and all(one == whole[0] for one in whole):
        return Attempt(b"", worlds[0], whole[0])
    words = _dispute(disputed[0], ones, len(whole)) if disputed else "nothing vouches for it"
    return Attempt(b"", worlds[0], {}, words)


def _planned(plan: ParityPlan) -> dict[int, Identity]:
    return {shard.rank: identity_of(shard) for member in plan.members for shard in member.shards}


def _durable(one: HeldSnapshot) -> dict[int, Identity]:
    """What one node's commit on NVMe names, if it bears no commit id."""
    return {s.rank: identity_of(s) for s in one.shards if s.level == NVME and not s.commit_id}


def _of_worlds(worlds: Sequence[int]) -> str:
    return f"its copies are of worlds of {' and '.join(map(str, worlds))} ranks"


def _dispute(rank: int, ones: Ones, whole_sets: int) -> str:
    holders: dict[Identity, list[str]] = defaultdict(list)
    for node_id, one in ones:
        for shard in one.shards:
            if shard.rank == rank:
                holders[identity_of(shard)].append(f"{node_id}/{shard.level}")
    sides = " against ".join(", ".join(sorted(nodes)) for nodes in holders.values())
    why = (
        "the whole sets that parity plans and NVMe vouch for differ, too"
        if whole_sets
        else "no parity plan and no node's NVMe vouches for one whole set of them"
    )
    where = sides if len(holders) > 1 else f"{sides or 'no copy'} against a parity plan"
    return f"two snapshots go by this name: the copies of rank {rank} differ ({where}), and {why}"
