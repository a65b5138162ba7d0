"""Storage and memory as small as a device's, around real processes of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.devices.userland import need

GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Card:
    """A file system of its own on a block device of its own, like an SD card."""

    folder: Path
    number: str  # of the block device: MAJOR:MINOR


@contextlib.contextmanager
def card(image: Path, folder: Path, size_bytes: int, read_ahead_kib: int = 128) -> Iterator[Card]:
    """ext4 in `image`, mounted at `folder`, with the read-ahead of a small device's storage."""
    need("losetup", "mkfs.ext4")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    _do("mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image))
    folder.mkdir(exist_ok=True)
    made = subprocess.run(
        ["losetup", "-f", "--show", "--direct-io=on", str(image)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device can be had here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        block = Path("/sys/block") / Path(device).name
        (block / "queue/read_ahead_kb").write_text(str(read_ahead_kib))
        _do("mount", "-o", "noatime", device, str(folder))
        try:
            yield Card(folder, (block / "dev").read_text().strip())
        finally:
            _do("umount", "-l", str(folder))
    finally:
        _do("losetup", "-d", device)


class ControlGroup:
    """Processes that together have so much memory, with the page cache that they fill, and so fast a storage."""

    def __init__(self, memory_bytes: int, card: Card, read_bytes_per_s: int) -> None:
        name = f"edgemoe-farm-{os.getpid()}-{time.monotonic_ns()}"
        self.version = 2 if (GROUPS / "cgroup.controllers").exists() else 1
        if self.version == 2:
            parent = GROUPS
            self.memory = self.storage = parent / name
            settings = {
                "memory.max": memory_bytes,
                "memory.swap.max": 0,
                "io.max": f"{card.number} rbps={read_bytes_per_s}",
            }
        else:
            self.memory, self.storage = GROUPS / "memory" / name, GROUPS / "blkio" / name
            settings = {
                "memory.limit_in_bytes": memory_bytes,
                "memory.memsw.limit_in_bytes": memory_bytes,
                "blkio.throttle.read_bps_device": f"{card.number} {read_bytes_per_s}",
            }
        self.folders = tuple(dict.fromkeys((self.memory, self.storage)))
        try:
            if self.version == 2:
                (GROUPS / "cgroup.subtree_control").write_text("+memory +io")
            for folder in self.folders:
                folder.mkdir()
            for setting, value in settings.items():
                path = (self.memory if setting.startswith("memory") else self.storage) / setting
                if path.exists() or "sw" not in setting:  # where the kernel counts no swap there is nothing to limit
                    path.write_text(str(value))
        except OSError as error:
            self.close()
            pytest.skip(f"no control group for memory and storage can be made here: {error}")

    @property
    def within(self) -> tuple[str, ...]:
        """The command that starts another in the group."""
        files = [str(folder / "cgroup.procs") for folder in self.folders]
        return ("sh", "-c", 'for f in $1; do echo $$ >"$f" || exit; done; shift; exec "$@"', "sh", " ".join(files))

    def peak_bytes(self) -> int:
        return int((self.memory / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")).read_text())

    def bytes_read(self, card: Card) -> int:
        """From the card, by processes of the group, as the storage's own limit counts them."""
        text = (self.storage / ("io.stat" if self.version == 2 else "blkio.throttle.io_service_bytes")).read_text()
        pattern = r"^{} .*rbytes=(\d+)" if self.version == 2 else r"^{} Read (\d+)$"
        found = re.search(pattern.format(re.escape(card.number)), text, re.MULTILINE)
        return int(found[1]) if found else 0

    def close(self) -> None:
        """Ends whatever still lives in the group, and removes it."""
        end = time.monotonic() + 10
        for folder in self.folders:
            while folder.exists():
                for pid in (folder / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), 9)
                try:
                    folder.rmdir()
                except OSError:
                    assert time.monotonic() < end, f"{folder} does not get empty"
                    time.sleep(0.05)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
