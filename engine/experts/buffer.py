"""Holds experts in memory, within a hard byte budget: the expert buffer."""

from __future__ import annotations

from typing import AbstractSet, Dict, List, Optional

import numpy as np

from engine.container import ExpertKey, Record
from engine.errors import MemoryBudgetError
from engine.experts.eviction import EvictionPolicy
from engine.experts.lanes import new_slab
from engine.quantize import Packed


class BufferEntry:
    """Describes an expert in the buffer, or on its way there."""

    __slots__ = ("key", "pins", "ready", "record", "slab", "speculative", "wanted", "weights")

    def __init__(self, key: ExpertKey, record: Record, slab: np.ndarray, speculative: bool) -> None:
        self.key = key
        self.record = record
        self.slab = slab
        self.ready = False  # its bytes have arrived and were checked
        self.speculative = speculative  # was read on a prediction and not used since
        self.wanted = not speculative  # the router has asked for it
        self.pins = 0  # the arithmetic is using it, or is about to
        self.weights: Optional[Dict[str, Packed]] = None  # views into the slab, once it was used


class ExpertBuffer:
    """Holds slabs of memory and the experts in them. Not locked: threads that share it hold the lock.

    A slab is as long as the expert in it takes; freed slabs are kept and used again, and count against the budget
    until they are given back to the system. `held_bytes` never exceeds `budget_bytes`.
    """

    def __init__(self, budget_bytes: Optional[int], largest_slab_bytes: int, policy: EvictionPolicy) -> None:
        if budget_bytes is not None and budget_bytes < largest_slab_bytes:
            raise MemoryBudgetError(
                f"an expert budget of {budget_bytes} bytes holds no expert: the largest takes {largest_slab_bytes}; "
                f"raise the budget to at least 1-experts"
            )
        self.budget_bytes = budget_bytes
        self.entries: Dict[ExpertKey, BufferEntry] = {}
        self.held_bytes = 0
        self.wasted_bytes = 0  # of experts that were preloaded and evicted unused
        self._policy = policy
        self._free: Dict[int, List[np.ndarray]] = {}

    def reserve(
        self,
        key: ExpertKey,
        record: Record,
        *,
        slab_bytes: int,
        layer: int,
        speculative: bool,
        keep: AbstractSet[ExpertKey],
    ) -> Optional[BufferEntry]:
        """Makes room for an expert that is not in the buffer, if need be by evicting others. None if none may leave.

        `keep`: experts that must not leave for this one, besides those that are pinned or on their way.
        """
        slab = self._slab(slab_bytes, layer, keep)
        if slab is None:
            return None
        entry = self.entries[key] = BufferEntry(key, record, slab, speculative)
        self._policy.inserted(key)
        return entry

    def touch(self, entry: BufferEntry) -> None:
        """Notes that the expert is used now."""
        entry.speculative = False
        self._policy.used(entry.key)

    def drop(self, entry: BufferEntry) -> None:
        """Removes the expert; its slab stays for the next one."""
        del self.entries[entry.key]
        self._policy.removed(entry.key)
        self._free.setdefault(entry.slab.nbytes, []).append(entry.slab)

    def _slab(self, size: int, layer: int, keep: AbstractSet[ExpertKey]) -> Optional[np.ndarray]:
        while not self._free.get(size):
            if self.budget_bytes is None or self.held_bytes + size <= self.budget_bytes:
                self.held_bytes += size
                assert self.budget_bytes is None or self.held_bytes <= self.budget_bytes
                return new_slab(size)
            if self._release_one():
                continue
            victim = self._policy.victim(lambda key: key not in keep and self._may_go(key), layer)
            if victim is None:
                return None
            entry = self.entries[victim]
            if entry.speculative:
                self.wasted_bytes += entry.record.slot_bytes
            self.drop(entry)
        return self._free[size].pop()

    def _may_go(self, key: ExpertKey) -> bool:
        entry = self.entries[key]
        return entry.ready and not entry.pins

    def _release_one(self) -> bool:
        """Gives one unused slab, of another size than is needed, back to the system."""
        for size, slabs in self._free.items():
            if slabs:
                slabs.pop()
                self.held_bytes -= size
                return True
        return False
