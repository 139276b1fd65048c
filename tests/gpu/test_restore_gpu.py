"""State comes back to a GPU byte for byte, and collecting it never waits for the device."""

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn, optim

from everstep.client import rng
from everstep.client.attachment import attachment, collect
from everstep.client.checking import check
from everstep.client.saved import Saved
from everstep.client.terms import Terms
from everstep.kernels import xxh3_triton
from everstep.kernels.cuda_runtime import CudaRuntime
from everstep.proto.errors import ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record, Value
from everstep.snapshot.capture import Capture
from everstep.snapshot.capture_plan import CapturePlan, dtype_name, value_bytes
from everstep.snapshot.device_fill import Pinned
from everstep.snapshot.layout import Layout, LeafSpec, pack
from everstep.snapshot.reading import Shard
from everstep.snapshot.restore import Restoration
from everstep.snapshot.restore_cuda import CudaAccelerator

pytestmark = pytest.mark.gpu
OFFSET = 4096
WIDTH = 1536


class Own:
    """A stateful object with small tensors on the device, one of which changes its shape."""

    def __init__(self) -> None:
        self.state = {"small": torch.zeros(3, device="cuda"), "host": torch.zeros(2), "count": 0}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Trainer:
    """A little of everything that lies on a device."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        whole = dtype is torch.float32
        norm = nn.BatchNorm1d(WIDTH) if whole else nn.LayerNorm(WIDTH)
        layers = [nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, 10)]
        self.model = nn.Sequential(*layers).to("cuda", dtype)
        self.optimizer = optim.AdamW(
            self.model.parameters(), lr=torch.tensor(1e-3, device="cuda"), fused=True
        )
        self.scheduler = optim.lr_scheduler.ExponentialLR(self.optimizer, 0.99)
        self.scaler = torch.amp.GradScaler(
            "cuda", init_scale=256.0, growth_interval=2, enabled=whole
        )
        self.own = Own()
        self.average = {
            "rows": torch.randn(40, 30, device="cuda").t(),
            "host": torch.randn(50_000),
            "flag": torch.tensor(True, device="cuda"),
        }

    def parts(self) -> dict[str, Any]:
        return {
            name: attachment(name, thing, per_rank=False, guarded=False)
            for name, thing in vars(self).items()
        }

    def settle(self) -> None:
        """What comes back to the host goes to the device, as a user's load_state_dict would do.

        And the scaler makes its tensors, which it does when it is first used.
        """
        self.own.state["small"] = self.own.state["small"].cuda()
        self.scaler.scale(torch.ones(1, device="cuda"))

    def step(self) -> None:
        batch = torch.randn(16, WIDTH, device="cuda", dtype=self.model[0].weight.dtype)
        self.scaler.scale(self.model(batch).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.own.state["small"] += 1
        self.own.state["count"] += 1
        self.average["rows"].mul_(0.5)


def bits(trainer: Trainer) -> dict[str, bytes]:
    found = collect(trainer.parts())
    data = {name: value_bytes(tensor).numpy().tobytes() for name, tensor in found.tensors}
    # Whether a scheduler's rates are the optimizer's tensors, or equal ones, is torch's affair.
    return data | {name: data[of] for name, of in found.aliases.items()}


@contextmanager
def no_waiting() -> Iterator[None]:
    with warnings.catch_warnings():
        # That it does not find every wait; the test with a busy device is there for the others.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass
class Written:
    """A snapshot as a file."""

    shard: Shard
    layout: Layout
    saved: Saved


def write(trainer: Trainer, path: Path, level: str) -> Written:
    parts = trainer.parts()
    with no_waiting():
        collected = collect(parts)
    specs = [
        LeafSpec(name, dtype_name(t.dtype), tuple(t.shape), 0, t.nbytes)
        for name, t in collected.tensors
    ]
    layout = pack(
        [part.part for part in parts.values()], specs, collected.aliases, collected.containers
    )
    image = bytearray(layout.image_bytes)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in collected.tensors}
    capture = Capture(CapturePlan(layout, tensors, frozenset()), memoryview(image), 0)
    capture.begin()
    assert capture.finish(60)
    path.write_bytes(b"\x11" * OFFSET + image)
    record = Record(
        image_bytes=len(image),
        unit_bytes=UNIT_BYTES,
        unit_digests=bytes(capture.digests),
        values=[Value(path=name, json=json) for name, json in collected.values],
    )
    shard = Shard(0, str(path), OFFSET, layout, record, level)
    return Written(shard, layout, Saved.of({0: layout}, {0: record}, 0))


def load(trainer: Trainer, written: Written, pinned: Pinned | None = None) -> str:
    """As `client/restoring.py` does; returns the problem, if any."""
    plan = check(trainer.parts(), written.saved, Terms(), 0, 1)
    with (
        torch.no_grad(),
        ThreadPoolExecutor(8) as executor,
        Restoration({0: written.shard}, 0, executor, pinned=pinned) as restoration,
    ):
        restoration.verify(plan.needs)
        restoration.plan(plan.prepare())
        restoration.run()
        plan.finish()
    return restoration.problem


@pytest.fixture(params=["memory", "nvme"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A file in shared memory or on a disk, and its level."""
    shared = request.param == "memory"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if shared else tmp_path) as folder:
        yield Path(folder) / "shard", request.param


