"""The doctor's judgements at their edges, and one real examination that leaves nothing behind."""

import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from everstep.agent import doctor
from everstep.agent.config import load
from everstep.agent.doctor import GIB, DiskProbe, Finding
from everstep.agent.options import MIB

NO_LIMIT = resource.RLIM_INFINITY


def test_an_examination_changes_nothing_and_answers_every_question(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    config = load(None, {"nvme.chunk_bytes": "1 MiB"}, {"EVERSTEP_HOME": str(home)})
    findings = doctor.examine(config, probe_disk_bytes=4 * MIB)
    assert list(home.rglob("*")) == []
    assert not config.agent.memory_dir.exists()
    checks = [finding.check for finding in findings]
    assert len(set(checks)) == len(checks)
    assert {
        "clock",
        "socket directory",
        "socket path",
        "memory directory",
        "memory file system",
        "memory file system size",
        "free memory",
        "logout",
        "locked memory limit",
        "open files limit",
        "nvme directory",
        "nvme file system",
        "nvme free space",
        "nvme write speed",
        "nvme direct writes",
    } <= set(checks)
    for finding in findings:
        assert finding.detail
        assert bool(finding.advice) == (finding.status != "ok"), finding


def test_without_a_disk_nothing_is_written(tmp_path: Path) -> None:
    config = load(None, {"agent.nvme_dir": ""}, {"EVERSTEP_HOME": str(tmp_path)})
    checks = {finding.check for finding in doctor.examine(config)}
    assert "nvme" in checks
    assert "nvme write speed" not in checks


def test_the_doctor_does_not_import_torch() -> None:
    program = (
        "import sys; from everstep.agent import config, doctor, door; "
        "doctor.examine(config.load(None, {'agent.nvme_dir': ''}, {})); "
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=60, env=environment)


def test_versions_agree_with_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    required = dict(re.split(">=", line) for line in project["dependencies"] if ">=" in line)
    for name, least in doctor._PACKAGES.items():
        assert required[name] == ".".join(map(str, least))
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor._PYTHON))


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.8.0", "ok"), ("2.13.0+cpu", "ok"), ("2.7.9", "fail"), ("3.0a1", "ok"), ("odd", "fail")],
)
def test_package_versions(version: str, status: str, tmp_path: Path) -> None:
    info = tmp_path / "oddity-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: oddity\nVersion: {version}\n")
    sys.path.insert(0, str(tmp_path))
    try:
        assert doctor.package_finding("oddity", (2, 8)).status == status
    finally:
        sys.path.remove(str(tmp_path))


def test_missing_packages() -> None:
    found = doctor.package_finding("everstep-no-such-package", (1, 2))
    assert (found.status, found.advice) == ("fail", "pip install 'everstep-no-such-package>=1.2'")


def test_clocks() -> None:
    ticks = iter(range(10))
    assert doctor.clock_finding(1_800_000_000.0, lambda: next(ticks)).status == "ok"
    ticks = iter(range(10))
    assert doctor.clock_finding(0.0, lambda: next(ticks)).status == "warn"
    assert doctor.clock_finding(1_800_000_000.0, lambda: 7).status == "fail"


