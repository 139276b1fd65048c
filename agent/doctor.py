"""Is this host fit for an agent with this configuration? One finding per question, with advice.

Owns the checks that `everstep doctor` shows. Promises to change nothing but one temporary file in
`nvme_dir`, which is removed, and to end within seconds. Does not format, does not talk to an agent,
and does not repair. "fail" means that the agent will not work or will not keep a promise, "warn"
that it will be slow or that a promise hangs on something outside its reach.
"""

import contextlib
import fcntl
import mmap
import os
import platform
import pwd
import re
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from everstep.agent.config import Config
from everstep.agent.options import MIB
from everstep.proto.places import SOCKET_PATH_MAX_BYTES, directory_problem
from everstep.storage.headroom import available_memory_bytes

Status = Literal["ok", "warn", "fail"]

GIB = 1 << 30
DOCKER_SHM_BYTES = 64 * MIB
_PROBE_LIMIT_S = 10.0
_SLOW_DISK_BYTES_PER_S = 200e6
_MEMLOCK_BYTES = GIB
_SPARE_FILES = 256
"""Descriptors of the agent besides its connections: arenas, shard files, libraries, logs."""
_EARLIEST_UNIX_S = 1_704_067_200  # 2024-01-01
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "gpfs", "beegfs", "9p"}
_PACKAGES = {
    "grpcio": (1, 84, 0),
    "protobuf": (7, 36, 2),
    "torch": (2, 8),
}
"""As in pyproject.toml; a test compares."""
_PYTHON = (3, 11)
_LOGIND = Path("/etc/systemd")
_REGULAR_UID = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question."""

    check: str
    """Short name of what was looked at, stable for scripts."""
    status: Status
    detail: str
    """What was found."""
    advice: str = ""
    """What to do; empty if all is well."""


def examine(config: Config, *, probe_disk_bytes: int = 256 * MIB) -> list[Finding]:
    """Look at the host through the eyes of an agent with `config`.

    Args:
        config: As the agent would load it.
        probe_disk_bytes: Written at most to measure the disk; 0 leaves the measurement out.
    """
    findings: list[Finding] = []
    for check in (_versions, _clock, _directories, _socket_length, _memory, _limits):
        findings += check(config)
    if config.agent.nvme_dir is None:
        detail = "switched off: snapshots do not survive power loss"
        return [*findings, Finding("nvme", "ok", detail)]
    return [*findings, *_disk(config, config.agent.nvme_dir, probe_disk_bytes)]


def _versions(_: Config) -> list[Finding]:
    found = tuple(int(part) for part in platform.python_version_tuple()[:2])
    python = Finding("version of python", "ok", platform.python_version())
    if found < _PYTHON:
        advice = f"use Python {_dotted(_PYTHON)} or newer"
        python = Finding("version of python", "fail", platform.python_version(), advice)
    try:
        everstep = Finding("version of everstep", "ok", metadata.version("everstep"))
    except metadata.PackageNotFoundError:
        everstep = Finding(
            "version of everstep", "warn", "not installed, runs from a checkout", "pip install it"
        )
    packages = [package_finding(name, least) for name, least in _PACKAGES.items()]
    return [python, everstep, *packages]


def package_finding(name: str, least: tuple[int, ...]) -> Finding:
    """Compare an installed distribution's version with `least`, without importing it."""
    check = f"version of {name}"
    # The agent never imports torch, and trainers may well have an environment of their own.
    bad: Status = "warn" if name == "torch" else "fail"
    advice = f"pip install '{name}>={_dotted(least)}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(check, bad, "not installed here", advice)
    release = re.match(r"\d+(?:\.\d+)*", version)
    if release is None or tuple(map(int, release[0].split("."))) < least:
        return Finding(check, bad, f"{version} is too old", advice)
    return Finding(check, "ok", version)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _clock(_: Config) -> list[Finding]:
    return [clock_finding(time.time(), time.monotonic_ns)]


def clock_finding(now_unix_s: float, monotonic_ns: Callable[[], int]) -> Finding:
    """Judge the date and whether the clock that all deadlines use advances."""
    date = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_unix_s))
    first = monotonic_ns()
    if not any(monotonic_ns() > first for _ in range(100_000)):
        return Finding("clock", "fail", "the monotonic clock stands still", "reboot this host")
    if now_unix_s < _EARLIEST_UNIX_S:
        advice = "set the date (timedatectl set-ntp true): snapshots are labelled with it"
        return Finding("clock", "warn", f"the date is wrong: {date}", advice)
    return Finding("clock", "ok", date)


