"""What shows that a device's leaves were changed while they were copied, or differ between ranks.

Owns the version counters and the sampled words of one capture's leaves on one device, from the
snapshot to the update. Promises that a leaf whose version has moved, or one of whose sampled words
has, is named. Does not promise to see a write that neither moves the version nor meets a sampled
word. Keeps the storage of the snapshot's moment alive. Waits for nothing: callers read once the
lane has come past.
"""

import operator

import torch

from everstep.snapshot.device import REPLICA_SAMPLES, SAMPLES, Lane, Result
from everstep.snapshot.device_part import DevicePart

_version = operator.attrgetter("_version")


class Tripwire:
    """One capture's.

    Args:
        part: The leaves.
        seed: Of the sample positions.
    """

    def __init__(self, part: DevicePart, seed: int) -> None:
        self._part = part
        self._seed = seed
        self._held: list[torch.UntypedStorage] = []
        self._versions: list[int] = []
        self._torn: set[str] = set()
        self._base = 0
        self._before: Result = None
        self._after: Result = None
        self._replicas: Result = None

    def hold(self) -> None:
        """Note the versions; first of all, on the training thread."""
        # The storage of this moment, whatever becomes of the tensors' `.data`.
        self._held = list(map(torch.Tensor.untyped_storage, self._part.live_tensors))
        self._versions = self._versions_now()

    def begin(self, base: int) -> None:
        """Enqueue the first look on the update lane; `base` is the clone block's address."""
        device, part, self._base = self._part.device, self._part, base
        if device.has_kernels:
            self._before = device.sample("update", part.sampled, base, SAMPLES, self._seed)
            if part.replica_numbers:
                self._replicas = device.sample(
                    "update", part.replicas, base, REPLICA_SAMPLES, self._seed
                )

    def look_again(self, lane: Lane) -> None:
        """Enqueue the second look, after which the leaves may change."""
        device, part = self._part.device, self._part
        if device.has_kernels:
            self._after = device.sample(lane, part.sampled, self._base, SAMPLES, self._seed)

    def compare_versions(self) -> None:
        """On the thread that is about to change the leaves, or when nobody has."""
        now = self._versions_now()
        if now != self._versions:
            pairs = zip(self._part.live, self._versions, now, strict=True)
            self._torn |= {source.leaf.name for source, old, new in pairs if old != new}

    def _versions_now(self) -> list[int]:
        return list(map(_version, self._part.live_tensors))

    def torn(self) -> tuple[str, ...]:
        """The leaves that changed, in order; once both looks are done."""
        device, live = self._part.device, self._part.live
        if device.has_kernels:
            before, after = device.fingerprints(self._before), device.fingerprints(self._after)
            if before != after:
                self._torn |= {
                    source.leaf.name
                    for index, source in enumerate(live)
                    if before[8 * index : 8 * index + 8] != after[8 * index : 8 * index + 8]
                }
        return tuple(source.leaf.name for source in live if source.leaf.name in self._torn)

    def replica_samples(self) -> bytes:
        """8 bytes for each of the part's replicas; none where the device has no kernels."""
        found = self._replicas
        return self._part.device.fingerprints(found) if found is not None else b""

    def release(self) -> None:
        """Let go of everything."""
        self._held = []
        self._before = self._after = self._replicas = None
