"""Reading and writing one safetensors file through a memory map.

numpy has neither bf16 nor fp8: their bits are carried as uint16 and uint8.

Format: 8 bytes little-endian length, a JSON header of that length, then the tensors without gaps
(huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 1024 * 1024
_ALIGNMENT = 64

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One entry of a header. `begin` and `end` are bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A checked, memory-mapped file: arrays are read-only views, pages come from disk when they are touched.

    Raises CheckpointError for anything but a complete, well-formed file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise CheckpointError(f"{path} is truncated: {size} bytes, a safetensors file has at least 8")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        self.metadata, self.records = _read_header(path, self._map, size)

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view; bf16 as uint16 bits, fp8 as uint8 bits."""
        record = self.records[name]
        if record.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} has dtype {record.dtype}; supported are {', '.join(DTYPES)}")
        dtype = DTYPES[record.dtype]
        count = (record.end - record.begin) // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, record.begin).reshape(record.shape)


def _read_header(path: Path, data: mmap.mmap, size: int) -> tuple[dict[str, str], dict[str, TensorRecord]]:
    def damaged(reason: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged or not safetensors: {reason}; fetch or export it again")

    (length,) = struct.unpack("<Q", data[:8])
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise damaged(f"its header claims {length} bytes of a file of {size}, limit {MAX_HEADER_BYTES}")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged(f"its header is a {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise damaged("__metadata__ is not an object")
    start = 8 + length
    records = {name: _read_record(name, entry, start, damaged) for name, entry in header.items()}
    position = start
    for record in sorted(records.values(), key=lambda item: (item.begin, item.end)):
        if record.begin != position:
            raise damaged(f"{record.name} starts at byte {record.begin}, expected {position}")
        position = record.end
    if position != size:
        kind = "is truncated" if position > size else "has bytes that belong to no tensor"
        raise CheckpointError(f"{path} {kind}: its header describes {position} bytes, the file has {size}")
    return metadata, records


def _read_record(name: str, entry: Any, start: int, damaged: Any) -> TensorRecord:
    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(f"entry {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    well_formed = isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)
    if not well_formed or len(offsets) != 2 or not all(map(whole, [*shape, *offsets])) or offsets[0] > offsets[1]:
        raise damaged(f"entry {name!r} is malformed")
    num_bytes = offsets[1] - offsets[0]
    if dtype in DTYPES:
        expected = DTYPES[dtype].itemsize
        for extent in shape:
            expected *= extent
        if num_bytes != expected:
            raise damaged(f"{name} has {num_bytes} bytes, {dtype} {shape} takes {expected}")
    return TensorRecord(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


class SafetensorsWriter:
    """Writes a file whose tensors are known by name, dtype and shape beforehand, piece by piece.

    The file appears under its name when `close` is called; `abandon` leaves nothing behind.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        position = 0
        # widest elements first: every tensor is then aligned to its element size
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -DTYPES[item[1][0]].itemsize):
            num_bytes = DTYPES[dtype].itemsize * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + num_bytes]}
            position += num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        start = 8 + len(text)
        with self._partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(start + position)
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, (dtype, shape) in tensors.items():
            offset = start + header[name]["data_offsets"][0]
            if 0 in shape:
                self._arrays[name] = np.empty(shape, DTYPES[dtype])
            else:
                self._arrays[name] = np.memmap(self._partial, DTYPES[dtype], "r+", offset, shape)

    def array(self, name: str) -> NDArray[Any]:
        """The place of a tensor in the file, to be filled."""
        return self._arrays[name]

    def close(self) -> None:
        """Flush everything and give the file its name."""
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        self._arrays.clear()
        os.replace(self._partial, self.path)

    def abandon(self) -> None:
        """Remove what was written."""
        self._arrays.clear()
        self._partial.unlink(missing_ok=True)
