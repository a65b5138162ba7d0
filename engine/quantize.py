"""Stores expert weights in a few bits: formats, packing and scales.

A weight matrix W has `rows` output channels and `columns` input channels. Its columns are cut into groups; each
(group, row) has one FP16 scale and, in asymmetric formats, one FP16 offset:

    W[row, column] = scale[group, row] * (code - centre) + offset[group, row]        centre = 2 ** (bits - 1)

Symmetric formats have no offset and scale by the absolute maximum, as EdgeMoE does (section 3.1 of the paper);
asymmetric ones spread the codes from the group's minimum to its maximum, which matters most at two bits.
Codes are rounded with the scale as stored, so that rounding the scale to FP16 costs no accuracy.

Packing is in the order in which engine/kernels/native.c consumes it: blocks of 32 rows, in them the groups, in them
words of 32 bits, of which the block's rows have one each, side by side: (blocks, groups, words of a row, 32). The low
half of a word holds even columns and the high half odd ones, so that one shift and one mask give the pairs of
neighbouring columns that processors multiply and add at once. With fields of b bits, bits `16 * h + b * f` and up of
word w hold column `w * 32 / b + 2 * f + h` of the group, h 0 or 1:

    int8   4 columns a word, signed bytes          int4   8 columns a word
    int2   16 columns a word                       int3   its low two bits as int2, and a plane of the high bits,
                                                          32 columns a word

Rows are padded to 32, the last group's columns to a whole one.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from engine.dataclass import dataclass
from engine.errors import ContainerError

FLOATS: Dict[str, np.dtype] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
LOW_BITS = {"int8": 8, "int4": 4, "int3": 2, "int2": 2}  # of a code in `codes`; int3 keeps its high bit apart
PRECISIONS = (*FLOATS, *BITS)
GROUPS = (0, 32, 64)  # columns that share a scale; 0: all of them, that is one scale per output channel
BLOCK = 32  # rows that lie side by side
PART_ALIGNMENT = 64  # bytes, of every array in a record: a cache line, and the widest vector register


@dataclass(frozen=True)
class Format:
    """Says how an expert's weights are stored."""

    precision: str
    group: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ContainerError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.group not in GROUPS:
            raise ContainerError(f"group {self.group!r} is not one of {', '.join(map(str, GROUPS))}")
        if self.precision in FLOATS and (self.group, self.symmetric) != (0, True):
            raise ContainerError(f"{self.precision} has neither groups nor zero points")

    @property
    def label(self) -> str:
        """Returns a name for people: fp16, int4-channel, int4-g32, int2-g32-zero (with a zero point)."""
        if self.precision in FLOATS:
            return self.precision
        return f"{self.precision}-{f'g{self.group}' if self.group else 'channel'}{'' if self.symmetric else '-zero'}"


class Packed(NamedTuple):
    """Holds one matrix as stored, or expanded: views into a record or a slab, nothing copied."""

    format: Format
    rows: int
    columns: int
    codes: np.ndarray  # dense: (columns, rows) floats; else (blocks, groups, words, BLOCK) uint32
    high: Optional[np.ndarray]  # int3 only: the plane of high bits (blocks, groups, words, BLOCK) uint32
    scales: Optional[np.ndarray]  # (blocks, groups, BLOCK) float16
    offsets: Optional[np.ndarray]  # (blocks, groups, BLOCK) float16, asymmetric only
    # Everything is float32, codes are (groups, group, padded rows), scales and offsets (groups, padded rows).
    expanded: bool = False


class Expert(Dict[str, Packed]):
    """Holds the matrices of an expert by name, and what kernels make of their addresses once."""

    __slots__ = ("prepared",)

    def __init__(self, matrices: Dict[str, Packed]) -> None:
        super().__init__(matrices)
        self.prepared: Any = None


class RecordPart(NamedTuple):
    """Describes one array in a record."""

    name: str  # of the field of Packed
    dtype: np.dtype
    shape: Tuple[int, ...]
    offset: int  # from the start of the record


