"""Reads one file at given positions into the caller's memory, on one or two threads."""

from __future__ import annotations

import mmap
import os
import threading
import time
from queue import Empty, SimpleQueue
from typing import Callable, Optional, Tuple, Union

import numpy as np

from engine.container import RECORD_ALIGNMENT

# A speculative read can be broken off between two chunks; a demanded expert never waits longer than for one, which is
# this long at the rate that was seen.
CHUNK_S = 1e-3
LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES = 16 << 10, 1 << 20  # all divided by 16 KiB, as direct reads need it
# What a second thread reads of a block at least: to hand it over takes as long as a few of these at a fast storage.
LEAST_LANE_BYTES = 64 << 10
LANE_DEADLINE_S = 120.0  # for the second half of a block, when the first has arrived
BrokenOff = Callable[[], bool]


def chunk_bytes_at(bytes_per_s: float) -> int:
    """Returns how much a speculative read transfers before it asks whether to give way."""
    return _whole_chunk(int(bytes_per_s * CHUNK_S))


def new_slab(size: int) -> np.ndarray:
    """Page-aligned memory, as direct reads need it; freed when the last view of it goes. Private: a limit on a
    process's data (RLIMIT_DATA) does not see what could be shared. Raises MemoryError.
    """
    try:
        return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    except OSError as error:
        raise MemoryError(f"{size} bytes: {error.strerror}") from None


