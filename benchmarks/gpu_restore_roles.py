"""The processes of the restore measurement: one that is killed, one that follows, one from disk.

Started by `benchmarks.gpu_restore`; each says what it has reached, and when, as JSON lines. torch
is imported by the functions, so that its import has a time of its own.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def say(what: str, **more: Any) -> None:
    """One line for the parent."""
    print(json.dumps({"what": what, "unix_s": time.time(), **more}), flush=True)


def client_of(options: argparse.Namespace, training: Any) -> Any:
    """Connected, with the training attached."""
    import everstep

    client = everstep.connect(options.job, agent=options.agent, rank=0, world=1)
    client.attach(**training.objects())
    return client


def built(options: argparse.Namespace, *, steps: int) -> Any:
    """The same training as in the parent."""
    import torch

    say("torch imported", version=torch.__version__)
    from benchmarks.gpu_workload import Size, Training

    size = Size.tiny() if options.tiny else Size()
    training = Training.start(options.device, size, steps=steps)
    say("model built")
    return training


def train(options: argparse.Namespace) -> None:
    """Snapshot every second step, one of them to NVMe too, until killed."""
    training = built(options, steps=2)
    client = client_of(options, training)
    step = 0
    for _ in range(8):
        training.steps(1)
        step += 2
        handle = client.snapshot(step)
        if not handle.skipped:
            handle.wait(timeout=120.0)
    assert handle.wait("nvme", timeout=120.0)
    say("on nvme", step=step)
    deadline = time.monotonic() + 300.0
    handles = {}
    while time.monotonic() < deadline:
        training.steps(1)
        step += 1
        if step % 2 == 0:
            handles[step] = client.snapshot(step)
        committed = max((s for s, h in handles.items() if h.done()), default=0)
        say("step", step=step, committed=committed, skipped=sum(client.stats.skipped.values()))
    sys.exit("nobody killed this process")


def resume(options: argparse.Namespace) -> None:
    """What a trainer does that is started again, up to its first step."""
    training = built(options, steps=0)
    client = client_of(options, training)
    say("connected")
    step = client.restore()
    training.pace.synchronize()
    say("restored", step=step, levels=list(client.restored_from))
    training.steps(1)
    say("first step")
    say_bandwidth(training)
    client.close(timeout=0)


def say_bandwidth(training: Any) -> None:
    """How fast a plain copy to the device is in this process, and how much state there is."""
    from benchmarks.gpu_machine import bandwidth

    speed = bandwidth(training.device, to_device=True)
    say("bandwidth", bytes_per_s=speed, state_bytes=training.state_bytes)


def nvme(options: argparse.Namespace) -> None:
    """Restore from the NVMe files, and read them bare and as others do, several times in turns."""
    from benchmarks import gpu_files

    training = built(options, steps=0)
    client = client_of(options, training)
    (path,) = gpu_files.newest_images(Path(options.nvme_dir) / options.job)

    def ours(_path: Path, _device: Any) -> int:
        client.restore(levels=("nvme",))
        training.pace.synchronize()
        assert list(client.restored_from) == ["nvme"], client.restored_from
        return int(training.state_bytes)

    ways = [("restore", ours), *gpu_files.LOADERS.items()]
    # A disk is not as fast for whoever comes first as for the next, so each comes first once.
    for first in range(len(ways)):
        for name, load in ways[first:] + ways[:first]:
            say_loading(name, load, path, training.device)
    client.close(timeout=0)


def say_loading(name: str, load: Callable[..., int], path: Path, device: Any) -> None:
    """How long one way takes for the file."""
    from benchmarks import gpu_files

    gpu_files.forget(path)
    begun = time.perf_counter()
    try:
        count = load(path, device)
    except ImportError as error:
        say("loader", name=name, problem=f"not installed: {error}")
    except Exception as error:
        say("loader", name=name, problem=f"{type(error).__name__}: {error}")
    else:
        say("loader", name=name, seconds=time.perf_counter() - begun, bytes=count)


def main() -> None:
    """Run from the command line."""
    say("process started")
    if len(sys.argv) == 1:
        return  # as `make bench` starts every file here
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("train", "resume", "nvme"))
    parser.add_argument("--agent", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--nvme-dir", default="")
    options = parser.parse_args()
    {"train": train, "resume": resume, "nvme": nvme}[options.role](options)


if __name__ == "__main__":
    main()
