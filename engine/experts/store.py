"""Expert records on storage: positioned reads, direct reads or a mapping, each into a slab of the caller's."""

from __future__ import annotations

import mmap
import os
import zlib
from typing import Callable, List, Optional, Set

import numpy as np

from engine.container import Container, Record
from engine.errors import StorageError

# A speculative read can be broken off between two chunks; a demanded expert never waits longer than for one, which is
# this long at the rate that was seen.
CHUNK_S = 1e-3
LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES = 16 << 10, 1 << 20  # all divided by 16 KiB, as direct reads need it
BrokenOff = Callable[[], bool]
CREDIT_S = 1e-3  # the emulated storage starts the next read at once if it is asked within this time of the last


def chunk_bytes_at(bytes_per_s: float) -> int:
    """How much a speculative read transfers before it asks whether it shall give way."""
    return _whole_chunk(int(bytes_per_s * CHUNK_S))


def new_slab(size: int) -> np.ndarray:
    """Page-aligned memory, as direct reads need it; freed when the last view of it goes. Private: a limit on a
    process's data (RLIMIT_DATA) does not see what could be shared. Raises MemoryError.
    """
    try:
        return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    except OSError as error:
        raise MemoryError(f"{size} bytes: {error.strerror}") from None


class ExpertStore:
    """Reads records of one container. One thread at a time.

    `reader`: "pread" (buffered), "direct" (O_DIRECT, past the page cache; falls back to pread where the file system
    refuses it) or "mmap". With `keep_cached` false, what was read does not stay in the page cache: otherwise free
    memory would act as an expert buffer that nobody asked for.
    `bytes_per_s` slows reading down to that rate: emulated storage.
    A record's checksum is verified the first time that it is read.
    """

    def __init__(
        self,
        container: Container,
        *,
        reader: str,
        keep_cached: bool,
        bytes_per_s: Optional[float],
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self.container = container
        self.reader = reader
        self.warnings: List[str] = []
        self._keep_cached = keep_cached
        self._bytes_per_s = bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._chunk_bytes = 128 << 10
        self._free_at = 0.0  # when the emulated storage has finished what it was asked for
        self._verified: Set[int] = set()  # offsets
        self._map: Optional[mmap.mmap] = None
        self._file = self._open()

    def read(self, record: Record, slab: np.ndarray, broken_off: Optional[BrokenOff] = None) -> int:
        """Fills `slab` (record.slot_bytes long) and returns the bytes read: fewer if `broken_off()` became true.

        Without it the record is asked for at once. Raises StorageError if the storage fails or the record is damaged.
        """
        view = slab.data
        size = record.slot_bytes
        chunk = size if broken_off is None else min(self._chunk_bytes, MOST_CHUNK_BYTES)
        asked = start = self._clock()
        if start - self._free_at < CREDIT_S:
            start = self._free_at
        done = 0
        try:
            while done < size:
                if done and broken_off is not None and broken_off():
                    break
                done += self._chunk(view, done, min(chunk, size - done), record.offset)
                if self._bytes_per_s is not None:
                    self._free_at = start + done / self._bytes_per_s
                    wait = self._free_at - self._clock()
                    if wait > 0:
                        self._sleep(wait)
            self._learn(done, self._clock() - asked)
            if not self._keep_cached:
                self._forget(record.offset, size)
        except OSError as error:
            raise StorageError(
                f"{self.container.path}: layer {record.layer} expert {record.expert} cannot be read: "
                f"{error.strerror or error}; check the storage"
            ) from None
        if done == size and record.offset not in self._verified:
            if zlib.crc32(view[: record.bytes]) != record.crc32:
                raise StorageError(
                    f"{self.container.path}: layer {record.layer} expert {record.expert} is damaged (checksum); "
                    "copy the container again"
                )
            self._verified.add(record.offset)
        return done

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        os.close(self._file)

    def _open(self) -> int:
        path = self.container.path
        try:
            if self.reader == "direct":
                try:
                    file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
                    try:
                        os.preadv(file, [new_slab(4096).data], 0)
                        return file
                    except OSError:
                        os.close(file)
                except OSError:
                    pass
                self.warnings.append("the file system refuses O_DIRECT: experts are read with buffered pread")
                self.reader = "pread"
            file = os.open(path, os.O_RDONLY)
            if self.reader == "mmap":
                self._map = mmap.mmap(file, self.container.file_bytes, access=mmap.ACCESS_READ)
            return file
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: cannot be opened for reading experts: {error}") from None

    def _chunk(self, view: memoryview, done: int, size: int, offset: int) -> int:
        if self._map is not None:
            view[done : done + size] = self._map[offset + done : offset + done + size]
            return size
        got = os.preadv(self._file, [view[done : done + size]], offset + done)
        if got <= 0:
            raise OSError(None, "the file became shorter while it was read")
        return got

    def _learn(self, done: int, time_s: float) -> None:
        """How long chunks should be, from how long it took."""
        # Halfway at most: one slow read says little of the next.
        self._chunk_bytes = _whole_chunk((self._chunk_bytes + chunk_bytes_at(done / max(time_s, 1e-9))) // 2)

    def _forget(self, offset: int, size: int) -> None:
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED, offset, size)
        if self.reader != "direct":
            os.posix_fadvise(self._file, offset, size, os.POSIX_FADV_DONTNEED)


def _whole_chunk(size: int) -> int:
    return min(max(size // LEAST_CHUNK_BYTES * LEAST_CHUNK_BYTES, LEAST_CHUNK_BYTES), MOST_CHUNK_BYTES)
