"""Deploys by content: what a device has costs no bytes, and nothing half-written has its final name.

ROOT/engines/<sha256[:16]>/engine/...     the engine, complete from the moment at which the folder appears
ROOT/sites/<sha256[:16]>/...              numpy for a device that has none: see harness/device/bootstrap.py
ROOT/blobs/<sha256>/<name>                containers and profiles
ROOT/runs/<run id>/                       one run each, removed when it is collected

Whoever uses an engine or a blob touches it, so that `edgemoe-farm devices prune` can tell what nobody uses any more.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import re
import sqlite3
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import engine.protocol
from harness.errors import RemoteCommandError, UsageError
from harness.transport import Transport
from reports.files import put_aside
from reports.text import harmless

ENGINE_SOURCE = Path(engine.protocol.__file__).parent
NOT_DEPLOYED = ("offline", "__pycache__", "tests")
TEST_DELAY_VARIABLE, TEST_DELAY_FILE = "EDGEMOE_TEST_DELAY", "test_delay"  # as engine/slowdown.py has them
FRESH_NS = 2_000_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
DEFAULT_UPLOADS = 4
TURN_POLL_S = 0.2

# $1: the farm's folder.
PREPARE = 'mkdir -p -- "$1/engines" "$1/sites" "$1/blobs" "$1/runs" && cd -- "$1" && pwd -P'
# $1: a run's folder, $2: its holder. Not what a later holder has made of it.
REMOVE = 'grep -qsF -- "$2" "$1/holder.json" && rm -rf -- "$1"'
# $1: a folder, which is in use from now on.
IS_THERE = '[ -d "$1" ] || exit 1; touch -c -- "$1" 2>/dev/null; exit 0'
# $1: a file, which is in use from now on; prints its bytes.
SIZE = '[ -f "$1" ] || exit; touch -c -- "$1" 2>/dev/null; wc -c <"$1"'


def cache_folder() -> Path:
    """Returns $XDG_CACHE_HOME/edgemoe-farm: what can be made again, such as hashes of large containers."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "edgemoe-farm"


class HashCache:
    """Remembers the SHA-256 of files by path, size, time of change and inode; processes may share one."""

    def __init__(self, folder: Path, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        """Opens the cache, or makes it anew in place of a damaged one. Without one, files are hashed each time."""
        self._database = folder / "sha256.sqlite"
        self._now_ns = now_ns

    def sha256(self, path: Path) -> str:
        """Returns the file's hash. Raises UsageError where it cannot be read."""
        try:
            found = path.stat()
            state = f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
            known = self._do("SELECT sha256 FROM v1 WHERE file = ? AND state = ?", str(path.resolve()), state)
            if known and _SHA256.fullmatch(str(known[0])):
                return str(known[0])
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        # A file that was written just now may change again within the resolution of its time: hash it again next time.
        if self._now_ns() - found.st_mtime_ns > FRESH_NS:
            self._do("INSERT OR REPLACE INTO v1 VALUES (?, ?, ?)", str(path.resolve()), state, digest)
        return digest

    def _do(self, statement: str, *values: str) -> tuple[object, ...] | None:
        """Returns the first row that is found. A cache that fails finds nothing, a damaged one is put aside."""
        for _ in range(2):
            try:
                self._database.parent.mkdir(parents=True, exist_ok=True)
                with closing(sqlite3.connect(self._database, timeout=30)) as connection, connection:
                    connection.execute("CREATE TABLE IF NOT EXISTS v1 (file TEXT PRIMARY KEY, state TEXT, sha256 TEXT)")
                    row: tuple[object, ...] | None = connection.execute(statement, values).fetchone()
                return row
            except (OSError, sqlite3.Error) as error:
                is_damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(
                    error, (sqlite3.OperationalError, sqlite3.IntegrityError)
                )
                if not (is_damaged and self._put_aside(error)):
                    _warn_once(f"{self._database}: the cache of hashes cannot be used ({error}): files are hashed anew")
                    return None
        return None

    def _put_aside(self, error: Exception) -> bool:
        try:
            aside = put_aside(self._database)
        except OSError:
            return False
        _warn_once(f"{self._database}: the cache of hashes is damaged ({error}): put aside as {aside.name}, made anew")
        return True


@functools.cache
def _warn_once(what: str) -> None:
    logging.getLogger(__name__).warning("edgemoe-farm: warning: %s", harmless(what))


@dataclass(frozen=True)
class EngineBundle:
    """Holds the engine as it goes to a device: a zip, and the hash of what is in it."""

    sha256: str
    content: bytes

    @classmethod
    def of(cls, source: Path, *, test_delay: str = "") -> EngineBundle:
        """Packs the folder `engine`, only what a device needs. `test_delay`: see engine/slowdown.py."""
        files = sorted(
            path
            for path in source.rglob("*")
            if path.is_file() and path.suffix != ".md" and not set(path.relative_to(source).parts) & set(NOT_DEPLOYED)
        )
        if not (source / "__main__.py").is_file():
            raise UsageError(f"{source} is not an engine: it has no __main__.py")
        content = {f"engine/{path.relative_to(source).as_posix()}": path.read_bytes() for path in files}
        if test_delay:
            content[f"engine/{TEST_DELAY_FILE}"] = test_delay.encode()
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in content.items():
                info = zipfile.ZipInfo(name)  # without a time: the same engine is the same bytes
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, data)
        return cls(_hash(content), packed.getvalue())

    @classmethod
    def packed(cls, content: bytes) -> EngineBundle:
        """Returns a bundle that was packed before. Raises ValueError where it is damaged."""
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                return cls(_hash({name: archive.read(name) for name in archive.namelist()}), content)
        except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError) as error:
            raise ValueError(str(error)) from None