def _directories(config: Config) -> list[Finding]:
    wanted = {
        "socket directory": config.private_socket.parent
        if config.agent.allowed_uids
        else config.agent.socket.parent,
        "memory directory": config.agent.memory_dir,
    }
    if config.agent.nvme_dir is not None:
        wanted["nvme directory"] = config.agent.nvme_dir
    return [directory_finding(check, path) for check, path in wanted.items()]


def directory_finding(check: str, path: Path) -> Finding:
    """Judge whether the agent can use or create `path` as a directory of its own."""
    if not os.path.lexists(path):
        nearest = _nearest_existing(path)
        if os.access(nearest, os.W_OK | os.X_OK):
            return Finding(check, "ok", f"{path} will be created in {nearest}")
        return Finding(
            check,
            "fail",
            f"{path} does not exist and {nearest} is not writable",
            f"create {path} with mode 0700 for user id {os.getuid()}, or name another one",
        )
    problem = directory_problem(path, os.getuid())
    if problem is None:
        return Finding(check, "ok", f"{path} is private to user id {os.getuid()}")
    what, _, advice = problem.partition("; ")
    return Finding(check, "fail", f"{path}: {what}", advice or "name another directory")


def _nearest_existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _socket_length(config: Config) -> list[Finding]:
    # What does not fit was refused when the configuration was read; here it is only shown.
    length = len(os.fsencode(config.private_socket))
    detail = (
        f"{config.agent.socket}, {length} of {SOCKET_PATH_MAX_BYTES} bytes with its private one"
    )
    return [Finding("socket path", "ok", detail)]


def _memory(config: Config) -> list[Finding]:
    path = config.agent.memory_dir
    kind = file_system_of(path, Path("/proc/self/mounts").read_text(errors="replace"))
    space = os.statvfs(_nearest_existing(path))
    keep_free_bytes = config.memory.keep_free_bytes
    return [
        tmpfs_finding(path, kind),
        shared_memory_finding(
            space.f_frsize * space.f_blocks, space.f_frsize * space.f_bavail, keep_free_bytes
        ),
        free_memory_finding(available_memory_bytes(), keep_free_bytes),
        _logout(path),
    ]