class ReadingLanes:
    """Reads blocks of a file, for one caller at a time; a second lane reads the second half of each.

    `reader`: "pread" (buffered), "direct" (O_DIRECT, past the page cache; becomes pread where that is refused, and
    `direct_refused` says why) or "mmap". With `keep_cached` false, what was read does not stay in the page cache.
    `bytes_per_s` slows reading down to that rate, of both lanes together: see EmulatedStorage.
    Raises OSError, or ValueError for an empty file that is to be mapped.
    """

    def __init__(
        self,
        path: str,
        *,
        reader: str,
        lanes: int = 1,
        keep_cached: bool = True,
        bytes_per_s: Optional[float] = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.reader = reader
        self.lanes = lanes
        self.direct_refused: Optional[str] = None
        self.emulated = None if bytes_per_s is None else EmulatedStorage(bytes_per_s, clock=clock, sleep=sleep)
        self._keep_cached = keep_cached
        self._clock = clock
        self._chunk_bytes = 128 << 10
        self._map: Optional[mmap.mmap] = None
        self._mapped: Optional[np.ndarray] = None
        self._file = self._open(path)
        self._second = _SecondLane(self._part) if lanes == 2 else None

    def read(self, view: memoryview, offset: int, broken_off: Optional[BrokenOff] = None) -> int:
        """Fills `view` from `offset` on, both multiples of 16 KiB, and returns the bytes read.

        They are fewer if `broken_off()` became true. Without it the block is asked for at once.
        """
        began = self._clock()
        asked = began if self.emulated is None else self.emulated.asked()
        size = len(view)
        half = size // 2 // LEAST_LANE_BYTES * LEAST_LANE_BYTES
        if self._second is None or not half:
            done = self._part(view, offset, broken_off, asked, 1)
        else:
            self._second.begin(view[size - half :], offset + size - half, broken_off, asked, 2)
            try:
                done = self._part(view[: size - half], offset, broken_off, asked, 2)
            finally:
                rest = self._second.end()  # also after a failure: until then it writes into the caller's memory
            if isinstance(rest, OSError):
                raise rest
            done += rest
        if self.emulated is not None:
            self.emulated.answered()
        self._learn(done, self._clock() - began)
        if not self._keep_cached:
            self.forget(offset, size)
        return done

    def forget(self, offset: int, size: int) -> None:
        """Makes the page cache forget these bytes."""
        if self._map is not None:
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + size - start)
        if self.reader != "direct":
            os.posix_fadvise(self._file, offset, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self._second is not None and not self._second.close():
            return  # it still reads from what would be closed; the storage is dead
        self._mapped = None
        if self._map is not None:
            self._map.close()
        os.close(self._file)

    def _open(self, path: str) -> int:
        if self.reader == "direct":
            try:
                file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
                try:
                    os.preadv(
                        file, [new_slab(RECORD_ALIGNMENT).data], 0
                    )  # whoever refuses only now, or wants larger blocks
                    return file
                except OSError:
                    os.close(file)
                    raise
            except OSError as error:
                self.direct_refused = error.strerror or str(error)
                self.reader = "pread"
        file = os.open(path, os.O_RDONLY)
        if self.reader == "mmap":
            try:
                self._map = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):
                os.close(file)
                raise
            self._mapped = np.frombuffer(self._map, np.uint8)
        else:
            # The block that is asked for, and not what stands behind it: reading ahead costs up to half of the rate.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        return file

    def _part(self, view: memoryview, offset: int, broken_off: Optional[BrokenOff], asked: float, lanes: int) -> int:
        """Reads on one of the threads, chunk by chunk if it may be broken off."""
        size, done = len(view), 0
        chunk = size if broken_off is None else _whole_chunk(min(self._chunk_bytes, MOST_CHUNK_BYTES) // lanes)
        while done < size:
            if done and broken_off is not None and broken_off():
                break
            began = time.perf_counter()
            got = self._chunk(view[done : done + chunk], offset + done)
            if self.emulated is not None:
                asked = self.emulated.take_time(got, asked, time.perf_counter() - began)
            done += got
        return done

    def _chunk(self, view: memoryview, offset: int) -> int:
        if self._mapped is not None:
            for ahead in range(0, len(view), MOST_CHUNK_BYTES):  # the kernel heeds no more than about this at once
                os.posix_fadvise(self._file, offset + ahead, MOST_CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
            # By numpy, which lets other threads compute meanwhile; a slice of the map does not.
            np.copyto(np.frombuffer(view, np.uint8), self._mapped[offset : offset + len(view)])
            return len(view)
        got = os.preadv(self._file, [view], offset)
        if got <= 0:
            raise OSError(None, "the file became shorter while it was read")
        return got

    def _learn(self, done: int, time_s: float) -> None:
        """Adapts the length of chunks to the time that one took."""
        # Halfway at most: one slow read says little of the next.
        self._chunk_bytes = _whole_chunk((self._chunk_bytes + chunk_bytes_at(done / max(time_s, 1e-9))) // 2)


class EmulatedStorage:
    """Takes as long as a device that serves one read at a time, at a rate, and never less than the real storage.

    Threads wake up late, and the device must not stand idle for that: a thread that woke late has not asked late. By as
    much as an answer came late, the next read counts as asked for earlier.
    """

    def __init__(self, bytes_per_s: float, *, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self.bytes_per_s = bytes_per_s
        self.read_bytes, self.busy_s = 0, 0.0
        self._clock, self._sleep = clock, sleep
        self._one = threading.Lock()  # one storage, however many ask it
        self._free_at = 0.0  # when it has finished what it was asked for
        self._late_s = 0.0  # by how much its last answer came late

    @property
    def achieved_bytes_per_s(self) -> Optional[float]:
        """Returns the rate while it was busy, less than its own where the real storage is slower; None at first."""
        return self.read_bytes / self.busy_s if self.busy_s > 0 else None

    def asked(self) -> float:
        """Returns when a read that begins now is asked for."""
        return self._clock() - self._late_s

    def take_time(self, size: int, asked: float, took_s: float) -> float:
        """Waits until `size` bytes are served, which really took `took_s`; returns when what follows is asked for."""
        with self._one:
            begins = max(self._free_at, asked)
            ends = self._free_at = max(begins + size / self.bytes_per_s, asked + took_s)
            self.read_bytes += size
            self.busy_s += ends - begins
        wait_s = ends - self._clock()
        if wait_s > 0:
            self._sleep(wait_s)
        return min(ends, self._clock())

    def answered(self) -> None:
        """Notes that the last of a read's bytes have reached who asked for them."""
        self._late_s = max(0.0, self._clock() - self._free_at)

    def forgive(self) -> None:
        """Notes that nobody waited for the last answer, so that whoever asks next was not held up by it."""
        self._late_s = 0.0


class _SecondLane:
    """Does one job at a time on a thread. One thread calls `begin` and `end` in turns."""

    def __init__(self, read: Callable[..., int]) -> None:
        self._read = read
        self._jobs: SimpleQueue[Optional[Tuple[object, ...]]] = SimpleQueue()
        self._done: SimpleQueue[Union[int, OSError]] = SimpleQueue()
        self._dead = False
        self._thread = threading.Thread(target=self._run, name="experts-2", daemon=True)
        self._thread.start()

    def begin(self, *job: object) -> None:
        if self._dead:
            raise OSError(None, "the storage does not answer")
        self._jobs.put(job)

    def end(self) -> Union[int, OSError]:
        """Returns what `read` returned, or raises what it raised."""
        try:
            return self._done.get(timeout=LANE_DEADLINE_S)
        except Empty:
            self._dead = True
            return OSError(None, f"no answer within {LANE_DEADLINE_S:.0f} s")

    def close(self) -> bool:
        """Ends the thread; returns whether it has ended."""
        self._jobs.put(None)
        self._thread.join(LANE_DEADLINE_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                self._done.put(self._read(*job))
            except OSError as error:
                self._done.put(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, the thread that waits must hear of it
                self._done.put(OSError(None, f"{type(error).__name__}: {error}"))


def _whole_chunk(size: int) -> int:
    return min(max(size // LEAST_CHUNK_BYTES * LEAST_CHUNK_BYTES, LEAST_CHUNK_BYTES), MOST_CHUNK_BYTES)