def test_directories(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    opened = tmp_path / "open"
    opened.mkdir()
    opened.chmod(0o755)
    assert doctor.directory_finding("x", private).status == "ok"
    assert doctor.directory_finding("x", private / "new/below").status == "ok"
    found = doctor.directory_finding("x", opened)
    assert found.status == "fail"
    assert found.advice == f"run `chmod 700 {opened}`"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert doctor.directory_finding("x", tmp_path / "dangling").status == "fail"


MOUNTS = """\
overlay / overlay rw 0 0
tmpfs /dev/shm tmpfs rw,size=65536k 0 0
/dev/sda1 /data ext4 rw 0 0
tmpfs /data ext4 rw 0 0
server:/x /data/my\\040disk nfs4 rw 0 0
/dev/sdb1 /dat xfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/dev/shm/everstep-7", "tmpfs"),
        ("/dev/shmem", "overlay"),
        ("/data/x", "ext4"),
        ("/data/my disk/y", "nfs4"),
        ("/dat", "xfs"),
        ("/", "overlay"),
    ],
)
def test_file_systems(path: str, kind: str) -> None:
    assert doctor.file_system_of(Path(path), MOUNTS) == kind


def test_the_last_mount_hides_the_first() -> None:
    assert doctor.file_system_of(Path("/a"), "x /a ext4 rw 0 0\ny /a xfs rw 0 0\n") == "xfs"
    assert doctor.file_system_of(Path("/a"), "") == "unknown"


def status(finding: Finding) -> str:
    assert bool(finding.advice) == (finding.status != "ok")
    return finding.status


def test_memory() -> None:
    keep = 512 * MIB
    docker = doctor.shared_memory_finding(64 * MIB, 64 * MIB, 0)
    assert status(docker) == "fail"
    assert "--shm-size" in docker.advice
    assert status(doctor.shared_memory_finding(8 * GIB, keep, keep)) == "fail"
    assert status(doctor.shared_memory_finding(8 * GIB, keep + GIB - 1, keep)) == "warn"
    assert status(doctor.shared_memory_finding(8 * GIB, keep + GIB, keep)) == "ok"
    assert status(doctor.free_memory_finding(keep, keep)) == "fail"
    assert status(doctor.free_memory_finding(keep + GIB - 1, keep)) == "warn"
    assert status(doctor.free_memory_finding(keep + GIB, keep)) == "ok"
    assert status(doctor.tmpfs_finding(Path("/x"), "tmpfs")) == "ok"
    assert status(doctor.tmpfs_finding(Path("/x"), "ext4")) == "warn"


@pytest.mark.parametrize(
    ("lines", "concerned", "expected"),
    [
        ([], True, "warn"),
        ([], False, "ok"),
        (["#RemoveIPC=no"], True, "warn"),
        (["RemoveIPC=no"], True, "ok"),
        (["RemoveIPC=no", "RemoveIPC = yes"], True, "warn"),
        (["RemoveIPC=yes", "RemoveIPC = off"], True, "ok"),
    ],
)
def test_logging_out(lines: list[str], concerned: bool, expected: str) -> None:
    assert status(doctor.logout_finding(lines, "ada", concerned=concerned)) == expected


def test_limits() -> None:
    assert status(doctor.memlock_finding(8 * MIB, accelerated=True)) == "warn"
    assert status(doctor.memlock_finding(8 * MIB, accelerated=False)) == "ok"
    assert status(doctor.memlock_finding(NO_LIMIT, accelerated=True)) == "ok"
    assert status(doctor.open_files_finding(1024, 4096, 768)) == "ok"
    assert status(doctor.open_files_finding(768, 768, 768)) == "ok"
    assert status(doctor.open_files_finding(767, 4096, 768)) == "warn"
    assert status(doctor.open_files_finding(NO_LIMIT, NO_LIMIT, 768)) == "ok"


def test_disks() -> None:
    path = Path("/x")
    assert status(doctor.disk_kind_finding(path, "ext4")) == "ok"
    assert status(doctor.disk_kind_finding(path, "tmpfs")) == "fail"
    for kind in ("nfs4", "lustre", "fuse.s3fs"):
        assert status(doctor.disk_kind_finding(path, kind)) == "warn"
    assert status(doctor.disk_space_finding(GIB - 1, 0)) == "fail"
    assert status(doctor.disk_space_finding(10 * GIB, 10 * GIB + 1)) == "warn"
    assert status(doctor.disk_space_finding(10 * GIB, 10 * GIB)) == "ok"
    assert status(doctor.speed_finding(DiskProbe(199e6, MIB, True))) == "warn"
    assert status(doctor.speed_finding(DiskProbe(2e9, MIB, True))) == "ok"
    assert status(doctor.direct_finding(DiskProbe(2e9, MIB, False))) == "warn"
    assert status(doctor.direct_finding(DiskProbe(2e9, MIB, True))) == "ok"


@pytest.mark.parametrize("direct", [True, False])
def test_the_probe_writes_within_its_bounds_and_leaves_nothing(
    direct: bool, tmp_path: Path
) -> None:
    measured = doctor.probe_disk(tmp_path, 5 * MIB + 1, 2 * MIB, direct=direct)
    assert measured.written_bytes == 4 * MIB
    assert measured.bytes_per_s > 0
    assert direct or not measured.direct
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_cannot_write_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            doctor.probe_disk(tmp_path, 4 * MIB, 2 * MIB, direct=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        doctor.probe_disk(tmp_path / "missing", 4 * MIB, 2 * MIB, direct=False)
