"""Reads and writes the expert container: one file that holds a model, laid out for reading single experts.

    offset 0    preamble, 64 bytes: magic, version, where the header lies, file length, checksums
    16 KiB      non-expert tensors, each aligned to 64 bytes, read once into ordinary memory
    ...         expert records, each aligned to 16 KiB (the largest page in use: Raspberry Pi 5, Android 15), one for
                each expert and format, inside a record the matrices in the order in which they are consumed
    ...         the tokenizer (tokenizer.json), for the controller; a device never reads it
    at the end  header: JSON with the model's configuration, formats, and the table of all the above with a CRC-32 each

The header stands last so that a container is written in one pass. A container is written aside, synced and renamed:
a file under the final name is complete. Opening checks magic, version, lengths, bounds, overlap and the header's
checksum, and trusts nothing that it has not checked; reading an expert checks that expert's own checksum.

History of VERSION: 1 first; 2 packs quantised experts in the order of the native kernels.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import zlib
from types import TracebackType
from typing import Any, BinaryIO, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Type, Union

import numpy as np

from engine.dataclass import dataclass
from engine.errors import ContainerError
from engine.files import replacing
from engine.quantize import (
    FLOATS,
    PART_ALIGNMENT,
    Format,
    MatrixShape,
    Packed,
    RecordLayout,
    align,
    as_float32,
    int8_rows,
)

MAGIC = b"EDGEMOE\x00"
VERSION = 2
RECORD_ALIGNMENT = 16 << 10
MAX_HEADER_BYTES = 64 << 20
MAX_FILE_BYTES = 1 << 44

# magic, version, zero, header offset, header bytes, file bytes, header CRC-32, CRC-32 of the bytes before it
_PREAMBLE = struct.Struct("<8sIIQQQI")
_PREAMBLE_BYTES = 64

ExpertKey = Tuple[int, int]  # (MoE layer, expert)


# Of a matrix of the non-experts, where it is not kept in floats.
TENSOR_INT8 = Format("int8", group=32)


class Tensor(NamedTuple):
    """Describes a non-expert tensor in the file."""

    name: str
    precision: str  # fp32, fp16, bf16; or int8, packed as TENSOR_INT8
    shape: Tuple[int, ...]
    offset: int
    bytes: int
    crc32: int


class Record(NamedTuple):
    """Describes an expert in one format in the file."""

    layer: int
    expert: int
    format: int  # index into Container.formats
    offset: int
    bytes: int
    crc32: int

    @property
    def slot_bytes(self) -> int:
        """Returns the bytes with the padding up to the next record: what an aligned read transfers and a slab holds."""
        return align(self.bytes, RECORD_ALIGNMENT)


@dataclass(frozen=True)
class Container:
    """Holds an open container's header; `read_tensor` reads non-experts, engine.experts reads experts."""

    path: str
    architecture: str
    config: Dict[str, Any]
    formats: Tuple[Format, ...]
    layouts: Tuple[RecordLayout, ...]  # one a format
    tensors: Dict[str, Tensor]
    records: Tuple[Record, ...]
    primary: Dict[ExpertKey, Record]  # the first record of each expert
    origin: Dict[str, str]
    tokenizer: Optional[Tuple[int, int, int]]  # offset, bytes, CRC-32
    file_bytes: int

    @classmethod
    def open(cls, path: str) -> Container:
        """Opens a container. Raises ContainerError, which names the file, unless the container is sound."""
        try:
            with open(path, "rb") as file:
                return _read_header(path, file)
        except OSError as error:
            raise ContainerError(f"{path}: cannot be opened: {error.strerror or error}") from None
        except ContainerError as error:
            raise ContainerError(f"{path}: {error}; copy or import it again") from None

    def read_tensor(self, name: str) -> np.ndarray:
        """Returns a non-expert tensor in float32, checked."""
        stored = self.read_matrix(name)
        return int8_rows(stored) if isinstance(stored, Packed) else as_float32(stored)

    def read_matrix(self, name: str) -> Union[np.ndarray, Packed]:
        """Returns a non-expert tensor as it is stored, checked: float32, float16, uint16 for bf16, or packed."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ContainerError(f"{self.path}: tensor {name!r} is missing; import it again")
        raw = self.read_bytes(tensor)
        if tensor.precision in FLOATS:
            return raw.view(FLOATS[tensor.precision]).reshape(tensor.shape)
        return _int8_layout(tensor.shape).unpack(raw)[""]

    def read_bytes(self, tensor: Tensor) -> np.ndarray:
        """Returns a non-expert tensor as uint8, checked."""
        return self._read(tensor.offset, tensor.bytes, tensor.crc32, f"tensor {tensor.name!r}")

    def read_expert(self, record: Record) -> np.ndarray:
        """Returns a whole record as uint8, checked. For offline tools; the engine reads through experts.store."""
        return self._read(record.offset, record.bytes, record.crc32, f"layer {record.layer} expert {record.expert}")

    def tokenizer_json(self) -> Optional[bytes]:
        return None if self.tokenizer is None else self._read(*self.tokenizer, "the tokenizer").tobytes()

    def _read(self, offset: int, size: int, crc32: int, what: str) -> np.ndarray:
        data = np.empty(size, np.uint8)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(offset)
                view, done = data.data, 0
                while done < size:
                    got = file.readinto(view[done:])
                    if not got:
                        raise ContainerError(f"{self.path}: {what} is cut off; copy the container again")
                    done += got
        except OSError as error:
            raise ContainerError(f"{self.path}: {what} cannot be read: {error.strerror or error}") from None
        if zlib.crc32(data.data) != crc32:
            raise ContainerError(f"{self.path}: {what} is damaged (checksum); copy the container again")
        return data

    @property
    def moe_layers(self) -> int:
        return 1 + max(layer for layer, _ in self.primary)

    @property
    def experts_per_layer(self) -> int:
        return len(self.primary) // self.moe_layers

    @property
    def expert_bytes(self) -> int:
        """Returns the bytes of the records of all formats, padding included."""
        return sum(record.slot_bytes for record in self.records)

    @property
    def non_expert_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def largest_slot_bytes(self) -> int:
        return max(record.slot_bytes for record in self.records)


class ContainerWriter:
    """Writes a container in one pass. Nothing appears under `path` unless the `with` block ends without an error.

    Experts must all be added before the block ends, every layer with the same number of them, each in one or more
    of the formats; the first that it is written in is its primary one, which strategies use by default.
    """

    def __init__(
        self,
        path: str,
        *,
        architecture: str,
        config: Dict[str, Any],
        formats: Sequence[Format],
        tokenizer: Optional[bytes] = None,
        origin: Optional[Dict[str, str]] = None,
    ) -> None:
        if not formats or len(set(formats)) != len(formats):
            raise ContainerError("a container needs at least one format, each of them once")
        self.path = os.path.abspath(path)
        self._formats = tuple(formats)
        self._header: Dict[str, Any] = {
            "architecture": architecture,
            "config": config,
            "formats": [[f.precision, f.group, f.symmetric] for f in formats],
            "origin": dict(origin or {}),
        }
        self._tokenizer = tokenizer
        self._tensors: List[List[Any]] = []
        self._records: List[List[int]] = []
        self._matrices: Tuple[MatrixShape, ...] = ()
        self._layouts: Tuple[RecordLayout, ...] = ()
        self._file: Optional[BinaryIO] = None
        self._offset = 0

    def __enter__(self) -> ContainerWriter:
        self._aside = replacing(self.path)
        try:
            self._file = self._aside.__enter__()
        except OSError as error:
            raise ContainerError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._put(b"\0" * _PREAMBLE_BYTES)
        self._pad(RECORD_ALIGNMENT)
        return self

    def add_tensor(self, name: str, array: np.ndarray, *, dtype: Optional[str] = None) -> None:
        """Adds float32 or float16 as it is, bfloat16 as uint16 with dtype="bf16", or float32 packed with "int8"."""
        if dtype == "int8":
            try:
                self._put_tensor(name, dtype, array.shape, _int8_layout(array.shape).pack({"": array}).tobytes())
            except ContainerError as error:
                raise ContainerError(f"tensor {name!r}{error}") from None
            return
        precision = dtype or {np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16"}.get(array.dtype, "")
        if precision not in FLOATS or array.dtype.itemsize != FLOATS[precision].itemsize:
            raise ContainerError(f"tensor {name!r}: {array.dtype} cannot be stored")
        self._put_tensor(name, precision, array.shape, np.ascontiguousarray(array).view(FLOATS[precision]).tobytes())

    def copy_tensor(self, container: Container, name: str) -> None:
        """Copies a tensor as it is stored in the other container."""
        tensor = container.tensors[name]
        data = container.read_bytes(tensor)
        self._put_tensor(name, tensor.precision, tensor.shape, data.tobytes())

    def _put_tensor(self, name: str, precision: str, shape: Tuple[int, ...], data: bytes) -> None:
        self._pad(PART_ALIGNMENT)
        self._tensors.append([name, precision, list(shape), self._offset, len(data), zlib.crc32(data)])
        self._put(data)

    def add_expert(
        self, layer: int, expert: int, weights: Dict[str, np.ndarray], formats: Optional[Sequence[int]] = None
    ) -> None:
        """Adds float32 matrices (output channels, input channels) by name, in the order of consumption.

        `formats`: the numbers of those of the container's formats that this expert is written in; None for all.
        """
        shapes = tuple(MatrixShape(name, *weight.shape) for name, weight in weights.items())
        if not self._matrices:
            self._matrices = shapes
            self._layouts = tuple(RecordLayout.of(f, shapes) for f in self._formats)
        elif shapes != self._matrices:
            raise ContainerError(f"layer {layer} expert {expert}: {shapes} where {self._matrices} is expected")
        for index in range(len(self._layouts)) if formats is None else formats:
            try:
                record = self._layouts[index].pack(weights)
            except ContainerError as error:
                raise ContainerError(f"layer {layer} expert {expert}: {error}") from None
            self._pad(RECORD_ALIGNMENT)
            self._records.append([layer, expert, index, self._offset, record.nbytes, zlib.crc32(record.data)])
            self._put(record.tobytes())
            self._pad(RECORD_ALIGNMENT)

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if error is not None:
            self._aside.__exit__(kind, error, trace)
            return
        try:
            self._finish()
        except BaseException:
            self._aside.__exit__(*sys.exc_info())
            raise
        self._aside.__exit__(None, None, None)

    def _finish(self) -> None:
        assert self._file is not None
        if self._tokenizer is not None:
            self._header["tokenizer"] = [self._offset, len(self._tokenizer), zlib.crc32(self._tokenizer)]
            self._put(self._tokenizer)
        self._header["matrices"] = [list(shape) for shape in self._matrices]
        self._header["tensors"] = self._tensors
        self._header["records"] = self._records
        header = json.dumps(self._header, allow_nan=False, separators=(",", ":")).encode()
        start = self._offset
        self._put(header)
        fields = (MAGIC, VERSION, 0, start, len(header), self._offset, zlib.crc32(header))
        preamble = _PREAMBLE.pack(*fields)
        self._file.seek(0)
        self._file.write(preamble + struct.pack("<I", zlib.crc32(preamble)))
        self._file.flush()
        self._file.seek(0)
        _read_header(self.path, self._file)  # what could not be opened again is not left behind

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._offset += len(data)

    def _pad(self, alignment: int) -> None:
        self._put(b"\0" * (align(self._offset, alignment) - self._offset))


# --- reading the header: every number in it comes from a stranger ---------------------------------------------------


def _read_header(path: str, file: BinaryIO) -> Container:
    file_bytes = os.fstat(file.fileno()).st_size
    preamble = file.read(_PREAMBLE_BYTES)
    if preamble[: len(MAGIC)] != MAGIC:
        raise ContainerError("not an expert container (no magic)")
    if len(preamble) < _PREAMBLE_BYTES:
        raise ContainerError("cut off within its preamble")
    _, version, _, start, size, length, crc32 = _PREAMBLE.unpack_from(preamble)
    if version != VERSION:
        raise ContainerError(f"container version {version} where {VERSION} is read")
    (preamble_crc32,) = struct.unpack_from("<I", preamble, _PREAMBLE.size)
    if zlib.crc32(preamble[: _PREAMBLE.size]) != preamble_crc32 or any(preamble[_PREAMBLE.size + 4 :]):
        raise ContainerError("its preamble is damaged (checksum)")
    if length != file_bytes or not 0 < length <= MAX_FILE_BYTES:
        raise ContainerError(f"{file_bytes} bytes long where {length} were written")
    if size > MAX_HEADER_BYTES or start < _PREAMBLE_BYTES or start + size != length:
        raise ContainerError("its header lies outside the file")
    file.seek(start)
    text = file.read(size)
    if len(text) != size or zlib.crc32(text) != crc32:
        raise ContainerError("its header is damaged (checksum)")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"its header is not JSON: {error}") from None
    try:
        return _parse_header(path, header, start, length)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ContainerError(f"its header is malformed: {type(error).__name__}: {str(error)[:200]}") from None


def _parse_header(path: str, header: Any, end: int, file_bytes: int) -> Container:
    unknown = set(header) - {
        "architecture",
        "config",
        "formats",
        "origin",
        "tokenizer",
        "matrices",
        "tensors",
        "records",
    }
    if unknown:
        raise ContainerError(f"its header has the unknown key {sorted(unknown)[0][:40]!r}")
    if not isinstance(header["config"], dict) or not isinstance(header["architecture"], str):
        raise ContainerError("its header has no configuration")
    if not all(isinstance(v, str) for v in header["origin"].values()):
        raise ContainerError("its header's origin is not text")
    formats = tuple(Format(str(p), _natural(g, "group"), bool(s)) for p, g, s in header["formats"])
    matrices = tuple(
        MatrixShape(str(name), _natural(rows, "rows", 1), _natural(columns, "columns", 1))
        for name, rows, columns in header["matrices"]
    )
    if not matrices or not formats or len(matrices) > 16 or len(formats) > 64:
        raise ContainerError("its header has no matrices or no formats")
    if len({m.name for m in matrices}) != len(matrices) or any(m.rows * m.columns > 1 << 40 for m in matrices):
        raise ContainerError("its header's matrices are malformed")
    layouts = tuple(RecordLayout.of(f, matrices) for f in formats)

    spans: List[Tuple[int, int, str]] = []
    tensors = {}
    for name, precision, shape, offset, size, crc in header["tensors"]:
        tensor = Tensor(str(name), precision, tuple(_natural(d, name, 1) for d in shape), offset, size, _crc(crc))
        packed = precision == "int8" and len(shape) == 2
        if not (packed or precision in FLOATS) or len(shape) > 8 or tensor.name in tensors:
            raise ContainerError(f"tensor {tensor.name[:80]!r} is malformed or stands twice")
        expected = _int8_layout(tensor.shape).bytes if packed else math.prod(tensor.shape) * FLOATS[precision].itemsize
        if _natural(size, name) != expected:
            raise ContainerError(f"tensor {tensor.name[:80]!r}: its size and its shape disagree")
        spans.append(_span(offset, size, end, f"tensor {tensor.name[:80]!r}"))
        tensors[tensor.name] = tensor

    records: List[Record] = []
    primary: Dict[ExpertKey, Record] = {}
    seen: Set[Tuple[int, int, int]] = set()
    for layer, expert, fmt, offset, size, crc in header["records"]:
        record = Record(_natural(layer, "layer"), _natural(expert, "expert"), fmt, offset, size, _crc(crc))
        what = f"layer {layer} expert {expert}"
        if _natural(fmt, "format") >= len(formats) or (layer, expert, fmt) in seen:
            raise ContainerError(f"{what}: its format is unknown or stands twice")
        if _natural(size, "bytes") != layouts[fmt].bytes:
            raise ContainerError(f"{what}: its size and its shape disagree")
        if _natural(offset, "offset") % RECORD_ALIGNMENT:
            raise ContainerError(f"{what}: its record is not aligned to {RECORD_ALIGNMENT} bytes")
        spans.append(_span(offset, record.slot_bytes, end, what))
        seen.add((layer, expert, fmt))
        records.append(record)
        primary.setdefault((record.layer, record.expert), record)
    layers = 1 + max((layer for layer, _ in primary), default=-1)
    experts = 1 + max((expert for _, expert in primary), default=-1)
    if not primary or len(primary) != layers * experts:
        raise ContainerError(f"{len(primary)} experts where {layers} layers of {experts} are expected")

    tokenizer = header.get("tokenizer")
    if tokenizer is not None:
        offset, size, crc = tokenizer
        spans.append(_span(offset, size, end, "the tokenizer"))
        tokenizer = (offset, size, _crc(crc))
    spans.sort()
    for (_, first_end, first), (second_start, _, second) in zip(spans, spans[1:]):
        if second_start < first_end:
            raise ContainerError(f"{first} and {second} overlap")
    return Container(
        path, header["architecture"], header["config"], formats, layouts, tensors, tuple(records), primary,
        header["origin"], tokenizer, file_bytes,
    )  # fmt: skip


def _int8_layout(shape: Tuple[int, ...]) -> RecordLayout:
    rows, columns = shape
    return RecordLayout.of(TENSOR_INT8, [MatrixShape("", rows, columns)])


def _natural(value: Any, what: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= MAX_FILE_BYTES:
        raise ContainerError(f"{str(what)[:80]}: {str(value)[:40]!r} is not a number in range")
    return value


def _crc(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise ContainerError("a checksum is not a number in range")
    return value


def _span(offset: Any, size: Any, end: int, what: str) -> Tuple[int, int, str]:
    first, length = _natural(offset, what), _natural(size, what)
    if first < _PREAMBLE_BYTES or first + length > end:
        raise ContainerError(f"{what} lies outside the file")
    return first, first + length, what