class MatrixShape(NamedTuple):
    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class RecordLayout:
    """Places the arrays of an expert in its record; follows from the format and the shapes alone."""

    format: Format
    matrices: Tuple[MatrixShape, ...]  # in the order in which the arithmetic consumes them
    parts: Tuple[Tuple[RecordPart, ...], ...]
    bytes: int
    is_expanded: bool = False

    @classmethod
    def of(cls, fmt: Format, matrices: Sequence[MatrixShape], *, is_expanded: bool = False) -> RecordLayout:
        offset, all_parts = 0, []
        for shape in matrices:
            parts = []
            for name, dtype, dims in _expanded_parts(fmt, shape) if is_expanded else _parts(fmt, shape):
                parts.append(RecordPart(name, dtype, dims, offset))
                offset = align(offset + dtype.itemsize * math.prod(dims), PART_ALIGNMENT)
            all_parts.append(tuple(parts))
        return cls(fmt, tuple(matrices), tuple(all_parts), offset, is_expanded)

    def expanded(self) -> RecordLayout:
        """Returns the layout in memory with every code, scale and offset a float32; engine.kernels fills it.

        The scales stay beside the codes instead of multiplied into them, so that a product with the expanded expert
        does the same arithmetic as one with the record, and gives the same bits.
        """
        return RecordLayout.of(self.format, self.matrices, is_expanded=True)

    def unpack(self, record: np.ndarray) -> Expert:
        """Returns the matrices of a record (uint8, at least `bytes` long) as views."""
        result = {}
        for shape, parts in zip(self.matrices, self.parts):
            arrays: Dict[str, np.ndarray] = {}
            for part in parts:
                size = part.dtype.itemsize * math.prod(part.shape)
                arrays[part.name] = record[part.offset : part.offset + size].view(part.dtype).reshape(part.shape)
            result[shape.name] = Packed(
                self.format, shape.rows, shape.columns,
                arrays["codes"], arrays.get("high"), arrays.get("scales"), arrays.get("offsets"), self.is_expanded,
            )  # fmt: skip
        return Expert(result)

    def pack(self, weights: Dict[str, np.ndarray]) -> np.ndarray:
        """Returns a record (uint8, `bytes` long) of float32 matrices (rows, columns) by name."""
        assert not self.is_expanded  # which is no form of storage
        record = np.zeros(self.bytes, np.uint8)
        views = self.unpack(record)
        for shape in self.matrices:
            weight = weights[shape.name]
            if weight.shape != (shape.rows, shape.columns):
                raise ContainerError(
                    f"{shape.name}: shape {weight.shape} where {(shape.rows, shape.columns)} is expected"
                )
            _quantise(np.asarray(weight, np.float32), views[shape.name], shape.name)
        return record


