"""Copy-on-update on a real device: the same promises as with the fake one, without an agent."""

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from random import Random

import pytest
import torch

from everstep.kernels.cuda_runtime import CudaRuntime
from everstep.kernels.digest import digest_units
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.capture import Capture
from everstep.snapshot.capture_plan import CapturePlan, dtype_name
from everstep.snapshot.device import DeviceOptions
from everstep.snapshot.device_cuda import CudaDevices
from everstep.snapshot.layout import Layout, LeafSpec, Part, pack
from everstep.snapshot.pinning import PinnedArena
from everstep.snapshot.slot_digests import SlotDigests

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]

Tensors = dict[str, torch.Tensor]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def devices() -> CudaDevices:
    return CudaDevices()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Torch raises where a call would wait for the device, on any thread."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def layout_of(tensors: Tensors) -> Layout:
    specs = [
        LeafSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in tensors.items()
    ]
    return pack([Part("t", "tree", "builtins.dict")], specs, {}, {})


def some_tensors(random: Random) -> Tensors:
    tensors: Tensors = {}
    for number in range(random.randrange(2, 30)):
        dtype = random.choice([torch.float32, torch.bfloat16, torch.int64, torch.uint8])
        size = int(4 ** random.uniform(0, 12.5))
        device = "cuda" if random.random() < 0.9 else "cpu"
        tensor = torch.randint(0, 100, (size,), device=device).to(dtype)
        if random.random() < 0.2 and size > 4:
            tensor = tensor[: size // 2 * 2].view(-1, 2).t()
        tensors[f"t/{number}"] = tensor
    return tensors


class Arena:
    """Two slots, pinned if asked for."""

    def __init__(self, image_bytes: int, *, pinned: bool) -> None:
        self.slot_bytes = -(-image_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, 2 * self.slot_bytes)
        self.image_bytes = image_bytes
        self.pinned: PinnedArena | None = None
        if pinned:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
            runtime = CudaRuntime.find()
            self.pinned = PinnedArena(address, self.slot_bytes, 2, runtime, device=0)
            assert self.pinned.wait(WAIT_S), self.pinned.problem

    def slot(self, index: int) -> memoryview:
        begin = index * self.slot_bytes
        return memoryview(self.memory)[begin : begin + self.image_bytes]

    def close(self) -> None:
        assert self.pinned is None or self.pinned.close()


def expected(tensors: Tensors, layout: Layout) -> bytes:
    image = bytearray(layout.header.ljust(layout.image_bytes, b"\0"))
    for leaf in layout.leaves:
        value = tensors[leaf.name].detach().cpu().contiguous().view(-1).view(torch.uint8)
        image[leaf.offset : leaf.offset + leaf.held_bytes] = value.numpy().tobytes()
    return bytes(image)


@pytest.mark.parametrize("seed", range(12))
def test_a_capture_is_the_state_of_the_snapshot(seed: int, devices: CudaDevices) -> None:
    random = Random(seed)
    torch.manual_seed(seed)
    tensors = some_tensors(random)
    layout = layout_of(tensors)
    arena = Arena(layout.image_bytes, pinned=random.random() < 0.8)
    guarded = frozenset(name for name in tensors if random.random() < 0.8)
    scratch, digests = random.choice([None, 0, 8 << 20]), random.choice(["device", "host"])
    options = DeviceOptions(
        scratch if arena.pinned else None, False, "device" if digests == "device" else "host", 64
    )
    plan = CapturePlan(
        layout, tensors, guarded, options=options, arena=arena.pinned, devices=devices
    )
    for step in range(6):
        image = expected(tensors, layout)
        torch.cuda.synchronize()
        slot = arena.slot(step % 2)
        capture = Capture(plan, slot, seed=step, slot_index=step % 2)
        thread = threading.Thread(target=capture.carry, args=(WAIT_S,))
        # With the thread at work, or with a look at whether this one waits for the device: the
        # other one may.
        with nullcontext() if step % 2 else no_waiting():
            capture.begin()
            if step % 2:
                thread.start()
            torch.cuda._sleep(random.choice([0, 10_000_000]))
            assert capture.fence(WAIT_S)
            for tensor in tensors.values():
                tensor.add_(1)
        if not step % 2:
            thread.start()
        thread.join(WAIT_S)
        assert capture.problem == ""
        assert capture.torn == ()
        assert capture.complete
        assert bytes(slot) == image
        assert bytes(capture.digests) == digest_units(slot, UNIT_BYTES)
        capture.release()
    arena.close()


@pytest.mark.parametrize("aside", [False, True])
def test_a_graph_that_is_recorded_meanwhile_gets_nothing_of_it(
    aside: bool, devices: CudaDevices
) -> None:
    """Digests may lie in the training's stream: not in one that is recorded."""
    tensors = {f"t/{number}": torch.randn(4 << 20, device="cuda") for number in range(4)}
    layout = layout_of(tensors)
    arena = Arena(layout.image_bytes, pinned=True)
    plan = CapturePlan(layout, tensors, frozenset(tensors), arena=arena.pinned, devices=devices)
    capture = Capture(plan, arena.slot(0), seed=1)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    counter = torch.zeros((), device="cuda")
    image = expected(tensors, layout)

    def carry() -> None:
        capture.enter_thread()
        capture.carry(WAIT_S)

    torch.cuda.synchronize()
    with torch.cuda.stream(stream) if aside else nullcontext():
        (device,) = {devices.of(tensor) for tensor in tensors.values()}
        assert device is not None
        assert device.digest_lane() == ("digests" if aside else "update")
        capture.begin()
        thread = threading.Thread(target=carry)
        with torch.cuda.graph(graph, stream=stream):
            counter.add_(1)
            thread.start()
            thread.join(WAIT_S)
            counter.add_(1)
    assert capture.problem == ""
    assert capture.complete
    assert bytes(arena.slot(0)) == image
    assert bytes(capture.digests) == digest_units(arena.slot(0), UNIT_BYTES)
    capture.release()
    # Of the capture, which would find other bytes now, the graph does nothing.
    slot = bytes(arena.slot(0))
    for tensor in tensors.values():
        tensor.zero_()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert counter.item() == 6
    assert bytes(arena.slot(0)) == slot
    arena.close()


def test_unchanged_units_are_left_out(devices: CudaDevices) -> None:
    tensors = {name: torch.randn(16 << 20, device="cuda") for name in ("t/frozen", "t/changing")}
    layout = layout_of(tensors)
    arena = Arena(layout.image_bytes, pinned=True)
    options = DeviceOptions(incremental=True)
    plan = CapturePlan(
        layout,
        tensors,
        frozenset(tensors),
        options=options,
        arena=arena.pinned,
        devices=devices,
        contents=SlotDigests(),
    )
    for step in range(6):
        slot = arena.slot(step % 2)
        capture = Capture(plan, slot, seed=step, slot_index=step % 2)
        image = expected(tensors, layout)
        capture.begin()
        assert capture.fence(WAIT_S)
        tensors["t/changing"].add_(1)
        capture.carry(WAIT_S)
        assert capture.problem == ""
        assert bytes(slot) == image
        assert capture.stats.skipped_units in ((0,) if step < 2 else (63, 64))
        capture.release()
    arena.close()


def test_a_write_that_only_the_sample_shows_is_noticed(devices: CudaDevices) -> None:
    tensors = {"t/x": torch.randn(4 << 20, device="cuda")}
    layout = layout_of(tensors)
    arena = Arena(layout.image_bytes, pinned=True)
    plan = CapturePlan(layout, tensors, frozenset(tensors), arena=arena.pinned, devices=devices)
    capture = Capture(plan, arena.slot(0), seed=1)
    capture.begin()
    tensors["t/x"].data.add_(1)
    assert capture.fence(WAIT_S)
    capture.carry(WAIT_S)
    assert capture.torn == ("t/x",)
    capture.release()
    arena.close()
