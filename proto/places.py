"""Where an agent lives when nobody says otherwise: socket, memory, NVMe, log and lock.

Owns the default paths, so that client and agent find each other without being told, and the rule
for directories that hold training state: owned by one user, closed to all others. `default_places`
is a pure function of the environment it is given. Promises that with ``EVERSTEP_HOME`` set, no
other variable matters. Does not protect against whoever can write to a parent directory that has
no sticky bit, and does not create anything but the directories it is asked for.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from urllib.parse import quote, unquote

from everstep.proto.errors import InvalidConfiguration

SOCKET_PATH_MAX_BYTES = 107
"""``sun_path`` of unix(7) is 108 bytes, the last of them a zero."""

_SCHEME = "unix:"


@dataclass(frozen=True, slots=True)
class Places:
    """The paths of one agent of one user on one host."""

    socket: Path
    memory_dir: Path
    nvme_dir: Path
    log: Path
    lock: Path

    @property
    def address(self) -> str:
        """The socket as gRPC and ``EVERSTEP_AGENT`` spell it."""
        return format_address(self.socket)


def default_places(environ: Mapping[str, str], uid: int) -> Places:
    """Return the default paths of `uid`'s agent on this host.

    Args:
        environ: ``EVERSTEP_HOME``, or else ``XDG_RUNTIME_DIR``, ``XDG_STATE_HOME`` and ``HOME``.
        uid: The user who runs agent and trainers.

    Raises:
        InvalidConfiguration: If ``EVERSTEP_HOME`` is not an absolute path.
    """
    home = environ.get("EVERSTEP_HOME", "")
    return _places_in(_absolute_home(home), uid) if home else _places_of_user(environ, uid)


def _absolute_home(home: str) -> Path:
    if not os.path.isabs(home):
        # Client and agent may have different working directories, and "~" is the shell's.
        raise InvalidConfiguration(
            "EVERSTEP_HOME", f"{home!r} is not an absolute path; write it out in full"
        )
    return Path(os.path.normpath(home))


def _places_in(home: Path, uid: int) -> Places:
    # Not XDG_RUNTIME_DIR for a socket that is too long: Slurm, ssh and cron each set it
    # differently, and EVERSTEP_HOME alone must lead client and agent to the same socket.
    run = home / "run"
    return Places(
        socket=_fitting(run / "agent.sock", Path(f"/tmp/everstep-{uid}")),
        memory_dir=Path(f"/dev/shm/everstep-{uid}-{_short_hash(home)}"),
        nvme_dir=home / "nvme",
        log=home / "agent.log",
        lock=run / "agent.lock",
    )


def _places_of_user(environ: Mapping[str, str], uid: int) -> Places:
    temporary = Path(f"/tmp/everstep-{uid}")
    runtime_base = _absolute(environ, "XDG_RUNTIME_DIR")
    runtime = runtime_base / "everstep" if runtime_base else temporary
    state_base = _absolute(environ, "XDG_STATE_HOME")
    user_home = _absolute(environ, "HOME")
    if state_base is None and user_home is not None:
        state_base = user_home / ".local/state"
    # Containers often run as a user without a home; /var/tmp survives a reboot, /tmp may not.
    state = state_base / "everstep" if state_base else Path(f"/var/tmp/everstep-{uid}")
    return Places(
        socket=_fitting(runtime / "agent.sock", temporary),
        memory_dir=Path(f"/dev/shm/everstep-{uid}"),
        nvme_dir=state / "nvme",
        log=state / "agent.log",
        lock=runtime / "agent.lock",
    )


def _absolute(environ: Mapping[str, str], variable: str) -> Path | None:
    """The directory, or None if unset or relative: the XDG specification says to ignore those."""
    value = environ.get(variable, "")
    return Path(os.path.normpath(value)) if os.path.isabs(value) else None


def _short_hash(path: Path) -> str:
    return blake2b(os.fsencode(path), digest_size=4).hexdigest()


def _fitting(socket: Path, runtime: Path) -> Path:
    if fits_socket(socket) and fits_socket(private_socket(socket)):
        return socket
    return runtime / f"{_short_hash(socket)}.sock"


def fits_socket(path: Path) -> bool:
    """Whether the kernel accepts `path` as the address of a unix socket."""
    return len(os.fsencode(path)) <= SOCKET_PATH_MAX_BYTES


def private_socket(socket: Path) -> Path:
    """The gRPC server's own socket behind the door at `socket`, in a directory of its own.

    A directory of its own, because the public socket may lie in one that others can enter.
    """
    return socket.parent / "private" / socket.name


def offers_socket(socket: Path) -> Path:
    """Where the agent at `socket` takes offers; no longer than its private socket."""
    return socket.parent / "offers" / socket.name


def format_address(socket: Path) -> str:
    """Spell a socket's path the way gRPC parses it, percent-encoded where it must be."""
    return _SCHEME + quote(os.fsencode(socket))


def parse_address(address: str) -> Path:
    """Return the path that ``unix:/path`` or ``unix:///path`` names, percent-decoded.

    Raises:
        InvalidConfiguration: If it is of another form, relative, or longer than a socket may be.
    """
    path = address.removeprefix(_SCHEME)
    if path.startswith("///"):
        path = path[2:]
    if not address.startswith(_SCHEME) or not path.startswith("/") or path.startswith("//"):
        raise InvalidConfiguration(
            "agent address", f"{address!r} is not of the form unix:/absolute/path/agent.sock"
        )
    socket = Path(os.path.normpath(unquote(path, errors="surrogateescape")))
    if "\0" in str(socket) or not fits_socket(socket):
        raise InvalidConfiguration(
            "agent address",
            f"{address!r} is no socket path: at most {SOCKET_PATH_MAX_BYTES} bytes, none of "
            "them zero",
        )
    return socket


def private_directory(path: Path, uid: int) -> None:
    """Create `path` with mode 0700 if it is missing, and make sure that only `uid` can enter it.

    Parents that are missing are created the same way. An existing directory is never changed.

    Raises:
        InvalidConfiguration: If it cannot be created, belongs to someone else, is no directory,
            is a symbolic link, or lets group or others in.
    """
    missing = [path]
    while not missing[-1].parent.exists() and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    for directory in reversed(missing):
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise InvalidConfiguration(
                str(path),
                f"the directory cannot be created ({error.strerror}: {directory}); name another "
                "one, or set EVERSTEP_HOME to a directory that you own",
            ) from error
    problem = directory_problem(path, uid)
    if problem is not None:
        raise InvalidConfiguration(str(path), problem)


def directory_problem(path: Path, uid: int) -> str | None:
    """Return why `path` is not a directory private to `uid`, with the remedy, or None if it is.

    Looks without changing anything. A directory that is missing is a problem too.
    """
    try:
        # Opened rather than looked up by name, so that what is judged cannot be swapped between
        # the look at the link and the look at the directory.
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return _open_problem(path, error)
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if found.st_uid != uid:
        return (
            f"the directory belongs to user id {found.st_uid}, not to {uid}; remove it or name "
            "another one"
        )
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        return f"the directory is open to others (mode {mode:04o}); run `chmod 700 {path}`"
    return None


def _open_problem(path: Path, error: OSError) -> str:
    if path.is_symlink():
        return "it is a symbolic link, which someone could point elsewhere; name its target"
    if isinstance(error, NotADirectoryError):
        return "it is a file, not a directory; name another path"
    return f"the directory cannot be opened ({error.strerror})"
