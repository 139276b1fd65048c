"""One file as torch.save writes it, without the state in memory.

Owns the two passes: torch writes the file with room for the tensors' bytes (`skip_data`), and they
are written into it piece by piece, with the checksums that a zip file has of them. Promises that
the file loads with ``weights_only=True``, mapped or not, and passes any zip tool's test.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zipfile import BadZipFile, ZipFile

import torch

from everstep.client.exporting.decoding import Decoded
from everstep.client.exporting.replacing import (
    check_absent,
    partial_of,
    sync_directory,
    write_error,
)
from everstep.client.exporting.state import Exported
from everstep.proto.errors import Refused
from everstep.snapshot.consolidating import PieceReader
from everstep.snapshot.reshard import Tensor

_LOCAL = struct.Struct("<4s22xHH")
_LOCAL_MARK = b"PK\x03\x04"
_DESCRIPTOR_MARK = b"PK\x07\x08"
_CENTRAL = struct.Struct("<4s24xHHH12x")
_CENTRAL_MARK = b"PK\x01\x02"
_CENTRAL_CRC_AT = 16


class _Record(NamedTuple):
    """A storage in the file."""

    offset: int
    size: int
    central: int
    """Where the directory at the file's end has its entry."""


def write_torch(
    state: Exported, reader: PieceReader, output: Path, *, force: bool, sharded: bool = False
) -> None:
    """Write a state as torch.save does.

    Raises:
        Refused: If the output is there, or the state would not load. Nothing was written.
        ShardCorrupt: If a unit is damaged. Nothing is left behind.
        OutOfSpace: If it does not fit. Likewise.
        WriteFailed: If the device fails. Likewise.
    """
    assert not sharded
    if output.is_dir():
        raise Refused(f"{output} is a directory; name a file. Nothing was written.")
    partial = partial_of(output)
    try:
        with partial.open("xb") as file, torch.serialization.skip_data():
            torch.save(state.tree, file)
        _check_loadable(partial)
        with partial.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            _fill(file, partial, state, reader)
            file.flush()
            os.fsync(file.fileno())
        check_absent(output, force=force)
        partial.replace(output)
        sync_directory(output.parent)
    except (OSError, RuntimeError, BadZipFile) as error:
        raise write_error(output, state.nbytes, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_loadable(path: Path) -> None:
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # Whatever it is that torch's reader raises: the file must not be handed out.
        raise Refused(
            f"torch.load(weights_only=True) would refuse this state: {error} Nothing was written; "
            "--part leaves out the part it is in."
        ) from error


def _fill(file: BinaryIO, path: Path, state: Exported, reader: PieceReader) -> None:
    """Write the bytes of all storages into the room that torch has left for them."""
    records = _records(path)
    storages: dict[int, torch.Tensor] = {}
    for tensor in state.tensors:
        storages.setdefault(tensor.untyped_storage()._cdata, tensor)
    # torch numbers them in the order in which pickle comes to them.
    for number, tensor in enumerate(storages.values()):
        record = records.pop(str(number), None)
        if record is None or record.size != tensor.untyped_storage().nbytes():
            raise RuntimeError(f"torch has written other storages than number {number}")
        if record.size:
            _fill_one(file, record, _pieces(tensor, state, reader))
    if records:
        raise RuntimeError(f"torch has written {len(records)} storages more than there are")


def _pieces(tensor: torch.Tensor, state: Exported, reader: PieceReader) -> Iterator[memoryview]:
    source = state.placeholders.source(tensor)
    if isinstance(source, Decoded):
        yield from source.pieces(reader)
        return
    if isinstance(source, Tensor):
        yield from reader.pieces(source)
        return
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    yield whole.numpy().data


def _fill_one(file: BinaryIO, record: _Record, pieces: Iterator[memoryview]) -> None:
    crc, at = 0, record.offset
    file.seek(at)
    for piece in pieces:
        file.write(piece)
        crc = zlib.crc32(piece, crc)
        at += len(piece)
    if at != record.offset + record.size:
        raise RuntimeError(f"{at - record.offset} bytes for a storage of {record.size}")
    file.seek(at)
    mark = _at(file, at, len(_DESCRIPTOR_MARK))
    if mark == _DESCRIPTOR_MARK:
        _put(file, at + len(mark), crc)
    _put(file, record.central + _CENTRAL_CRC_AT, crc)


def _put(file: BinaryIO, offset: int, crc: int) -> None:
    file.seek(offset)
    file.write(crc.to_bytes(4, "little"))


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _records(path: Path) -> dict[str, _Record]:
    """The storages in a file that torch has written, by their keys."""
    found = {}
    with ZipFile(path) as archive, path.open("rb") as file:
        entry = archive.start_dir
        for info in archive.infolist():
            mark, *lengths = _CENTRAL.unpack(_at(file, entry, _CENTRAL.size))
            local, name, extra = _LOCAL.unpack(_at(file, info.header_offset, _LOCAL.size))
            if mark != _CENTRAL_MARK or local != _LOCAL_MARK:
                raise BadZipFile("torch has written another kind of zip file")
            *_, folder, key = ["", *info.filename.split("/")]
            if folder == "data":
                offset = info.header_offset + _LOCAL.size + name + extra
                found[key] = _Record(offset, info.file_size, entry)
            entry += _CENTRAL.size + sum(lengths)
    return found
