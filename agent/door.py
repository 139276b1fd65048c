"""The public unix socket: looks who knocks, and relays those who may enter to the gRPC server.

gRPC for Python cannot tell a unix peer's user id, so its server listens on a private socket in a
0700 directory, and this door stands before it. Promises that no byte of a refused peer reaches the
server, that refused peers hold one descriptor at any time, that a link buffers at most about half a
megabyte each way, that half-closed links stay open for the other half, and that an idle door costs
nothing. Does not know what it relays, and does not authenticate beyond the user id that the kernel
vouches for.
"""

import asyncio
import errno
import fcntl
import logging
import os
import socket as sockets
import stat
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from everstep.proto.errors import InvalidConfiguration
from everstep.proto.places import directory_problem

_log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("iII")
_BACKLOG = 128
_HIGH_WATER_BYTES = 256 << 10
"""asyncio reads up to as much again before it sees that the other side is full."""
_CONNECT_TIMEOUT_S = 5.0
_CLAIM_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 5.0
_RETRY_S = 0.01
_LOG_INTERVAL_S = 10.0


def peer_credentials(peer: sockets.socket) -> tuple[int, int]:
    """Pid and user id of who connected `peer`, or, at the connecting end, of who listens.

    The pid is 0 if that process lives in a pid namespace that this one cannot see.
    """
    raw = peer.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


