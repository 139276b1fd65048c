"""The leaves of a plan that are on one device, with their tables there.

Owns what all captures of a plan have in common on a device: which leaves are live, the tables of
`device_plan`, uploaded, and what is sampled. Promises that nothing in it changes, so that several
captures may use it at once. Does not enqueue anything but the uploads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

from everstep.snapshot.device import Device, DeviceOptions, is_ordered
from everstep.snapshot.device_plan import DeviceLeaf, Relative, plan_device
from everstep.snapshot.layout import Leaf


@dataclass(frozen=True, slots=True)
class DeviceSource:
    """A leaf, its tensor, and whether it changes only after a fence."""

    leaf: Leaf
    tensor: torch.Tensor
    guarded: bool


@dataclass(slots=True)
class CaptureStats:
    """What became of the bytes of one capture.

    Attributes:
        window_bytes: Copied from the live leaves before the update.
        scratch_bytes: Cloned at the update.
        direct_bytes: Made the update wait, for want of scratch.
        clone_bytes: Cloned at once, at the snapshot.
        skipped_units: Left out, since the slot held them.
        update_wait_s: For how long the update waited for copies, on the device.
    """

    window_bytes: int = 0
    scratch_bytes: int = 0
    direct_bytes: int = 0
    clone_bytes: int = 0
    skipped_units: int = 0
    update_wait_s: float = 0.0

    def add(self, other: "CaptureStats") -> None:
        """Count another's, too."""
        self.window_bytes += other.window_bytes
        self.scratch_bytes += other.scratch_bytes
        self.direct_bytes += other.direct_bytes
        self.clone_bytes += other.clone_bytes
        self.skipped_units += other.skipped_units
        self.update_wait_s += other.update_wait_s


class DevicePart:
    """The leaves of a plan that are on one device, with their tables there.

    Nothing in it changes, so that several captures may use it at once.

    Args:
        device: The device.
        sources: In image order, none empty.
        replicas: Tensors on the device that are replicated, with their numbers among all that are.
        image_bytes: The image's length.
        options: How to capture.
    """

    def __init__(
        self,
        device: Device,
        sources: Sequence[DeviceSource],
        replicas: Sequence[tuple[int, torch.Tensor]],
        image_bytes: int,
        options: DeviceOptions,
    ) -> None:
        self.device = device
        self.options = options
        self.image_bytes = image_bytes
        leaves = [_device_leaf(source) for source in sources]
        self.live = [s for s, leaf in zip(sources, leaves, strict=True) if leaf.is_live]
        self.live_tensors = [source.tensor for source in self.live]
        digests = device.has_kernels and options.digests == "device"
        self.plan = plan_device(leaves, image_bytes, digest=digests)
        places = self.plan.places
        self.stored = [
            (source.tensor, places[index])
            for index, source in enumerate(sources)
            if not leaves[index].address
        ]
        self.units = self.plan.device_units
        sampled = [(leaf.address, leaf.bytes) for leaf in leaves if leaf.is_live]
        self.sampled = device.prepare(_addresses(sampled))
        self.gathers = device.prepare(self.plan.gathers)
        self.seams = device.prepare(self.plan.seams)
        self.unit_tables = [(one, device.prepare(one.addresses)) for one in self.plan.digested]
        # One whose memory does not hold its value in order counts as equal: it may have no bytes
        # here, and all ranks must say the same of it.
        self.replica_numbers = [number for number, tensor in replicas if is_ordered(tensor)]
        sampled_replicas = [tensor for _, tensor in replicas if is_ordered(tensor)]
        self.replicas = device.prepare(
            _addresses([(tensor.data_ptr(), tensor.nbytes) for tensor in sampled_replicas])
        )


def _device_leaf(source: DeviceSource) -> DeviceLeaf:
    leaf, tensor = source.leaf, source.tensor
    address = tensor.data_ptr() + leaf.start if is_ordered(tensor) else 0
    return DeviceLeaf(
        leaf.offset, leaf.held_bytes, address, source.guarded, leaf.start, tensor.nbytes
    )


def _addresses(rows: Sequence[tuple[int, int]]) -> Relative:
    """A table of sources, rows (address, bytes)."""
    numbers = numpy.array(rows, dtype=numpy.int64).reshape(-1, 2)
    return Relative(numbers, numpy.zeros_like(numbers))
