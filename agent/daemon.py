"""The agent as a process: puts the parts together, starts and ends them.

Owns the order of things: one agent for each socket (a lock file says so), adoption before the
first call is answered, and on SIGTERM or SIGINT a last flush within `shutdown_timeout_s`. Promises
that `torch` is never imported here. Ends with exit status 0 when it was asked to end.
"""

import asyncio
import contextlib
import fcntl
import functools
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc

from everstep.agent import events
from everstep.agent.adoption import adoptions
from everstep.agent.cluster import opened
from everstep.agent.config import Config
from everstep.agent.door import Door
from everstep.agent.offers import Offers
from everstep.agent.pipeline import Pipeline
from everstep.agent.recovery_service import serve_recovery
from everstep.agent.scrubbing import Scrubbing
from everstep.agent.server import Service
from everstep.agent.state import Rules, State
from everstep.agent.version import installed_version
from everstep.proto.agent_pb2_grpc import add_AgentServicer_to_server
from everstep.proto.errors import InvalidConfiguration
from everstep.proto.ids import SnapshotId
from everstep.proto.places import format_address, private_directory
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel
from everstep.storage.retention import Rule, expired

log = logging.getLogger("everstep.agent")
_GRACE_S = 1.0
_OWN_DESCRIPTORS = 64
"""Kept for arenas, records, shards and the log."""
_SWITCH_INTERVAL_S = 0.0005
"""A call takes the GIL a dozen times on its way; each time it waits this long for a thread that
flushes. By Python's own 5 ms a training thread waited 0.14 s for a slot (measured)."""
_LINK_DESCRIPTORS = 4
"""The door's two, the gRPC server's end of the second, and one for offers."""


def run(config: Config) -> None:
    """Run an agent in the foreground until it is told to end.

    Raises:
        InvalidConfiguration: If another agent owns the socket or a directory is unusable.
    """
    _log_to(config.agent.log_file, config.agent.log_level)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    private_directory(config.agent.memory_dir, os.getuid())
    if config.agent.nvme_dir is not None:
        private_directory(config.agent.nvme_dir, os.getuid())
    config.agent.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Two sockets must not share one directory of arenas or of shards either.
    roots = [config.agent.memory_dir, config.agent.nvme_dir]
    with contextlib.ExitStack() as held:
        for lock in (config.lock, *(root / ".lock" for root in roots if root is not None)):
            held.enter_context(_only_agent(lock))
        in_order = asyncio.run(_serve(config))
    if not in_order:
        # Python would wait for the threads of what hangs, for ever if need be.
        logging.shutdown()
        os._exit(0)


def _log_to(file: Path | None, level: str) -> None:
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=[logging.FileHandler(file) if file else logging.StreamHandler(sys.stderr)],
    )
    logging.getLogger("grpc._cython.cygrpc").addFilter(is_worth_telling)


def is_worth_telling(record: logging.LogRecord) -> bool:
    """Whether gRPC's own message is to be logged; one of them in fewer words.

    It logs an error with a traceback where a call ended while its answer was being sent. Nothing is
    wrong then: the caller did not wait any longer, and has gone on.
    """
    error = record.exc_info[1] if record.exc_info else None
    if type(error).__name__ != "ExecuteBatchError":
        return True
    record.msg, record.args = "an answer came too late for its caller: %s", (record.getMessage(),)
    record.exc_info = record.exc_text = None
    record.levelno, record.levelname = logging.INFO, "INFO"
    return logging.getLogger().isEnabledFor(logging.INFO)


