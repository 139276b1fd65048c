"""Captures on a fake device: tensors, what is asked of them, and what must come of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from everstep.kernels.digest import digest_units
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.capture import Capture
from everstep.snapshot.capture_plan import CapturePlan, dtype_name
from everstep.snapshot.device import DeviceOptions
from everstep.snapshot.layout import Layout, LeafSpec, Part, pack
from everstep.snapshot.slot_digests import SlotDigests

from .fake_device import FakeArena, FakeDevice, FakeDevices

Tensors = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], object]
MANY = 300_000
ROUNDS = 20_000


def layout_of(tensors: Tensors, ranges: dict[str, tuple[int, int]]) -> Layout:
    specs = []
    for name, tensor in tensors.items():
        start, stop = ranges.get(name, (0, tensor.nbytes))
        shape = tuple(tensor.shape)
        specs.append(LeafSpec(name, dtype_name(tensor.dtype), shape, start, stop, name in ranges))
    return pack([Part("t", "tree", "builtins.dict")], specs, {}, {})


@dataclass
class Setting:
    """Tensors, the device that some of them are on, and what is asked of the capture."""

    tensors: Tensors
    device: FakeDevice = field(default_factory=FakeDevice)
    on_device: frozenset[str] | None = None
    guarded: frozenset[str] | None = None
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    options: DeviceOptions = field(default_factory=DeviceOptions)
    pinned: bool = True
    contents: SlotDigests | None = None

    def plan(self, device: FakeDevice | None = None) -> CapturePlan:
        devices = FakeDevices()
        for name, tensor in self.tensors.items():
            if tensor.numel() and (self.on_device is None or name in self.on_device):
                devices.put(tensor, device or self.device)
        arena: Any = FakeArena(pinned=self.pinned)
        guarded = frozenset(self.tensors) if self.guarded is None else self.guarded
        return CapturePlan(
            layout_of(self.tensors, self.ranges),
            self.tensors,
            guarded,
            options=self.options,
            arena=arena,
            devices=devices,
            contents=self.contents,
        )

    def image(self) -> bytes:
        """What a capture of this moment must give, by the CPU alone."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        plan = CapturePlan(layout_of(tensors, self.ranges), tensors, frozenset(tensors))
        slot = bytearray(plan.layout.image_bytes)
        capture = Capture(plan, memoryview(slot), seed=1)
        capture.begin()
        assert capture.finish(10)
        return bytes(slot)

    def update(self, change: Change = lambda tensor: tensor.add_(1)) -> None:
        """An optimizer's step, and whatever user code does behind it."""
        for tensor in self.tensors.values():
            self.device.train(tensor, change) if self.is_on(tensor) else change(tensor)

    def is_on(self, tensor: torch.Tensor) -> bool:
        names = [name for name, other in self.tensors.items() if other is tensor]
        return self.on_device is None or names[0] in self.on_device


@dataclass
class Taken:
    """A capture with its slot."""

    capture: Capture
    slot: bytearray
    expected: bytes

    def settle(self, device: FakeDevice) -> None:
        """Run everything to the end, without an update."""
        for _ in range(ROUNDS):
            device.run()
            if self.capture.poll():
                return
        raise AssertionError("it does not end")

    def check(self) -> None:
        assert self.capture.problem == ""
        assert self.capture.torn == ()
        assert self.capture.complete
        assert bytes(self.slot) == self.expected
        assert bytes(self.capture.digests) == digest_units(self.slot, UNIT_BYTES)


def begun(
    setting: Setting,
    *,
    seed: int = 7,
    plan: CapturePlan | None = None,
    slot: bytearray | None = None,
    slot_index: int = 0,
) -> Taken:
    # The state that the host knows: as if the device had done everything so far.
    setting.device.run("update")
    plan = plan or setting.plan()
    slot = bytearray(b"\xa5" * plan.layout.image_bytes) if slot is None else slot
    expected = setting.image()
    capture = Capture(plan, memoryview(slot), seed, slot_index=slot_index)
    capture.begin()
    return Taken(capture, slot, expected)


def some_tensors(random: Random) -> Tensors:
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
    tensors: Tensors = {}
    for number in range(random.randrange(1, 14)):
        dtype = random.choice(dtypes)
        size = int(4 ** random.uniform(0, 10))
        tensor = torch.randint(0, 100, (size,)).to(dtype)
        if random.random() < 0.2 and size > 4:
            tensor = tensor[: size // 2 * 2].view(-1, 2).t()
        tensors[f"t/{number}"] = tensor
    tensors["t/empty"] = torch.empty(0)
    return tensors


def some_setting(random: Random) -> Setting:
    tensors = some_tensors(random)
    names = list(tensors)
    device = FakeDevice(has_kernels=random.random() < 0.8)
    device.free_for_scratch = random.choice([0, 1 << 20, 1 << 40, 1 << 40])
    device.lane_of_digests = random.choice(["update", "digests"])
    if random.random() < 0.7:
        device.window.observe_update(random.uniform(0, 0.01), None)
        device.window.observe_bandwidth(10**9, 1)
    ranges = {}
    for name in names:
        tensor = tensors[name]
        if random.random() < 0.15 and tensor.numel() > 1:
            cut = sorted(random.randrange(tensor.numel() + 1) for _ in range(2))
            element = tensor.element_size()
            ranges[name] = (cut[0] * element, cut[1] * element)
    return Setting(
        tensors,
        device,
        frozenset(name for name in names if random.random() < 0.85),
        frozenset(name for name in names if random.random() < 0.8),
        ranges,
        DeviceOptions(
            scratch_bytes=random.choice([None, None, 0, 1 << 20]),
            digests=random.choice(["device", "device", "host"]),
        ),
        pinned=random.random() < 0.8,
    )
