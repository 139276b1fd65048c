"""The loader: finds the library through the package's path, and refuses what does not fit."""

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from everstep import kernels
from everstep.kernels import native


@pytest.mark.parametrize("newest", [0, 1])
def test_the_newest_library_wins(tmp_path: Path, newest: int) -> None:
    folders = [tmp_path / "site-packages", tmp_path / "checkout", tmp_path / "empty"]
    for age, folder in enumerate(folders):
        folder.mkdir()
        if age < 2:
            (folder / native.LIBRARY_NAME).touch()
            os.utime(folder / native.LIBRARY_NAME, (1000, 1000 + (age == newest)))
    assert native.find_library(map(str, folders)).parent == folders[newest]


def test_no_library_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"make kernels.*install Everstep") as caught:
        native.find_library([str(tmp_path)])
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_is_no_library_says_how_to_build_one(tmp_path: Path) -> None:
    path = tmp_path / native.LIBRARY_NAME
    path.write_bytes(b"not an ELF file")
    with pytest.raises(ImportError, match="make kernels"):
        native.load_library(path)


def test_a_library_of_another_abi_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A copy under another name, since the loader shares what this process has loaded already.
    path = tmp_path / "libcopy.so"
    shutil.copy(native.find_library(kernels.__path__), path)
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    with pytest.raises(ImportError, match=f"built for ABI {native.ABI - 1}.*needs {native.ABI}"):
        native.load_library(path)


def test_the_package_itself_loads_nothing_heavy() -> None:
    script = (
        "import sys, everstep.kernels; "
        "assert not {'numpy', 'ctypes', 'torch'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_an_address_is_taken_without_copying() -> None:
    writable = bytearray(b"abc")
    taken = native.Bytes(writable, writable=True)
    ctypes.memset(taken.address, ord("z"), 1)
    assert writable == b"zbc"
    assert taken.bytes == 3


@pytest.mark.parametrize("empty", [b"", bytearray(), memoryview(b"")])
def test_an_empty_buffer_has_no_address(empty: bytes) -> None:
    assert (native.Bytes(empty).address, native.Bytes(empty).bytes) == (0, 0)


def test_read_only_buffers_are_read_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"mapped")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert ctypes.string_at(native.Bytes(mapped).address, 6) == b"mapped"
    with pytest.raises(ValueError, match="read-only"):
        native.Bytes(mapped, writable=True)
