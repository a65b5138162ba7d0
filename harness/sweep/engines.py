"""Keeps engines that were measured on the controller, by hash, so that a baseline's can be compared again.

FOLDER/<sha256>.zip      whole files or none; used by several processes at once
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from harness.device.deploy import EngineBundle
from harness.errors import UsageError
from reports.errors import ReportError
from reports.files import put_aside, replacing

_SUFFIX = ".zip"
_NAME = re.compile(r"[0-9a-f]{64}")


def engines_folder() -> Path:
    """Returns $XDG_DATA_HOME/edgemoe-farm/engines."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "share") / "edgemoe-farm" / "engines"


class EngineStore:
    """Keeps engines in a folder; each use touches one, so that `prune` can tell which nobody uses."""

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._now = now

    def keep(self, bundle: EngineBundle) -> None:
        """Stores an engine, or touches it; a damaged one is put aside. Raises UsageError where it cannot be written."""
        path = self._path(bundle.sha256)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.is_file() and path.read_bytes() == bundle.content:  # or a power cut left half of it
                os.utime(path, (self._now(), self._now()))
                return
            if path.exists():
                aside = put_aside(path)
                logging.getLogger(__name__).warning(
                    "edgemoe-farm: warning: %s is damaged: put aside as %s", path, aside.name
                )
            with replacing(path) as file:
                file.write(bundle.content)
        except (OSError, ReportError) as error:
            raise UsageError(f"engines cannot be kept in {self._folder}: {error}: set XDG_DATA_HOME") from None

    def get(self, sha256: str) -> EngineBundle:
        """Returns an engine. Raises UsageError where it is not kept here, or is damaged."""
        path = self._path(sha256)
        try:
            bundle = EngineBundle.packed(path.read_bytes())
            os.utime(path, (self._now(), self._now()))
        except FileNotFoundError:
            raise UsageError(
                f"engine {sha256[:16]} is not kept in {self._folder}: it was measured by another controller, or pruned"
            ) from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: the engine cannot be read: {error}: remove the file") from None
        if bundle.sha256 != sha256:
            raise UsageError(f"{path}: holds another engine, {bundle.sha256[:16]}: remove the file")
        return bundle

    def __contains__(self, sha256: str) -> bool:
        """Returns whether the engine is kept here, whole."""
        try:
            return EngineBundle.packed(self._path(sha256).read_bytes()).sha256 == sha256
        except (OSError, ValueError):
            return False

    def prune(self, *, days: float, wanted: Collection[str]) -> int:
        """Removes engines that nobody used for `days`, except `wanted`; returns how many."""
        removed, before = 0, self._now() - days * 86400
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if _NAME.fullmatch(path.stem) and path.stem not in wanted:  # what else lies there is somebody's
                with suppress(OSError):  # another process may prune, too
                    if path.stat().st_mtime < before:
                        path.unlink()
                        removed += 1
        return removed

    def _path(self, sha256: str) -> Path:
        if not _NAME.fullmatch(sha256):
            raise UsageError(f"{sha256[:16]!r} is no engine: a record that was written before engines had a hash?")
        return self._folder / f"{sha256}{_SUFFIX}"
