"""What the machine can do: copies to, from and on the device, the device's digest, free memory.

Owns the bandwidths that the GPU benchmark's other figures stand beside. Promises nothing about the
capture: everything here is a bare loop over plain buffers.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu_results import Results, middle

CHUNK_BYTES = 256 << 20
REPEATS = 16
_UNIT_BYTES = 1 << 20


def measure(results: Results, device: torch.device, state_bytes: int) -> None:
    """Bandwidths, and what they mean for the state."""
    cuda = device.type == "cuda"
    size = CHUNK_BYTES if cuda else 1 << 20
    host = torch.ones(size, dtype=torch.uint8, pin_memory=cuda)
    pageable = torch.ones(size, dtype=torch.uint8)
    there = torch.ones(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(there)
    moves: tuple[tuple[str, str, Callable[[], object], int], ...] = (
        ("device to host, pinned", "d2h", lambda: host.copy_(there, non_blocking=True), 1),
        ("host to device, pinned", "h2d", lambda: there.copy_(host, non_blocking=True), 1),
        ("device to host, pageable", "d2h_pageable", lambda: pageable.copy_(there), 1),
        ("device to device, read and write", "d2d", lambda: other.copy_(there), 2),
    )
    for name, key, move, counted in moves:
        speed = counted * size / seconds(device, move)
        results.add(name, speed, f"{speed / 1e9:9.1f} GB/s", f"{key}_bytes_per_s")
        results.say()
    for key, name in (("d2h", "state over PCIe to the host"), ("h2d", "and back")):
        taken = state_bytes / results.figures[f"{key}_bytes_per_s"]
        results.add(name, taken, f"{taken * 1e3:9.1f} ms", f"state_{key}_s")
        results.say()
    shm = os.statvfs("/dev/shm")
    free = shm.f_bavail * shm.f_frsize
    results.add("free in /dev/shm", free, f"{free / 1e9:9.1f} GB", "shm_free_bytes")
    results.say()
    if cuda:
        _digest(results, device)


def seconds(device: torch.device, move: Callable[[], object], repeats: int = REPEATS) -> float:
    """Of one move, on the average of a row of them; the median of three rows."""
    rows = []
    for _ in range(4):
        _settle(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            move()
        _settle(device)
        rows.append((time.perf_counter() - begun) / repeats)
    return middle(rows[1:])  # the first touches memory and wakes clocks


def bandwidth(device: torch.device, *, to_device: bool) -> float:
    """Bytes a second of a plain pinned copy, for parts that run in processes of their own."""
    cuda = device.type == "cuda"
    size = CHUNK_BYTES if cuda else 1 << 20
    host = torch.ones(size, dtype=torch.uint8, pin_memory=cuda)
    there = torch.ones(size, dtype=torch.uint8, device=device)
    target, source = (there, host) if to_device else (host, there)
    return size / seconds(device, lambda: target.copy_(source, non_blocking=True))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _digest(results: Results, device: torch.device) -> None:
    from everstep.kernels import xxh3_triton

    units = 4096
    data = torch.randint(256, (units * _UNIT_BYTES,), dtype=torch.uint8, device=device)
    first = data.data_ptr()
    addresses = torch.arange(units, dtype=torch.int64, device=device) * _UNIT_BYTES + first
    accumulators = torch.zeros((units, 8), dtype=torch.int64, device=device)
    taken = seconds(device, lambda: xxh3_triton.accumulate(addresses, accumulators, 512), 4)
    speed = data.numel() / taken
    results.add("xxh3_128 on the device", speed, f"{speed / 1e9:9.1f} GB/s", "digest_bytes_per_s")
    results.say()


def meminfo(key: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0
