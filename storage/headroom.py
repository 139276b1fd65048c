"""How much memory can still be taken without the kernel killing someone.

Owns the one number that a reservation is checked against: the smallest of what the machine has
available and what each enclosing memory cgroup has left. A tmpfs file is charged to the cgroup of
the process that allocates it, so a container's limit counts although the machine has room.
A snapshot in time: promises nothing about the next moment.
"""

from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory_bytes() -> int:
    """What can be allocated now, by the machine and by every enclosing cgroup."""
    return min([psutil.virtual_memory().available, *_cgroup_remainders()])


def _cgroup_remainders() -> list[int]:
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return []
    remainders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            remainders += _along(_CGROUPS, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            remainders += _along(
                _CGROUPS / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes"
            )
    return remainders


def _along(mount: Path, path: str, limit_name: str, usage_name: str) -> list[int]:
    """The remainders of a cgroup and of all above it."""
    remainders = []
    group = mount / path.lstrip("/")
    # Inside a container the path may be the host's, which the mount does not show.
    if not group.is_dir():
        group = mount
    while True:
        remainder = _remainder(group, limit_name, usage_name)
        if remainder is not None:
            remainders.append(remainder)
        if group == mount or mount not in group.parents:
            return remainders
        group = group.parent


def _remainder(group: Path, limit_name: str, usage_name: str) -> int | None:
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        statistics = (group / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    if not limit.isdigit():
        return None
    # Page cache is charged too but is given up under pressure. tmpfs pages are on the anonymous
    # lists, so these two do not count them.
    counters = dict(line.split(" ", 1) for line in statistics.splitlines())
    cache = int(counters.get("inactive_file", 0)) + int(counters.get("active_file", 0))
    return max(0, int(limit) - usage + cache)
