"""Keeps an expert in the buffer in one of two forms: packed as in the container, or dequantised."""

from __future__ import annotations

from typing import Dict, Iterable, Optional, Protocol, Sequence

import numpy as np

from engine.container import RECORD_ALIGNMENT, Record
from engine.experts.lanes import BrokenOff, new_slab
from engine.experts.store import ExpertStore
from engine.kernels import Kernels
from engine.quantize import Packed, RecordLayout, align


class Slabs(Protocol):
    """Fills slabs and gives the matrices in them. `fill` runs on the reading thread, `weights` on the computing one."""

    def bytes(self, record: Record) -> int:
        """Returns the length of the slab of this record: what the expert takes of the budget."""
        ...

    def fill(self, store: ExpertStore, record: Record, slab: np.ndarray, broken_off: Optional[BrokenOff]) -> int:
        """Reads a record into its slab, see ExpertStore.read; it is whole if all of its bytes were read."""
        ...

    def weights(self, record: Record, slab: np.ndarray) -> Dict[str, Packed]:
        """Returns the matrices of an expert, as views into its slab."""
        ...


class PackedSlabs:
    """Keeps the record itself and expands it at every use: the most experts in a budget."""

    def __init__(self, layouts: Sequence[RecordLayout]) -> None:
        self._layouts = layouts

    def bytes(self, record: Record) -> int:
        return record.slot_bytes

    def fill(self, store: ExpertStore, record: Record, slab: np.ndarray, broken_off: Optional[BrokenOff]) -> int:
        return store.read(record, slab, broken_off)

    def weights(self, record: Record, slab: np.ndarray) -> Dict[str, Packed]:
        return self._layouts[record.format].unpack(slab)


class DequantisedSlabs:
    """Expands an expert to FP32 once, when it comes in: the least arithmetic at each use, and the same bits.

    All slabs are of one size, whatever the precision of the record, so that an expert fits where any other was. One
    record more is in memory than the buffer holds, outside its budget: the one that is read and expanded now.
    """

    def __init__(self, layouts: Sequence[RecordLayout], records: Iterable[Record]) -> None:
        """Takes in `records` all that may ever be read."""
        records = list(records)
        self._layouts = layouts
        self._expanded = {number: layouts[number].expanded() for number in {record.format for record in records}}
        self._bytes = align(max(layout.bytes for layout in self._expanded.values()), RECORD_ALIGNMENT)
        self._staging = new_slab(max(record.slot_bytes for record in records))
        self._kernels = Kernels()  # of its own: these work on the thread that reads

    def bytes(self, record: Record) -> int:
        return self._bytes

    def fill(self, store: ExpertStore, record: Record, slab: np.ndarray, broken_off: Optional[BrokenOff]) -> int:
        staged = self._staging[: record.slot_bytes]
        done = store.read(record, staged, broken_off)
        if done == record.slot_bytes:
            expanded = self.weights(record, slab)
            for name, matrix in self._layouts[record.format].unpack(staged).items():
                self._kernels.expand_into(matrix, expanded[name])
        return done

    def weights(self, record: Record, slab: np.ndarray) -> Dict[str, Packed]:
        return self._expanded[record.format].unpack(slab)
