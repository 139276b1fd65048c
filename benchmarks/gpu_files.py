"""Bringing a safetensors file from disk to the device: bare, and with the loaders there are.

Owns the comparison that restore from NVMe stands beside. The bare loop reads the file with
O_DIRECT in several threads into pinned buffers and copies each on a stream of its thread's own; it
checks no digest and makes no tensor. The others are called as their documentation does.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch

BARE = "bare O_DIRECT"
THREADS = 8
CHUNK_BYTES = 16 << 20


def newest_images(directory: Path) -> list[Path]:
    """The image of each rank at the newest step that is on disk."""
    steps = sorted(path for path in directory.glob("step-*") if any(path.glob("*.safetensors")))
    if not steps:
        raise SystemExit(f"nothing was flushed to {directory}")
    return sorted(steps[-1].glob("*.safetensors"))


def forget(path: Path) -> None:
    """Make the next read come from the disk."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bare(path: Path, device: torch.device) -> int:
    """Read it all, to the device; returns its bytes."""
    size = path.stat().st_size
    target = torch.empty(size, dtype=torch.uint8, device=device)
    starts = iter(range(0, size, CHUNK_BYTES))
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    try:
        with ThreadPoolExecutor(THREADS) as executor:
            work = [executor.submit(_read, descriptor, target, starts) for _ in range(THREADS)]
            for one in work:
                one.result()
    finally:
        os.close(descriptor)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return size


def _read(descriptor: int, target: torch.Tensor, starts: Iterator[int]) -> None:
    """On a thread: chunk after chunk, reading one while the one before it is copied."""
    cuda = target.device.type == "cuda"
    buffers = [_buffer(cuda) for _ in range(2)]
    views = [memoryview(buffer.numpy()) for buffer in buffers]
    if not cuda:
        for start in starts:
            count = os.preadv(descriptor, [views[0]], start)
            target[start : start + count] = buffers[0][:count]
        return
    stream = torch.cuda.Stream(target.device)
    copied = [torch.cuda.Event() for _ in buffers]
    with torch.cuda.stream(stream):
        for turn, start in enumerate(starts):
            which = turn % 2
            copied[which].synchronize()
            count = os.preadv(descriptor, [views[which]], start)
            target[start : start + count].copy_(buffers[which][:count], non_blocking=True)
            copied[which].record(stream)
    stream.synchronize()


def _buffer(pinned: bool) -> torch.Tensor:
    # O_DIRECT wants whole pages, which pinned memory and mappings are.
    if pinned:
        return torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, CHUNK_BYTES), dtype=torch.uint8)


def fastsafetensors(path: Path, device: torch.device) -> int:
    """All tensors of the file with fastsafetensors; without GPU Direct Storage."""
    from fastsafetensors import (  # type: ignore[import-not-found, unused-ignore]
        SafeTensorsFileLoader,
        SingleGroup,
    )

    name = "cuda:0" if device.type == "cuda" else "cpu"
    loader = SafeTensorsFileLoader(SingleGroup(), name, nogds=True)
    loader.add_filenames({0: [str(path)]})
    files = loader.copy_files_to_device()
    tensors = [files.get_tensor(key) for key in files.key_to_rank_lidx]
    if device.type == "cuda":
        torch.cuda.synchronize()
    count = sum(tensor.nbytes for tensor in tensors)
    del tensors
    files.close()
    loader.close()
    return count


def runai_model_streamer(path: Path, device: torch.device) -> int:
    """All tensors of the file with runai-model-streamer."""
    from runai_model_streamer import (  # type: ignore[import-not-found, unused-ignore]
        SafetensorsStreamer,
    )

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        tensors = [tensor.to(device) for _, tensor in streamer.get_tensors()]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return sum(tensor.nbytes for tensor in tensors)


LOADERS: MappingProxyType[str, Callable[[Path, torch.device], int]] = MappingProxyType(
    {
        BARE: bare,
        "fastsafetensors": fastsafetensors,
        "runai-model-streamer": runai_model_streamer,
    }
)
