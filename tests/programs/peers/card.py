"""A storage card: a file system of its own on a loop device, whose reads can be counted and limited. Needs root."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType

SECTOR_BYTES = 512  # in /sys/block, whatever the device's own


class Card:
    """ext4 in a file of `folder`, mounted while the `with` block lasts."""

    def __init__(self, folder: Path, size_bytes: int, read_ahead_kib: int) -> None:
        self._image, self._mount = folder / "card.img", folder / "card"
        self._size_bytes, self._read_ahead_kib = size_bytes, read_ahead_kib
        self._loop = ""

    def __enter__(self) -> Card:
        self._mount.mkdir(parents=True, exist_ok=True)
        with self._image.open("wb") as file:
            file.truncate(self._size_bytes)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(self._image))
        self._loop = _run("losetup", "--find", "--show", "--direct-io=on", str(self._image))
        try:
            (self._sys / "queue" / "read_ahead_kb").write_text(str(self._read_ahead_kib))
            _run("mount", "-o", "noatime", self._loop, str(self._mount))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def put(self, path: str) -> str:
        """A copy on the card: its path."""
        to = self._mount / Path(path).name
        shutil.copyfile(path, to)
        _run("sync", "-f", str(to))
        return str(to)

    @property
    def device(self) -> str:
        """Its numbers, such as 7:0."""
        return (self._sys / "dev").read_text().strip()

    @property
    def read_bytes(self) -> int:
        """Read from it so far."""
        return int((self._sys / "stat").read_text().split()[2]) * SECTOR_BYTES

    @property
    def read_ahead_kib(self) -> int:
        return int((self._sys / "queue" / "read_ahead_kb").read_text())

    @property
    def _sys(self) -> Path:
        return Path("/sys/block") / Path(self._loop).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["umount", str(self._mount)], check=False, capture_output=True)
        subprocess.run(["losetup", "-d", self._loop], check=False, capture_output=True)
        self._image.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: still mounted
            self._mount.rmdir()


def _run(*command: str) -> str:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{command[0]} failed, which needs root: {result.stderr.strip()}")
    return result.stdout.strip()