@contextlib.contextmanager
def _only_agent(lock: Path) -> Iterator[None]:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        problem = f"no lock can be made there ({error.strerror}); name another directory"
        raise InvalidConfiguration(str(lock), problem) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise InvalidConfiguration(
            "socket", f"another agent holds {lock}; see it with `everstep status`"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def _build(config: Config) -> Pipeline:
    nvme = None
    if config.agent.nvme_dir is not None:
        nvme = NvmeLevel(
            config.agent.nvme_dir,
            write_threads=config.nvme.write_threads,
            chunk_bytes=config.nvme.chunk_bytes,
            direct=config.nvme.direct,
        )
    memory = MemoryLevel(config.agent.memory_dir, keep_free_bytes=config.memory.keep_free_bytes)
    rule = Rule(config.nvme.keep_newest, config.nvme.keep_every_steps or None)

    def no_longer_kept(snapshots: list[SnapshotId]) -> list[tuple[SnapshotId, str]]:
        return expired(snapshots, rule, set())

    rules = Rules(
        max_jobs=config.agent.max_jobs,
        max_ranks=config.limits.max_ranks,
        nvme=nvme is not None,
        nvme_interval_steps=config.nvme.interval.every_steps or None,
        nvme_interval_s=config.nvme.interval.every_s or None,
        flush_on_exit=config.nvme.flush_on_exit,
        node_id=config.agent.node_id,
        clustered=config.cluster.configured,
    )
    return Pipeline(config, State(rules, no_longer_kept), memory, nvme)


def _connection_limit(wanted: int) -> int:
    """How many links the descriptor table has room for, beside the agent's own work."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        limit = most
    if limit == resource.RLIM_INFINITY:
        return wanted
    room = max(1, (limit - _OWN_DESCRIPTORS) // _LINK_DESCRIPTORS)
    if room < wanted:
        log.warning("RLIMIT_NOFILE of %d leaves room for %d connections only", limit, room)
    return min(wanted, room)


def _adopted(pipeline: Pipeline) -> list[events.Adopt]:
    stores = (pipeline.memory, pipeline.nvme, pipeline.parity, pipeline.staging)
    return list(adoptions(*stores))


async def _serve(config: Config) -> bool:
    """Serve until told to end; say whether everything under way came to its end."""
    pipeline = _build(config)
    cluster, peer_server = None, None
    if config.cluster.configured:
        cluster, peer_server = await opened(config, pipeline)
    for adopted in await asyncio.to_thread(functools.partial(_adopted, pipeline)):
        pipeline.submit(adopted)
    limit = config.limits.max_message_bytes
    server = grpc.aio.server(
        maximum_concurrent_rpcs=config.limits.max_concurrent_calls,
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
        ],
    )
    service = Service(config, pipeline, installed_version(), cluster)
    add_AgentServicer_to_server(service, server)
    serve_recovery(server, pipeline, cluster)
    private_directory(config.private_socket.parent, os.getuid())
    config.private_socket.unlink(missing_ok=True)
    server.add_insecure_port(format_address(config.private_socket))
    max_connections = _connection_limit(config.limits.max_connections)
    door = Door(
        config.agent.socket, config.private_socket, config.agent.allowed_uids, max_connections
    )
    offers = Offers(config.offers_socket, max_connections, service.offer)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    alone = contextlib.AsyncExitStack()
    if cluster is not None and peer_server is not None:
        await peer_server.start()
        await cluster.start()
    else:
        await alone.enter_async_context(_scrubbing(pipeline))
    await server.start()
    offers.start()
    await door.start()
    # What was made so far lives as long as the process.
    gc.collect()
    gc.freeze()
    log.info("agent %s answers at %s", config.agent.node_id, config.agent.socket)
    await ended.wait()
    await alone.aclose()
    offers.close()
    in_order = await _end(config, pipeline, door, server)
    if cluster is not None and peer_server is not None:
        await cluster.close()
        await peer_server.stop(_GRACE_S)
    # Last: until now others could give this agent something to do.
    pipeline.close()
    return in_order


@contextlib.asynccontextmanager
async def _scrubbing(pipeline: Pipeline) -> AsyncIterator[None]:
    """Look for bit rot where there is nobody to mend it from: it is reported."""
    scrubbing = Scrubbing(pipeline, None)
    task = asyncio.get_running_loop().create_task(scrubbing.run())
    try:
        yield
    finally:
        task.cancel()
        scrubbing.close()


async def _end(config: Config, pipeline: Pipeline, door: Door, server: grpc.aio.Server) -> bool:
    log.info("ending; memory stays where it is and is adopted by the next agent")
    if config.nvme.flush_on_sigterm:
        for name in pipeline.state.jobs:
            pipeline.submit(events.PersistWanted(name))
    in_order = await pipeline.idle(config.agent.shutdown_timeout_s)
    if not in_order:
        log.error("the last flush did not end within shutdown_timeout_s; NVMe is as before it")
    await door.close()
    await server.stop(_GRACE_S)
    return in_order
