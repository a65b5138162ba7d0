"""Decides what is read next, and on which thread.

Demanded experts come first, in the order of the demand; then predicted ones, the likeliest first. A speculative read
under way gives way to a demand at its next chunk, unless it turns out to be what is demanded.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import AbstractSet, Callable, Deque, Dict, FrozenSet, Iterable, Mapping, Optional, Sequence

from engine.container import ExpertKey, Record
from engine.errors import EngineError, StorageError
from engine.experts.buffer import BufferEntry, ExpertBuffer
from engine.experts.slabs import Slabs
from engine.experts.store import ExpertStore
from engine.experts.timeline import TimelineRecorder

# With no byte arriving for this long the storage is taken for dead: an answer, if a late one, instead of a hang.
STALL_DEADLINE_S = 120.0


class Loader:
    """Moves experts from the store into the buffer.

    All methods but `run` and the reading itself need `lock` to be held. With `threaded` false every read happens in
    `wait_for`, on the thread that waits. The thread is woken only where there is something to read: each time costs the
    one that computes a tenth of a millisecond.
    """

    def __init__(
        self,
        store: ExpertStore,
        buffer: ExpertBuffer,
        records: Mapping[ExpertKey, Record],
        slabs: Slabs,
        *,
        threaded: bool,
    ) -> None:
        self.lock = threading.Condition()
        self.layer = 0  # that computes now
        self.read_bytes = 0
        self.prefetched_bytes = 0  # read on a prediction
        self.wasted_bytes = 0  # of speculative reads that were broken off
        self.recorder: Optional[TimelineRecorder] = None  # is told of every read, where there is one
        self._store, self._buffer, self._records, self._slabs = store, buffer, records, slabs
        self._demanded: Deque[Record] = deque()
        self._predicted: Deque[ExpertKey] = deque()
        self._keep: FrozenSet[ExpertKey] = frozenset()  # predicted: not to be evicted for another prediction
        self._failures: Dict[ExpertKey, EngineError] = {}
        self._closing = False
        self._held_up = False  # whether somebody waited for the last read
        self._idle = False  # whether nothing was to be read since
        self._thread: Optional[threading.Thread] = None
        if threaded:
            self._thread = threading.Thread(target=self.run, name="experts", daemon=True)
            self._thread.start()

    def demand(self, records: Iterable[Record]) -> None:
        """Requests experts, in these records, that the router wants and the buffer lacks."""
        self._demanded.extend(records)
        if self._demanded:
            self.lock.notify_all()

    def predict(self, keys: Sequence[ExpertKey], *, read: bool = True) -> None:
        """Replaces former predictions by these, the likeliest first.

        With `read` false they are only protected from eviction.
        """
        entries = self._buffer.entries
        self._predicted = deque(key for key in keys if key not in entries) if read else deque()
        self._keep = frozenset(keys)
        if self._predicted:
            self.lock.notify_all()

    def freed(self) -> None:
        """Wakes the thread: an expert in use may now leave, and it may have waited for that."""
        if self._demanded or self._predicted:
            self.lock.notify_all()

    def wait_for(self, keys: AbstractSet[ExpertKey], clock: Callable[[], float]) -> BufferEntry:
        """Blocks until one of `keys`, all wanted, has arrived; it comes pinned. Raises what its read raised."""
        deadline = clock() + STALL_DEADLINE_S
        while True:
            for key in keys:
                entry = self._buffer.entries.get(key)
                if entry is not None and entry.ready:
                    return entry
                if key in self._failures:
                    raise self._failures.pop(key)
            if self._thread is None:
                self._load_next()
            elif not self._thread.is_alive() or clock() > deadline:
                raise StorageError(f"{self._store.container.path}: no expert arrived within {STALL_DEADLINE_S:.0f} s")
            else:
                self.lock.wait(1.0)

    def run(self) -> None:
        """Loops over the reads, on the I/O thread."""
        with self.lock:
            while not self._closing:
                if not self._load_next():
                    self._idle = True
                    self.lock.wait()

    def close(self) -> None:
        with self.lock:
            self._closing = True
            self._predicted.clear()
            self._demanded.clear()
            self.lock.notify_all()
        if self._thread is not None:
            self._thread.join(STALL_DEADLINE_S)

    def _load_next(self) -> bool:
        """Reads one expert. Returns false if nothing is to be read, or no place is free until something is unpinned."""
        entry = self._next()
        if entry is None:
            return False
        if not self._held_up and (self._idle or not entry.speculative):
            self._store.nobody_waited()
        self._idle = False
        began = None if self.recorder is None else self.recorder.clock()
        self.lock.release()
        failure: Optional[EngineError] = None
        done = 0
        try:
            gives_way = (lambda: self._gives_way(entry)) if entry.speculative else None
            done = self._slabs.fill(self._store, entry.record, entry.slab, gives_way)
        except StorageError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread that waits for this expert must hear of it
            failure = StorageError(f"reading {entry.key} failed: {type(error).__name__}: {error}")
        finally:
            self.lock.acquire()
        if self.recorder is not None and began is not None:
            self.recorder.loaded(entry, began, done)
        self._arrived(entry, done, failure)
        return True

    def _arrived(self, entry: BufferEntry, done: int, failure: Optional[EngineError] = None) -> None:
        """Notes that so many bytes of an expert were read: it is whole, or its read gave way or failed."""
        self._held_up = bool(entry.wanted)
        self.read_bytes += done
        if entry.speculative:
            self.prefetched_bytes += done
        if failure is None and done == entry.record.slot_bytes:
            entry.ready = True
            entry.pins += entry.wanted  # until it has been used: nothing may take its place before
        else:
            self._buffer.drop(entry)
            if entry.speculative:
                self.wasted_bytes += done
            if (
                entry.wanted and entry.speculative
            ):  # demanded just as its preload gave way or failed: once more, in earnest
                self._demanded.appendleft(entry.record)
            elif entry.wanted and failure is not None:
                self._failures[entry.key] = failure
        self.lock.notify_all()

    def _gives_way(self, entry: BufferEntry) -> bool:
        return self._closing or (not entry.wanted and bool(self._demanded))

    def _next(self) -> Optional[BufferEntry]:
        if self._demanded:
            entry = self._reserve(self._demanded[0], speculative=False)
            if entry is not None:
                self._demanded.popleft()
            return entry
        while self._predicted:
            key = self._predicted.popleft()
            if key not in self._buffer.entries:
                return self._reserve(self._records[key], speculative=True)
        return None

    def _reserve(self, record: Record, speculative: bool) -> Optional[BufferEntry]:
        """Makes room. Predicted experts are kept as long as a demand can be met without evicting them."""
        key, slab_bytes = (record.layer, record.expert), self._slabs.bytes(record)
        for keep in (self._keep,) if speculative else (self._keep, frozenset()):
            entry = self._buffer.reserve(
                key, record, slab_bytes=slab_bytes, layer=self.layer, speculative=speculative, keep=keep
            )
            if entry is not None:
                return entry
        return None