def file_system_of(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, by the text of /proc/self/mounts."""
    real = path.resolve()
    found, found_length = "unknown", -1
    for line in mounts.splitlines():
        _, point, kind, *_rest = line.split(" ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)
        # The last mount at a point hides those before it, hence "not shorter".
        if real.is_relative_to(point) and len(point) >= found_length:
            found, found_length = kind, len(point)
    return found


def tmpfs_finding(path: Path, kind: str) -> Finding:
    """Judge the file system type of the arenas' directory."""
    if kind in {"tmpfs", "ramfs"}:
        return Finding("memory file system", "ok", f"{path} is on {kind}")
    advice = "name a memory_dir on a tmpfs, such as /dev/shm: on a disk, captures wait for it"
    return Finding("memory file system", "warn", f"{path} is on {kind}, not on a tmpfs", advice)


def shared_memory_finding(total_bytes: int, free_bytes: int, keep_free_bytes: int) -> Finding:
    """Judge the size of the arenas' file system."""
    check = "memory file system size"
    detail = f"{free_bytes / GIB:,.2f} of {total_bytes / GIB:,.2f} GiB are free"
    if total_bytes <= DOCKER_SHM_BYTES:
        advice = (
            "this is a container's default: start it with --shm-size=64g or --ipc=host (Docker), "
            "or mount memory there (Kubernetes, see deploy/kubernetes)"
        )
        return Finding(check, "fail", detail, advice)
    if free_bytes <= keep_free_bytes:
        advice = (
            "free space there (`everstep gc`), enlarge it (mount -o remount,size=...), or lower "
            "memory.keep_free_bytes"
        )
        return Finding(check, "fail", f"{detail}, none beyond keep_free_bytes", advice)
    if free_bytes - keep_free_bytes < GIB:
        advice = "enough for small models only; enlarge it (mount -o remount,size=...)"
        return Finding(check, "warn", detail, advice)
    return Finding(check, "ok", detail)


def free_memory_finding(available_bytes: int, keep_free_bytes: int) -> Finding:
    """Judge what the machine and the memory cgroups leave."""
    detail = f"{available_bytes / GIB:,.2f} GiB can be taken, cgroup limits included"
    if available_bytes <= keep_free_bytes:
        advice = "end other processes, raise the container's memory limit, or use a larger host"
        return Finding("free memory", "fail", detail, advice)
    if available_bytes - keep_free_bytes < GIB:
        advice = "arenas count towards the memory limit of the container that fills them; raise it"
        return Finding("free memory", "warn", detail, advice)
    return Finding("free memory", "ok", detail)


def _logout(path: Path) -> Finding:
    lines: list[str] = []
    for file in [_LOGIND / "logind.conf", *sorted(_LOGIND.glob("logind.conf.d/*.conf"))]:
        with contextlib.suppress(OSError):
            lines += file.read_text(errors="replace").splitlines()
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    concerned = (
        path.is_relative_to("/dev/shm")
        and os.getuid() >= _REGULAR_UID
        and Path("/run/systemd/users").exists()
        and not Path("/var/lib/systemd/linger", user).exists()
    )
    return logout_finding(lines, user, concerned=concerned)


def logout_finding(logind_lines: list[str], user: str, *, concerned: bool) -> Finding:
    """Judge whether systemd-logind would delete the arenas when `user` logs out.

    Its RemoveIPC, on by default, empties /dev/shm of all that belongs to a regular user without
    lingering as soon as the last session ends, running jobs or not (logind.conf(5)).
    """
    settings = [line.partition("=")[2].strip() for line in logind_lines if _REMOVE_IPC.match(line)]
    if not concerned or (settings and settings[-1].lower() in {"no", "false", "0", "off", "n"}):
        return Finding("logout", "ok", "arenas stay when the user logs out")
    return Finding(
        "logout",
        "warn",
        "systemd-logind deletes the arenas when the user's last session on this host ends",
        f"run `loginctl enable-linger {user}`, or set RemoveIPC=no in /etc/systemd/logind.conf",
    )


_REMOVE_IPC = re.compile(r"\s*RemoveIPC\s*=")


def _limits(config: Config) -> list[Finding]:
    gpu = any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/infiniband"))
    needed = 2 * config.limits.max_connections + _SPARE_FILES
    return [
        memlock_finding(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], accelerated=gpu),
        open_files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE), needed),
    ]


def memlock_finding(soft_bytes: int, *, accelerated: bool) -> Finding:
    """Judge the limit on locked memory, which pinned arenas may count towards."""
    unlimited = soft_bytes == resource.RLIM_INFINITY
    detail = "unlimited" if unlimited else f"{soft_bytes / MIB:,.1f} MiB"
    if unlimited or soft_bytes >= _MEMLOCK_BYTES or not accelerated:
        return Finding("locked memory limit", "ok", detail)
    advice = (
        "raise it for trainers (ulimit -l unlimited, LimitMEMLOCK=infinity, --ulimit memlock=-1): "
        "with some drivers pinning an arena fails beyond it, and copies are slower unpinned"
    )
    return Finding("locked memory limit", "warn", detail, advice)