class Door:
    """Listens at `public` and relays to `private`.

    Attributes:
        refused_count: Peers turned away since the start, for their uid or for lack of room.
    """

    def __init__(
        self,
        public: Path,
        private: Path,
        allowed_uids: frozenset[int],
        max_connections: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is touched before `start`.

        Args:
            public: Where peers connect. Its directory is the caller's choice.
            private: Where the gRPC server listens, in a directory of mode 0700.
            allowed_uids: Users who may enter besides this process's own and root.
            max_connections: Links at one time; each holds two file descriptors.
            clock: For the rate of log messages.
        """
        self._public = public
        self._private = private
        self._allowed_uids = allowed_uids | {os.getuid(), 0}
        self._max_connections = max_connections
        self._clock = clock
        self._server: asyncio.Server | None = None
        self._identity: tuple[int, int] | None = None
        self._links: set[_Link] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._entering_count = 0
        self._unlogged_count = 0
        self._last_logged_s: float | None = None
        self.refused_count = 0

    @property
    def open_count(self) -> int:
        """Links at this moment."""
        return len(self._links)

    async def start(self) -> None:
        """Open the door. A socket file that nobody listens on any more is replaced.

        Raises:
            InvalidConfiguration: If another agent listens there, the path cannot be a socket, or
                the private socket could be reached past this door.
        """
        problem = directory_problem(self._private.parent, os.getuid())
        if problem is not None:
            raise InvalidConfiguration(str(self._private.parent), problem)
        mode = 0o600 if self._allowed_uids <= {os.getuid(), 0} else 0o666
        async with _only_one(self._public.parent):
            listener = _listen(self._public, mode, self.lets_in)
        found = self._public.lstat()
        self._identity = (found.st_dev, found.st_ino)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: _Visitor(self), sock=listener, backlog=_BACKLOG
        )

    async def close(self) -> None:
        """Close the door and cut every link. Whoever wants calls to end in order stops gRPC first.

        Idempotent; bounded to a few seconds.
        """
        if self._server is None:
            return
        server, self._server = self._server, None
        self._remove_own_file()
        server.close()
        for link in list(self._links):
            link.abort()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._empty.wait()
                await server.wait_closed()
        except TimeoutError:
            _log.warning("%d links did not end with the door", len(self._links))

    def lets_in(self, peer: sockets.socket) -> bool:
        """Whether this peer may enter; one that may is expected by `admit`."""
        pid, uid = peer_credentials(peer)
        if uid not in self._allowed_uids:
            reason = f"user id {uid} is not in allowed_uids"
        elif len(self._links) + self._entering_count >= self._max_connections:
            reason = f"all {self._max_connections} connections are taken"
        else:
            self._entering_count += 1
            return True
        self._refused(pid, reason)
        return False

    def admit(self, visitor: "_Visitor", transport: asyncio.Transport) -> None:
        """Relay a peer that was let in."""
        self._entering_count -= 1
        if self._server is None:
            transport.abort()
            return
        transport.pause_reading()
        link = _Link(self, visitor)
        self._links.add(link)
        self._empty.clear()
        link.open(self._private)

    def left(self, link: "_Link") -> None:
        """Forget a link whose both ends are closed."""
        self._links.discard(link)
        if not self._links:
            self._empty.set()

    def _refused(self, pid: int, reason: str) -> None:
        self.refused_count += 1
        self._unlogged_count += 1
        now_s = self._clock()
        if self._last_logged_s is not None and now_s - self._last_logged_s < _LOG_INTERVAL_S:
            return
        _log.warning(
            "refused process %d at %s: %s (%d refused since the last message)",
            pid,
            self._public,
            reason,
            self._unlogged_count,
        )
        self._last_logged_s, self._unlogged_count = now_s, 0

    def _remove_own_file(self) -> None:
        try:
            found = self._public.lstat()
            # Whoever replaced our file in the meantime still needs theirs.
            if (found.st_dev, found.st_ino) == self._identity:
                self._public.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("%s stays behind: %s", self._public, error)


class _Listener(sockets.socket):
    """Turns peers away before asyncio sees them.

    It accepts all that wait at once, and closes those that it is told to abort some time later:
    until then their descriptors would be missing for records and flushes.
    """

    def __init__(self, lets_in: Callable[[sockets.socket], bool]) -> None:
        super().__init__(sockets.AF_UNIX, sockets.SOCK_STREAM)
        self._lets_in = lets_in

    def accept(self) -> tuple[sockets.socket, Any]:
        for _ in range(_BACKLOG):
            peer, address = super().accept()
            if self._lets_in(peer):
                return peer, address
            peer.close()
        raise BlockingIOError  # others have waited long enough


class _Side(asyncio.Protocol):
    """One end of a link: what arrives here leaves at `other`."""

    link: "_Link"
    other: "_Side"
    transport: asyncio.Transport | None = None
    ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.resume_reading()

    def eof_received(self) -> bool:
        self.ended = True
        if self.other.ended or self.other.transport is None:
            self.link.close()
            return False
        self.other.transport.write_eof()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self.link.lost()


class _Visitor(_Side):
    """The end towards a peer; knows no link before it is admitted."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._admitted = False

    def admitted(self, link: "_Link", other: _Side) -> None:
        self.link, self.other, self._admitted = link, other, True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self._door.admit(self, self.transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._admitted:
            super().connection_lost(error)


class _Link:
    """A peer and its own connection to the gRPC server. Ends when either side is lost."""

    def __init__(self, door: Door, visitor: _Visitor) -> None:
        self._door = door
        self._outer: _Side = visitor
        self._inner = _Side()
        self._inner.link, self._inner.other = self, visitor
        visitor.admitted(self, self._inner)
        self._opening: asyncio.Task[None] | None = None

    def open(self, private: Path) -> None:
        self._opening = asyncio.get_running_loop().create_task(self._open(private))
        # Not in the task itself, which runs none of its code if it is cancelled before it begins.
        self._opening.add_done_callback(self._opened)

    def _opened(self, _: "asyncio.Task[None]") -> None:
        self._opening = None
        self.lost()

    async def _open(self, private: Path) -> None:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                connected = await _connected(private)
            await asyncio.get_running_loop().create_unix_connection(
                lambda: self._inner, sock=connected
            )
        except OSError as error:
            _log.warning("the gRPC server at %s cannot be reached: %s", private, error)
            self.abort()
        else:
            if self._outer.transport is not None and self._inner.transport is not None:
                self._outer.transport.resume_reading()
            else:
                self.abort()

    def close(self) -> None:
        """End both sides after what is buffered for them is sent."""
        for side in (self._outer, self._inner):
            if side.transport is not None:
                side.transport.close()

    def abort(self) -> None:
        """End both sides at once."""
        if self._opening is not None:
            self._opening.cancel()
        for side in (self._outer, self._inner):
            if side.transport is not None:
                side.transport.abort()

    def lost(self) -> None:
        """Note that a side is gone: the other one follows."""
        if self._opening is not None:
            return
        if self._outer.transport is None and self._inner.transport is None:
            self._door.left(self)
        elif self._outer.transport is None or self._inner.transport is None:
            self.close()


async def _connected(private: Path) -> sockets.socket:
    """A non-blocking socket connected to `private`; the caller bounds the wait.

    Not left to asyncio, which takes EAGAIN, a full backlog, for a connection under way.
    """
    inner = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        inner.setblocking(False)
        while True:
            try:
                inner.connect(str(private))
                return inner
            except BlockingIOError:
                await asyncio.sleep(_RETRY_S)
    except BaseException:
        inner.close()
        raise


@asynccontextmanager
async def _only_one(directory: Path) -> AsyncIterator[None]:
    """Keep a second agent from replacing the socket between our look at it and our listening."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        problem = f"the socket's directory cannot be opened ({error.strerror}); create it first"
        raise InvalidConfiguration(str(directory), problem) from error
    try:
        deadline_s = time.monotonic() + _CLAIM_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline_s:
                    problem = "another process has held a lock on it for seconds; try again"
                    raise InvalidConfiguration(str(directory), problem) from error
                await asyncio.sleep(_RETRY_S)
        yield
    finally:
        os.close(descriptor)


def _listen(public: Path, mode: int, lets_in: Callable[[sockets.socket], bool]) -> sockets.socket:
    _remove_stale(public)
    listener = _Listener(lets_in)
    try:
        listener.bind(str(public))
        # Before listen, so that nobody ever connects under the mode that the umask gave.
        public.chmod(mode)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        problem = f"no socket can be made there ({error}); name another path"
        raise InvalidConfiguration(str(public), problem) from error
    return listener


def _remove_stale(public: Path) -> None:
    try:
        if not stat.S_ISSOCK(public.lstat().st_mode):
            problem = "there is a file there that is not a socket; remove it or name another path"
            raise InvalidConfiguration(str(public), problem)
    except FileNotFoundError:
        return
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(str(public))
        if code == errno.ECONNREFUSED:
            public.unlink(missing_ok=True)
            return
        if code == errno.ENOENT:
            return
        pid = peer_credentials(probe)[0] if code == 0 else 0
    if code not in {0, errno.EAGAIN}:
        problem = f"the socket there cannot be probed ({os.strerror(code)}); name another path"
        raise InvalidConfiguration(str(public), problem)
    who = f"process {pid}" if pid else "another process"
    raise InvalidConfiguration(
        str(public),
        f"another agent already runs there ({who}); use that one, stop it first, or name "
        "another socket",
    )
