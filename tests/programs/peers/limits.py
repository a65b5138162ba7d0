"""Real limits on one process: memory, with the page cache that it fills, and the rate at which it reads a device."""

from __future__ import annotations

import os
import time
from pathlib import Path

from engine.device.limits import MemoryLimit

BLKIO = Path("/sys/fs/cgroup/blkio")


class Limits:
    """device: its numbers, such as 7:0, for `read_bytes_per_s`; None: as fast as it is. Needs root."""

    def __init__(self, memory_bytes: int, device: str, read_bytes_per_s: int | None) -> None:
        name = f"edgemoe-farm-peers-{os.getpid()}-{time.monotonic_ns()}"
        self._memory = MemoryLimit(memory_bytes, name)
        self._reading: Path | None = None
        if not self._memory.method.startswith("cgroup") or not os.access(BLKIO / "cgroup.procs", os.W_OK):
            self.close()
            raise SystemExit("control groups for memory and blkio (version 1) cannot be made here, which needs root")
        if read_bytes_per_s is not None:
            self._reading = BLKIO / name
            self._reading.mkdir()
            (self._reading / "blkio.throttle.read_bps_device").write_text(f"{device} {read_bytes_per_s}")

    def enter(self) -> None:
        """In the process that is to be limited."""
        self._memory.enter()
        if self._reading is not None:
            (self._reading / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def most_used_bytes(self) -> int:
        peak, counter = self._memory.peak()
        assert peak is not None and counter != "ru_maxrss"
        return peak

    def close(self) -> None:
        """Once nothing runs under them."""
        self._memory.close()
        if self._reading is not None:
            self._reading.rmdir()
