"""Reads expert records from storage, each into a slab of the caller's, and checks them."""

from __future__ import annotations

import time
import zlib
from typing import Callable, List, Optional, Set

import numpy as np

from engine.container import Container, Record
from engine.errors import StorageError
from engine.experts.lanes import BrokenOff, ReadingLanes


class ExpertStore:
    """Reads records of one container, for one caller at a time; with two `lanes` in two halves at once.

    The rest is said at ReadingLanes. Where free memory is not to act as an expert buffer that nobody asked for,
    `keep_cached` is false. A record's checksum is verified the first time that it is read.
    """

    def __init__(
        self,
        container: Container,
        *,
        reader: str,
        lanes: int = 1,
        keep_cached: bool,
        bytes_per_s: Optional[float],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.container = container
        self.warnings: List[str] = []
        self._verified: Set[int] = set()  # offsets
        try:
            self._lanes = ReadingLanes(
                container.path, reader=reader, lanes=lanes, keep_cached=keep_cached, bytes_per_s=bytes_per_s,
                clock=clock, sleep=sleep,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise StorageError(f"{container.path}: cannot be opened for reading experts: {error}") from None
        if self._lanes.direct_refused is not None:
            self.warnings.append(
                f"the file system refuses O_DIRECT ({self._lanes.direct_refused}): experts are read with buffered pread"
            )

    @property
    def reader(self) -> str:
        """Returns the reader that engaged."""
        return self._lanes.reader

    @property
    def achieved_bytes_per_s(self) -> Optional[float]:
        """Returns the rate of emulated storage while it was busy; None for real storage, and before a read."""
        return None if self._lanes.emulated is None else self._lanes.emulated.achieved_bytes_per_s

    @property
    def lanes(self) -> int:
        return self._lanes.lanes

    def read(self, record: Record, slab: np.ndarray, broken_off: Optional[BrokenOff] = None) -> int:
        """Fills `slab` (record.slot_bytes long); returns the bytes read, fewer if `broken_off()` became true.

        Without it the record is asked for at once. Raises StorageError if the storage fails or the record is damaged.
        """
        try:
            done = self._lanes.read(slab.data[: record.slot_bytes], record.offset, broken_off)
        except OSError as error:
            raise StorageError(
                f"{self.container.path}: layer {record.layer} expert {record.expert} cannot be read: "
                f"{error.strerror or error}; check the storage"
            ) from None
        if done == record.slot_bytes and record.offset not in self._verified:
            if zlib.crc32(slab.data[: record.bytes]) != record.crc32:
                raise StorageError(
                    f"{self.container.path}: layer {record.layer} expert {record.expert} is damaged (checksum); "
                    "copy the container again"
                )
            self._verified.add(record.offset)
        return done

    def nobody_waited(self) -> None:
        """Notes that the last read held nobody up, for emulated storage; see EmulatedStorage.forgive."""
        if self._lanes.emulated is not None:
            self._lanes.emulated.forgive()

    def close(self) -> None:
        self._lanes.close()
