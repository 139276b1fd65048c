"""What trainer and agent have arranged: the layout of this rank's shard, and the arena for it.

Owns the mapping of the arena, the lock that keeps a second writer out, and the negotiation when
the state's form changes: which replicated leaves are really equal on all ranks, and which range
of each this rank keeps. Promises that a plan is used only while every source is where it was
when the plan was made, and that leaves seen to differ between ranks are never shared again.
"""

import ctypes
import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
import xxhash

from everstep.client.attachment import Collected
from everstep.client.channel import Channel
from everstep.kernels.cuda_runtime import CudaRuntime
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import Misplaced, RankClaimed
from everstep.snapshot.capture_plan import CapturePlan, dtype_name, identity, value_bytes
from everstep.snapshot.device import DeviceOptions
from everstep.snapshot.device_cuda import CudaDevices
from everstep.snapshot.layout import Layout, LeafSpec, Part, encode, pack
from everstep.snapshot.pinning import PinnedArena
from everstep.snapshot.replicas import share
from everstep.snapshot.samples import Group, group_id_of
from everstep.snapshot.samples import encode as encode_samples
from everstep.snapshot.slot_digests import SlotDigests

log = logging.getLogger("everstep")


class ArenaMapping:
    """This process's writable view of its rank's arena, locked against a second writer.

    Attributes:
        contents: What the slots hold, as far as captures through this mapping know.
    """

    def __init__(self, reply: wire.DeclareReply, job: str, rank: int) -> None:
        self.generation = reply.generation
        self.slot_bytes = reply.slot_bytes
        self.contents = SlotDigests()
        self._pinned: PinnedArena | None = None
        descriptor = os.open(reply.arena_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._descriptor = descriptor
        self._status = os.fstat(descriptor)
        try:
            # A record lock: not inherited by forked children, gone with the process. A stopped
            # trainer of an earlier launch would otherwise go on writing when it is continued.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = reply.slot_bytes * reply.slot_count
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._memory = mmap.mmap(descriptor, size, flags=flags)
            self._slot_count = reply.slot_count
        except OSError as error:
            holder = _lock_holder(descriptor)
            os.close(descriptor)
            if isinstance(error, BlockingIOError | PermissionError):
                raise RankClaimed(job, rank, holder) from error
            raise

    def is_at(self, path: str) -> bool:
        """Whether this is the file of that name: it may have been removed, and made anew."""
        try:
            return os.path.samestat(self._status, os.stat(path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def is_linked(self) -> bool:
        """Whether the file still has its name: what is written to it is lost otherwise."""
        return os.fstat(self._descriptor).st_nlink > 0

    def slot(self, index: int, image_bytes: int) -> memoryview:
        """The writable memory of a slot."""
        begin = index * self.slot_bytes
        return memoryview(self._memory)[begin : begin + image_bytes]

    def pin(self, runtime: CudaRuntime | None, device: int) -> PinnedArena:
        """Have the slots pinned in the background; the same arena however often it is asked for."""
        if self._pinned is None:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
            self._pinned = PinnedArena(
                address,
                self.slot_bytes,
                self._slot_count,
                runtime,
                on_problem=_warn_unpinned,
                device=device,
            )
        return self._pinned

    def pinned(self, path: str, offset: int, size: int) -> int | None:
        """Where a piece of a file lies in a slot that is pinned here; None if it does not."""
        slot, begin = divmod(offset, self.slot_bytes)
        inside = slot < self._slot_count and begin + size <= self.slot_bytes
        if self._pinned is None or not inside or not self._pinned.is_pinned(slot):
            return None
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + offset
        whole = len(self._pinned.split(address, size)) == 1
        # Asked last, being a system call: once for every 64 MiB that are pinned, not more.
        return address if whole and self.is_at(path) else None

    def close(self) -> None:
        """Unpin, unmap and unlock; captures have ended, and views of slots are released."""
        if self._pinned is None or self._pinned.close():
            self._memory.close()
        # Else the driver is still at it: the mapping stays until the process ends.
        os.close(self._descriptor)


@dataclass(slots=True)
class Arrangement:
    """A layout with the plan that fills it, ready for use."""

    plan: CapturePlan
    arena: ArenaMapping
    identity: tuple[object, ...]
    form: object
    """Of the state it was last found to fit: see `Collected`. None: look at everything."""
    groups: tuple["ReplicaGroup", ...] = ()
    """Those that this rank is in."""

    @property
    def layout(self) -> Layout:
        """Of this rank's shard."""
        return self.plan.layout

    def replica_samples(self, samples: bytes) -> bytes:
        """The record's form of what a capture has sampled of the replicated leaves."""
        at = {name: 8 * index for index, name in enumerate(self.plan.replicated)}
        return encode_samples(
            [
                Group(g.group_id, g.digest, b"".join(samples[at[n] : at[n] + 8] for n in g.names))
                for g in self.groups
            ]
        )


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """The leaves that a group of ranks holds alike.

    Attributes:
        ranks: Ascending; none: all of the world.
        names: Of the leaves, in the layout's order.
        digest: Equal on ranks that agree on the leaves and their order.
    """

    ranks: tuple[int, ...]
    names: tuple[str, ...]
    digest: bytes

    @property
    def group_id(self) -> int:
        """See `snapshot/samples.py`."""
        return group_id_of(self.ranks)


class Arranger:
    """Keeps the arrangement of one rank up to date.

    Attributes:
        captures_in_flight: How many captures use it at once; set before the first `arrange`.
        before_change: Called before the arena may be exchanged: when it returns, no capture may be
            under way that writes to it.
    """

    def __init__(
        self,
        channel: Channel,
        timeout_s: float,
        probe_s: float,
        *,
        options: DeviceOptions | None = None,
    ) -> None:
        self.captures_in_flight = 1
        self.before_change: Callable[[], object] = lambda: None
        self._options = options or DeviceOptions()
        # Kept over all plans: streams, and what was measured of the device.
        self._devices = CudaDevices()
        self._channel = channel
        self._timeout_s = timeout_s
        self._probe_s = probe_s
        self._current: Arrangement | None = None
        self._divergent: set[str] = set()
        self._unguarded: set[str] = set()
        self._agreed: dict[tuple[object, ...], tuple[str, ...]] = {}
        self._joining = False
        self._had: frozenset[str] | None = None
        self._begun_anew = False

    def join(self, replicated: Collection[str] | None) -> None:
        """The other ranks go on with what they have agreed on, and will not be asked again.

        Args:
            replicated: What they had in the snapshot that was restored, if one was; it counts
                where the agent does not know what they have now.
        """
        if self._current is not None:
            # The agent may have put what was restored into slots.
            self._current.arena.contents.clear()
        self._joining = True
        self._had = None if replicated is None else frozenset(replicated)

    def forget(self) -> None:
        """The agent may have changed: arrange anew before the next snapshot."""
        if self._current is not None:
            self._current.arena.close()
        self._current = None
        self._agreed.clear()
        # The other ranks need not have forgotten anything.
        self.join(None)

    def begin_anew(self) -> None:
        """Another incarnation in the same process: arrange anew, in the arena that is mapped and
        pinned already, unless the agent has another one by then."""
        self._begun_anew = True
        self._stale()
        self._agreed.clear()
        self.join(None)

    @property
    def arena(self) -> ArenaMapping | None:
        """What is mapped now."""
        return self._current.arena if self._current is not None else None

    @property
    def is_arranged(self) -> bool:
        """Whether the next arrangement is likely to be the present one."""
        return self._current is not None and self._current.form is not None

    def pinned(self, path: str, offset: int, size: int) -> int | None:
        """Where a piece of a file lies in pinned memory of this process; see `Restoration`."""
        current = self._current
        return current.arena.pinned(path, offset, size) if current is not None else None

    def distrust(self, names: Sequence[str]) -> None:
        """These leaves were changed outside the fence: copy them at once from now on."""
        self._unguarded |= set(names)
        self._stale()

    def replicas_drifted(self, names: Sequence[str]) -> None:
        """These replicated leaves differ between ranks: keep each rank's own from now on."""
        self._divergent |= set(names)
        self._stale()

    def _stale(self) -> None:
        if self._current is not None:
            self._current.identity, self._current.form = (), None

    def arrange(
        self, session: wire.Session, parts: Sequence[Part], collected: Collected, step: int
    ) -> Arrangement:
        """An arrangement that fits the live state.

        Raises:
            EverstepError: If state cannot be stored, the agent has no room, or ranks are late.
        """
        current = self._current
        if current is not None and current.form is collected.form:
            return current
        guarded = frozenset(collected.guarded - self._unguarded)
        tensors = [tensor for _, tensor in collected.tensors]
        now = (
            tuple(name for name, _ in collected.tensors),
            tuple(collected.aliases.items()),
            tuple(collected.blocks.items()),
            tuple(collected.groups.items()),
            guarded,
            identity(tensors),
        )
        if current is not None and current.identity == now:
            current.form = collected.form
            return current
        # A new arena may take long to reserve; an agent that does not answer at all may not.
        self._channel.call("Status", wire.StatusRequest(job=session.job), self._probe_s)
        groups = self._agree(session, collected, step)
        layout = self._layout(session, parts, collected, groups)
        same = current is not None and current.layout.layout_id == layout.layout_id
        if current is not None and same and not self._begun_anew:
            arena = current.arena
        else:
            arena = self._reserve(session, layout)
        self._begun_anew = False
        self._current = self._arranged(layout, arena, collected, guarded, now, groups)
        return self._current

    def _agree(
        self, session: wire.Session, collected: Collected, step: int
    ) -> tuple[ReplicaGroup, ...]:
        """Which of the leaves that should be replicas are, byte for byte: group by group."""
        everybody = tuple(range(session.world))
        candidates: dict[tuple[int, ...], list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in collected.tensors:
            ranks = collected.groups.get(name)
            if ranks is None or name in self._divergent:
                continue
            if ranks and (session.rank not in ranks or ranks[-1] >= session.world):
                raise _other_ranks(name, ranks, session)
            if session.world > 1:
                candidates.setdefault(() if ranks == everybody else ranks, []).append(
                    (name, tensor)
                )
        found = []
        joining, had = self._joining, self._had
        for ranks, leaves in sorted(candidates.items()):
            names = self._agreed_by(session, ranks, leaves, step, joining, had)
            blocks = [collected.blocks.get(name) for name in names]
            said = "\n".join(f"{name} {block}" for name, block in zip(names, blocks, strict=True))
            digest = blake2b(said.encode(), digest_size=8).digest()
            found.append(ReplicaGroup(ranks, names, digest))
        if candidates:
            self._joining = False
        return tuple(found)

    def _agreed_by(
        self,
        session: wire.Session,
        ranks: tuple[int, ...],
        leaves: Sequence[tuple[str, torch.Tensor]],
        step: int,
        joining: bool,
        had: frozenset[str] | None,
    ) -> tuple[str, ...]:
        """What all ranks of a group agree on; of one that joins them, what they agreed on without
        it. That its replicas are theirs shows when all have sealed, as at every step."""
        form = (ranks, *((name, tensor.dtype, tensor.shape) for name, tensor in leaves))
        known = self._agreed.get(form)
        if known is not None:
            return known
        request = wire.DeclareRequest(
            session=session,
            candidates=[name for name, _ in leaves],
            candidate_digests=b"".join(_whole_digest(tensor) for _, tensor in leaves),
            round=step,
            participants=ranks,
            joining=joining,
        )
        reply = self._channel.call("Declare", request, self._timeout_s)
        if reply.unknown and had is None:
            request.joining = False
            reply = self._channel.call("Declare", request, self._timeout_s)
        if reply.unknown and had is not None:
            known = tuple(name for name in request.candidates if name in had)
        else:
            known = tuple(request.candidates[index] for index in reply.agreed)
        self._agreed[form] = known
        return known

    def _layout(
        self,
        session: wire.Session,
        parts: Sequence[Part],
        collected: Collected,
        groups: Sequence[ReplicaGroup],
    ) -> Layout:
        sizes = {name: (tensor.nbytes, tensor.itemsize) for name, tensor in collected.tensors}
        shares: dict[str, tuple[int, int]] = {}
        group_ids: dict[str, int] = {}
        for group in groups:
            ranks = group.ranks or range(session.world)
            leaves = [(name, *sizes[name]) for name in group.names]
            shares |= share(leaves, ranks.index(session.rank), len(ranks))
            group_ids |= dict.fromkeys(group.names, group.group_id)
        specs = []
        for name, tensor in collected.tensors:
            start, stop = shares.get(name, (0, sizes[name][0]))
            dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
            block = collected.blocks.get(name)
            group_id = group_ids.get(name, 0)
            specs.append(LeafSpec(name, dtype, shape, start, stop, name in shares, block, group_id))
        return pack(parts, specs, collected.aliases, collected.containers)

    def _reserve(self, session: wire.Session, layout: Layout) -> ArenaMapping:
        self.before_change()
        request = wire.DeclareRequest(
            session=session,
            layout=encode(layout),
            layout_id=layout.layout_id,
            captures_in_flight=self.captures_in_flight,
        )
        reply = self._channel.call("Declare", request, self._timeout_s)
        current = self._current
        if (
            current is not None
            and current.arena.generation == reply.generation
            and current.arena.is_at(reply.arena_path)
        ):
            return current.arena
        if current is not None:
            self._current = None
            current.arena.close()
        return ArenaMapping(reply, session.job, session.rank)

    def _arranged(
        self,
        layout: Layout,
        arena: ArenaMapping,
        collected: Collected,
        guarded: frozenset[str],
        now: tuple[object, ...],
        groups: tuple[ReplicaGroup, ...],
    ) -> Arrangement:
        by_name = dict(collected.tensors)
        on_cuda = [tensor for tensor in by_name.values() if tensor.device.type == "cuda"]
        pinned = None
        if on_cuda:
            self._devices.of(on_cuda[0])
            pinned = arena.pin(self._devices.runtime, on_cuda[0].device.index)
        plan = CapturePlan(
            layout,
            by_name,
            guarded,
            options=self._options,
            arena=pinned,
            devices=self._devices,
            contents=arena.contents if self._options.incremental else None,
        )
        return Arrangement(plan, arena, now, collected.form, groups)


def _other_ranks(name: str, ranks: tuple[int, ...], session: wire.Session) -> Misplaced:
    return Misplaced(
        f"{name}: its mesh has ranks {ranks[0]} to {ranks[-1]}, and this is rank {session.rank} of "
        f"{session.world} to Everstep; give connect() the rank and world of torch.distributed"
    )


def _lock_holder(descriptor: int) -> int:
    """The process that holds a lock on the file; 0 if none does any more."""
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, fcntl.F_GETLK, query))
    return answer[4] if answer[0] != fcntl.F_UNLCK else 0


def _warn_unpinned(problem: str) -> None:
    log.warning(
        "The arena is not pinned (%s); GPU state is copied through a few pinned buffers, which "
        "is slower.",
        problem,
    )


def _whole_digest(tensor: torch.Tensor) -> bytes:
    return xxhash.xxh3_128_digest(value_bytes(tensor).numpy())  # type: ignore[arg-type]