def _hash(content: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, data in content.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


_bundles: dict[Path, EngineBundle] = {}
_bundling = threading.Lock()


def engine_bundle(source: Path) -> EngineBundle:
    """Returns EngineBundle.of(source), packed once for all devices of this process."""
    with _bundling:
        if source not in _bundles:
            _bundles[source] = EngineBundle.of(source, test_delay=os.environ.get(TEST_DELAY_VARIABLE, ""))
        return _bundles[source]


@dataclass(frozen=True)
class FarmFolder:
    """Names what is where in the farm's folder on a device."""

    root: str  # absolute

    @classmethod
    def prepare(cls, transport: Transport, root: str) -> FarmFolder:
        """Makes the folder and finds out its absolute path. Raises DeviceError."""
        done = transport.run(["sh", "-c", PREPARE, "sh", root], deadline_s=30)
        found = done.stdout.decode("utf-8", "replace").rstrip("\n")
        if not found.startswith("/") or not found.isprintable() or "\ufffd" in found or len(found) > 4096:
            raise RemoteCommandError(f"{transport.name}: {root} has no usable absolute path there: set another `root`")
        return cls(found)

    def engine(self, sha256: str) -> str:
        return f"{self.root}/engines/{sha256[:16]}"

    def site(self, sha256: str) -> str:
        return f"{self.root}/sites/{sha256[:16]}"

    def blob(self, sha256: str, source: Path) -> str:
        return f"{self.root}/blobs/{sha256}/{safe_name(source.name)}"

    def run(self, run_id: str) -> str:
        return f"{self.root}/runs/{safe_name(run_id)}"


class UploadTurns:
    """Limits how many uploads go on at once: they share the controller's network and disk.

    A turn lasts for one attempt. A device whose link is lost waits for it without one, and so delays nobody.
    """

    def __init__(self, at_once: int = DEFAULT_UPLOADS) -> None:
        self._free = threading.BoundedSemaphore(at_once)

    @contextmanager
    def taken(self, waiting: Callable[[int], None] | None) -> Iterator[None]:
        """Waits for a turn and keeps it; calls `waiting` with 0 meanwhile. An exception from it ends the wait."""
        while not self._free.acquire(timeout=TURN_POLL_S):
            if waiting is not None:
                waiting(0)
        try:
            yield
        finally:
            self._free.release()


def put_blob(
    transport: Transport,
    place: FarmFolder,
    source: Path,
    cache: HashCache,
    progress: Callable[[int], None] | None = None,
    uploads: UploadTurns | None = None,
) -> str:
    """Puts a container or profile on a device unless it is there; returns its path there."""
    digest = cache.sha256(source)
    target = place.blob(digest, source)
    if not has_blob(transport, target, source):
        with nullcontext() if uploads is None else uploads.taken(progress):
            transport.upload(source, target, sha256=digest, progress=progress)
    return target


def has_blob(transport: Transport, target: str, source: Path) -> bool:
    """Tells whether a blob is there; name and size prove it, as it got its name when its checksum was verified."""
    seen = transport.run(["sh", "-c", SIZE, "sh", target], deadline_s=30, check=False)
    return seen.stdout.strip() == str(source.stat().st_size).encode()


def safe_name(name: str) -> str:
    """Returns a file name that needs no quoting anywhere: other characters become '_'."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[:100] or "unnamed"