@pytest.fixture(params=["staged", "host digests", "direct"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    xxh3_triton.prepare(torch.device("cuda"))
    if request.param == "host digests":
        monkeypatch.setattr(xxh3_triton, "available", lambda: False)
    if request.param == "direct":
        monkeypatch.setattr(CudaAccelerator, "room", lambda _: 0)
    return str(request.param)


def trained(seed: int, steps: int, dtype: torch.dtype = torch.float32) -> Trainer:
    trainer = Trainer(seed, dtype)
    for _ in range(steps):
        trainer.step()
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_process_gets_every_byte(
    place: tuple[Path, str], way: str, dtype: torch.dtype
) -> None:
    trainer = trained(1, 3, dtype)
    written = write(trainer, *place)
    fresh = Trainer(2, dtype)
    before = torch.cuda.memory_allocated()
    assert load(fresh, written) == ""
    torch.cuda.synchronize()
    moments = sum(p.nbytes for p in fresh.model.parameters()) * 2
    # What was staged is gone; only the optimizer's state, made by loading it, is new.
    assert torch.cuda.memory_allocated() - before < moments + 8 * UNIT_BYTES
    assert fresh.scaler.state_dict() == trainer.scaler.state_dict()
    assert fresh.own.state["count"] == 3
    fresh.settle()
    assert bits(fresh) == bits(trainer)
    devices = {name: t.device for name, t in collect(fresh.parts()).tensors}
    assert devices.items() >= {n: t.device for n, t in collect(trainer.parts()).tensors}.items()
    for each in (trainer, fresh):
        torch.manual_seed(5)
        each.step()
    assert bits(fresh) == bits(trainer)


def test_a_rewind_fills_the_tensors_that_are_there(place: tuple[Path, str], way: str) -> None:
    trainer = trained(1, 2)
    written, then = write(trainer, *place), bits(trainer)
    scaler = trainer.scaler.state_dict()
    held = {name: t.data_ptr() for name, t in collect(trainer.parts()).tensors}
    for _ in range(3):
        trainer.step()
    assert bits(trainer) != then
    assert load(trainer, written) == ""
    trainer.settle()
    assert bits(trainer) == then
    assert trainer.scaler.state_dict() == scaler
    now = {name: t.data_ptr() for name, t in collect(trainer.parts()).tensors}
    parts = ("model/", "optimizer/state/", "average/", "scaler/")
    kept = {name for name in held if name.startswith(parts)}
    assert {name: now[name] for name in kept} == {name: held[name] for name in kept}


def test_a_damaged_unit_is_found_before_any_tensor_changes(
    place: tuple[Path, str], way: str
) -> None:
    trainer = trained(1, 2)
    written = write(trainer, *place)
    trainer.step()
    unit = written.layout.image_bytes // UNIT_BYTES // 2
    with Path(written.shard.path).open("r+b") as file:
        file.seek(OFFSET + unit * UNIT_BYTES + 4711)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 64]))
        file.flush()
        os.fsync(file.fileno())
    before, reserved = bits(trainer), torch.cuda.memory_allocated()
    with pytest.raises(ShardCorrupt) as raised:
        load(trainer, written)
    assert raised.value.units == (unit,)
    assert bits(trainer) == before
    assert torch.cuda.memory_allocated() <= reserved + UNIT_BYTES


def test_pinned_memory_is_sent_from_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xxh3_triton.prepare(torch.device("cuda"))
    monkeypatch.setattr(CudaAccelerator, "ring", lambda *_: pytest.fail("needs no ring"))
    trainer = trained(1, 2)
    written, then = write(trainer, tmp_path / "shard", "memory"), bits(trainer)
    trainer.step()
    runtime = CudaRuntime.find()
    assert runtime is not None
    whole = numpy.fromfile(written.shard.path, dtype=numpy.uint8)
    arena = torch.from_numpy(whole).pin_memory()
    asked: list[int] = []

    def pinned(path: str, offset: int, size: int) -> int:
        asked.append(size)
        assert offset + size <= arena.numel()
        return arena.data_ptr() + offset

    assert load(trainer, written, pinned) == ""
    # The first unit, to see whether a ring will be needed, and then everything.
    assert sum(asked) == UNIT_BYTES + written.layout.image_bytes
    trainer.settle()
    assert bits(trainer) == then


def test_collecting_never_waits() -> None:
    """Nor does the capture of the generators."""
    trainer = trained(1, 2)
    trainer.own.state["small"] = torch.ones(5, device="cuda")
    parts = trainer.parts()
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 30)
    done = torch.cuda.Event()
    done.record()
    with no_waiting():
        collected = collect(parts, frozenset())
        states = rng.capture()
        assert not done.query(), "collecting waited for the device"
    names = {name for name, _ in collected.tensors} | set(collected.aliases)
    assert names > {"scaler/scale", "scaler/_growth_tracker", "own/small"}
    assert len(states["cuda"]) == torch.cuda.device_count()
    torch.cuda.synchronize()


def test_generators_of_the_device_come_back() -> None:
    torch.rand(7, device="cuda")
    states = rng.capture()
    expected = torch.rand(7, device="cuda")
    assert rng.restore(states) == []
    assert torch.equal(torch.rand(7, device="cuda"), expected)


def alone(script: str) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr


def test_generators_initialise_nothing() -> None:
    alone(
        "import torch; from everstep.client import rng; states = rng.capture(); "
        "assert 'cuda' not in states; assert not torch.cuda.is_initialized()"
    )


def test_generators_make_no_context_on_other_devices() -> None:
    alone(
        "import torch; from everstep.client import rng; torch.ones(1, device='cuda:0'); "
        "rng.restore(rng.capture()); others = range(1, torch.cuda.device_count()); "
        "assert not any(torch._C._cuda_hasPrimaryContext(i) for i in others)"
    )
