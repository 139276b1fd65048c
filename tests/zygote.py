"""A warm process of the tests: imports once, then forks agents, trainers or programs on request.

Importing torch takes seconds, forking a process that has it takes milliseconds. A forked process
is as real as any: its own pid, session, memory and descriptors. Run as
``zygote.py KIND DESCRIPTOR``, where the descriptor is a socket on which `zygotes.Zygote` asks.
"""

import atexit
import ctypes
import faulthandler
import importlib
import inspect
import json
import os
import resource
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

IMPORTED = (
    "everstep.client.client",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
)
"""What ranks of a job import, beside torch."""


def arm(setting: str) -> None:
    """Do in a warm process what ``EVERSTEP_FAILPOINTS`` does at its start."""
    from everstep.proto import failpoint

    points = inspect.getclosurevars(failpoint.failpoint).nonlocals["points"]
    points.clear()
    for pair in filter(None, setting.split(";")):
        name, _, specification = pair.partition("=")
        points[name] = failpoint._Point(specification)


def end_with_parent() -> None:
    """Whatever becomes of the test run, nothing that it started outlives it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def enter(namespace: str) -> None:
    """Move to a network namespace, as `ip netns exec` does."""
    with open(f"/run/netns/{namespace}") as opened:
        library = ctypes.CDLL(None, use_errno=True)
        if library.setns(opened.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)


def child(kind: str, request: dict[str, Any], descriptors: list[int]) -> None:
    os.setsid()
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    log, *rest = descriptors
    null = os.open(os.devnull, os.O_RDONLY)
    piped = "command" in request and rest
    for source, target in zip((*rest, log) if piped else (null, log, log), (0, 1, 2), strict=True):
        os.dup2(source, target)
    for descriptor in (null, log, *(rest if piped else ())):
        os.close(descriptor)
    faulthandler.register(signal.SIGUSR1)
    if "command" in request:
        os.environ.clear()
    os.environ.update(request["environ"])
    if "netns" in request:
        enter(request["netns"])
    for target, value in request.get("constants", {}).items():
        module, _, name = target.rpartition(".")
        setattr(importlib.import_module(module), name, value)
    if "nofile" in request:
        resource.setrlimit(resource.RLIMIT_NOFILE, (request["nofile"], request["nofile"]))
    arm(request["failpoints"])
    if "command" in request:
        run_as_main(*request["command"])
    elif kind == "agent":
        # As `everstep agent` does, which first has to import what reads a command line.
        from everstep.agent.config import load
        from everstep.agent.daemon import run

        run(load(Path(request["config"]), request["options"]))
    else:
        trainer = runpy.run_path(request["script"])
        trainer["serve"](socket.socket(fileno=rest[0]), arm)


def run_as_main(first: str, *arguments: str) -> None:
    """As ``python`` does with these words."""
    if first == "-m":
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    kind, descriptor = sys.argv[1], int(sys.argv[2])
    if kind == "agent":
        importlib.import_module("everstep.agent.cli")
        importlib.import_module("everstep.agent.daemon")
    else:
        import torch
        import torch.utils.data

        for module in IMPORTED:
            importlib.import_module(module)
        torch.set_num_threads(1)
        # The first step of an optimizer imports half of torch.
        weight = torch.nn.Parameter(torch.zeros(4))
        weight.grad = torch.zeros(4)
        torch.optim.AdamW([weight]).step()
    control = socket.socket(fileno=descriptor)
    control.send(b"{}")
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 4)
        if not data:
            return
        request = json.loads(data)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            control.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            code = 1
            try:
                child(kind, request, descriptors)
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                # The normal end of a process: what waits for threads must be part of the test.
                import threading

                threading._shutdown()
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(json.dumps(pid).encode())


if __name__ == "__main__":
    main()