def open_files_finding(soft: int, hard: int, needed: int) -> Finding:
    """Judge the limit on open files against what all connections would take."""
    detail = f"{_limit(soft)}, up to {_limit(hard)} on request; {needed} may be needed"
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Finding("open files limit", "ok", detail)
    advice = (
        f"raise it to {needed} (ulimit -n, LimitNOFILE=), or lower limits.max_connections: beyond "
        "it, new trainers are turned away"
    )
    return Finding("open files limit", "warn", detail, advice)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _disk(config: Config, path: Path, probe_disk_bytes: int) -> list[Finding]:
    nearest = _nearest_existing(path)
    kind = file_system_of(path, Path("/proc/self/mounts").read_text(errors="replace"))
    space = os.statvfs(nearest)
    free_bytes = space.f_frsize * space.f_bavail
    memory = os.statvfs(_nearest_existing(config.agent.memory_dir))
    # If arenas filled memory_dir: that many bytes a step, for each kept step and one under way.
    step_bytes = memory.f_frsize * memory.f_blocks // config.memory.slots
    findings = [
        disk_kind_finding(path, kind),
        disk_space_finding(free_bytes, step_bytes * (config.nvme.keep_newest + 1)),
    ]
    probe_disk_bytes = min(probe_disk_bytes, free_bytes // 4)
    if probe_disk_bytes >= config.nvme.chunk_bytes:
        findings += _speed(nearest, probe_disk_bytes, config)
    return findings


def disk_kind_finding(path: Path, kind: str) -> Finding:
    """Judge the file system type of the durable level."""
    check = "nvme file system"
    if kind in {"tmpfs", "ramfs"}:
        advice = "name an nvme_dir on a disk: this one is memory and does not survive power loss"
        return Finding(check, "fail", f"{path} is on {kind}", advice)
    if kind in _NETWORK_FILE_SYSTEMS or kind.startswith("fuse."):
        advice = (
            "name an nvme_dir on a local disk: on a shared one, agents of two hosts would write "
            "into the same directory unless each has a path of its own"
        )
        return Finding(check, "warn", f"{path} is on {kind}", advice)
    return Finding(check, "ok", f"{path} is on {kind}")


def disk_space_finding(free_bytes: int, full_bytes: int) -> Finding:
    """Judge the free space of the durable level against `full_bytes`, the most it may need."""
    detail = f"{free_bytes / GIB:,.1f} GiB are free"
    if free_bytes < GIB:
        return Finding("nvme free space", "fail", detail, "free space there, or name a larger one")
    if free_bytes < full_bytes:
        return Finding(
            "nvme free space",
            "warn",
            f"{detail}; {full_bytes / GIB:,.1f} GiB if jobs fill memory_dir",
            "lower nvme.keep_newest or name a larger disk, if your snapshots are that large",
        )
    return Finding("nvme free space", "ok", detail)


def _speed(directory: Path, probe_bytes: int, config: Config) -> list[Finding]:
    try:
        measured = probe_disk(
            directory, probe_bytes, config.nvme.chunk_bytes, direct=config.nvme.direct
        )
    except OSError as error:
        advice = "see that the agent's user may write there and that the device is sound"
        return [Finding("nvme write speed", "fail", f"{directory}: {error}", advice)]
    findings = [speed_finding(measured)]
    if config.nvme.direct:
        findings.append(direct_finding(measured))
    return findings


@dataclass(frozen=True, slots=True)
class DiskProbe:
    """What one measured write to a disk showed."""

    bytes_per_s: float
    written_bytes: int
    direct: bool
    """Whether the file system took O_DIRECT."""


def probe_disk(directory: Path, total_bytes: int, chunk_bytes: int, *, direct: bool) -> DiskProbe:
    """Write a temporary file the way the durable level does, with fsync, and time it.

    Ends after `total_bytes` or a few seconds, whichever comes first. The file has no name while
    it is written, so that nothing stays behind even if this process is killed.

    Raises:
        OSError: If the file cannot be made or written.
    """
    descriptor, name = tempfile.mkstemp(prefix=".everstep-doctor-", dir=directory)
    try:
        direct = direct and _set_direct(descriptor)
    finally:
        os.unlink(name)
    # Page-aligned, as O_DIRECT needs, and random, since some devices compress.
    with mmap.mmap(-1, chunk_bytes) as chunk, os.fdopen(descriptor, "wb", buffering=0) as file:
        chunk.write(os.urandom(chunk_bytes))
        started_s = time.monotonic()
        written_bytes = 0
        with memoryview(chunk) as view:
            while written_bytes + chunk_bytes <= total_bytes:
                written_bytes += file.write(view)
                if time.monotonic() - started_s > _PROBE_LIMIT_S:
                    break
        os.fsync(file.fileno())
        elapsed_s = max(time.monotonic() - started_s, 1e-9)
    return DiskProbe(written_bytes / elapsed_s, written_bytes, direct)


def _set_direct(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


def speed_finding(measured: DiskProbe) -> Finding:
    """Judge the speed of durable writes."""
    detail = (
        f"{measured.bytes_per_s / 1e9:,.2f} GB/s, "
        f"{measured.written_bytes / MIB:,.0f} MiB {'direct' if measured.direct else 'buffered'}"
    )
    if measured.bytes_per_s < _SLOW_DISK_BYTES_PER_S:
        advice = "use a local NVMe disk, or a longer nvme.interval, so that flushes keep up"
        return Finding("nvme write speed", "warn", detail, advice)
    return Finding("nvme write speed", "ok", detail)


def direct_finding(measured: DiskProbe) -> Finding:
    """Judge whether the file system takes O_DIRECT."""
    if measured.direct:
        return Finding("nvme direct writes", "ok", "the file system takes O_DIRECT")
    advice = "use ext4 or xfs, or set nvme.direct = false; without it, flushes displace page cache"
    return Finding("nvme direct writes", "warn", "the file system refuses O_DIRECT", advice)