def align(value: int, to: int) -> int:
    return -(-value // to) * to


def group_size(fmt: Format, columns: int) -> int:
    """Returns the columns of one group, padding included: a multiple of 32, so that every packing comes out even."""
    return fmt.group or align(columns, 32)


def bf16_from_float32(values: np.ndarray) -> np.ndarray:
    """Rounds to nearest even; returns the upper halves as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_float32(stored: np.ndarray) -> np.ndarray:
    """Returns an array in a float format, bf16 as uint16, in float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def holds_numbers(packed: Packed) -> bool:
    """Tells whether no stored weight, scale or offset is infinite or NaN."""
    floats = [packed.codes] if packed.format.precision in FLOATS else [packed.scales, packed.offsets]
    return all(np.isfinite(as_float32(array)).all() for array in floats if array is not None)


def int8_rows(packed: Packed, numbers: Optional[np.ndarray] = None) -> np.ndarray:
    """Returns rows (n,) int of an INT8 matrix, or all of them, as (n, columns) float32."""
    assert packed.format.precision == "int8" and packed.scales is not None
    block, row = np.divmod(np.arange(packed.rows) if numbers is None else numbers, BLOCK)
    words = np.ascontiguousarray(packed.codes[block, :, :, row])  # (n, groups, words)
    values = words.view(np.int8).reshape(*words.shape, 4)[..., [0, 2, 1, 3]].astype(np.float32)
    values = values.reshape(*words.shape[:2], -1) * packed.scales[block, :, row].astype(np.float32)[..., None]
    if packed.offsets is not None:
        values += packed.offsets[block, :, row].astype(np.float32)[..., None]
    return values.reshape(len(words), -1)[:, : packed.columns]


def _parts(fmt: Format, shape: MatrixShape) -> List[Tuple[str, np.dtype, Tuple[int, ...]]]:
    rows, columns = shape.rows, shape.columns
    if fmt.precision in FLOATS:
        return [("codes", FLOATS[fmt.precision], (columns, rows))]
    size = group_size(fmt, columns)
    groups = -(-columns // size)
    blocks, low_bits = -(-rows // BLOCK), LOW_BITS[fmt.precision]
    word, half = np.dtype("<u4"), np.dtype("<f2")
    parts: List[Tuple[str, np.dtype, Tuple[int, ...]]] = [
        ("codes", word, (blocks, groups, size * low_bits // 32, BLOCK))
    ]
    if fmt.precision == "int3":
        parts.append(("high", word, (blocks, groups, size // 32, BLOCK)))
    parts.append(("scales", half, (blocks, groups, BLOCK)))
    if not fmt.symmetric:
        parts.append(("offsets", half, (blocks, groups, BLOCK)))
    return parts


def _expanded_parts(fmt: Format, shape: MatrixShape) -> List[Tuple[str, np.dtype, Tuple[int, ...]]]:
    single = FLOATS["fp32"]
    if fmt.precision in FLOATS:
        return [("codes", single, (1, shape.columns, shape.rows))]
    size = group_size(fmt, shape.columns)
    groups = -(-shape.columns // size)
    rows = align(shape.rows, BLOCK)
    parts: List[Tuple[str, np.dtype, Tuple[int, ...]]] = [("codes", single, (groups, size, rows))]
    parts += [(name, single, (groups, rows)) for name in (("scales",) if fmt.symmetric else ("scales", "offsets"))]
    return parts


def _quantise(weight: np.ndarray, into: Packed, name: str) -> None:
    """Fills the views of `into` with the codes of `weight` (rows, columns)."""
    fmt = into.format
    if not np.isfinite(weight).all():
        raise ContainerError(f"{name}: the weights hold NaN or infinity")
    if fmt.precision in FLOATS:
        turned = weight.T
        if fmt.precision == "bf16":
            into.codes[...] = bf16_from_float32(turned)
        else:
            with np.errstate(over="ignore"):
                into.codes[...] = turned
        if not holds_numbers(into):
            wider = "bf16" if fmt.precision == "fp16" else "fp32"
            raise ContainerError(f"{name}: a weight is beyond the range of {fmt.precision}: import it as {wider}")
        return

    bits = BITS[fmt.precision]
    centre, top = 1 << (bits - 1), (1 << bits) - 1
    size = group_size(fmt, into.columns)
    groups = -(-into.columns // size)
    rows = align(into.rows, BLOCK)
    # Padding repeats the last column, so that it widens no group's range.
    padded = np.pad(weight, ((0, rows - into.rows), (0, groups * size - into.columns)), mode="edge")
    grouped = padded.reshape(rows, groups, size).transpose(1, 2, 0)  # (groups, size, rows)

    if fmt.symmetric:
        scales = np.abs(grouped).max(axis=1) / (centre - 1)
        offsets = np.zeros_like(scales)
    else:
        low, high = grouped.min(axis=1), grouped.max(axis=1)
        scales = (high - low) / top
    assert into.scales is not None
    with np.errstate(over="ignore"):
        into.scales[...] = in_blocks(scales)
        stored = in_rows(into.scales).astype(np.float32)
        if not fmt.symmetric:
            assert into.offsets is not None
            into.offsets[...] = in_blocks(low + centre * stored)
            offsets = in_rows(into.offsets).astype(np.float32)
    if not (np.isfinite(stored).all() and np.isfinite(offsets).all()):
        raise ContainerError(f"{name}: a scale is beyond the range of fp16: import it as bf16")
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(stored[:, None] > 0, (grouped - offsets[:, None]) / stored[:, None], 0)
    lowest = 1 if fmt.symmetric else 0
    codes = np.clip(np.rint(steps) + centre, lowest, top).astype(np.int16)  # (groups, size, rows), centred on `centre`

    if bits == 8:
        codes -= centre
    if bits == 3:
        assert into.high is not None
        _pack_fields(codes >> 2, 1, into.high)
    _pack_fields(codes, LOW_BITS[fmt.precision], into.codes)


def _pack_fields(values: np.ndarray, bits: int, into: np.ndarray) -> None:
    """Packs the low `bits` of values (groups, size, rows) into words (blocks, groups, words, BLOCK); see the module."""
    groups, size, rows = values.shape
    fields = values.reshape(groups, bits * size // 32, 16 // bits, 2, rows // BLOCK, BLOCK)
    fields = fields.transpose(2, 3, 4, 0, 1, 5)  # (field, half, blocks, groups, words, BLOCK)
    into[...] = 0
    for field, halves in enumerate(fields):
        for half, columns in enumerate(halves):
            into |= (columns & ((1 << bits) - 1)).astype(np.uint32) << np.uint32(16 * half + bits * field)


def in_blocks(values: np.ndarray) -> np.ndarray:
    """Turns (groups, padded rows) into (blocks, groups, BLOCK)."""
    return values.reshape(len(values), -1, BLOCK).transpose(1, 0, 2)


def in_rows(values: np.ndarray) -> np.ndarray:
    """Turns (blocks, groups, BLOCK) into (groups, padded rows)."""
    return values.transpose(1, 0, 2).reshape(values.shape[1], -1)
