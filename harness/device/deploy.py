"""Deploys by content: what a device has costs no bytes, and nothing half-written has its final name.

ROOT/.edgemoe-farm                        marks the folder as the farm's: see harness/agent/place.py
ROOT/engines/<sha256[:16]>/engine/...     the engine, complete from the moment at which the folder appears
ROOT/sites/<sha256[:16]>/...              numpy for a device that has none: see harness/device/bootstrap.py
ROOT/blobs/<sha256>/<name>                containers and profiles
ROOT/runs/<run id>/                       one run each, removed when it is collected

A name proves nothing: engines and sites are compared with what was sent, blobs with their hash, at each session; see
harness/agent/stores.py. Whoever uses an engine or a blob touches its folder, so that `edgemoe-farm devices prune` can
tell what nobody uses any more.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
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
from functools import cached_property
from pathlib import Path
from typing import Any

import engine.protocol
from engine.codec import loads
from engine.errors import ProtocolError
from harness import agent
from harness.errors import RemoteCommandError, UnfitError, UsageError
from harness.transport import Completed, Transport
from harness.transport.shell import HASH_BYTES_PER_S
from reports.files import put_aside
from reports.text import harmless

ENGINE_SOURCE = Path(engine.protocol.__file__).parent
NOT_DEPLOYED = ("offline", "__pycache__", "tests")
TEST_DELAY_VARIABLE, TEST_DELAY_FILE = "EDGEMOE_TEST_DELAY", "test_delay"  # as engine/slowdown.py has them
FRESH_NS = 2_000_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
DEFAULT_UPLOADS = 4
PREPARE_DEADLINE_S = 60.0
CHECK_DEADLINE_S = 300.0  # to read numpy's thousand files from a slow card
TURN_POLL_S = 0.2

# $1: a run's folder, $2: its holder, $3: the farm's folder. Not what a later holder has made of it, and no links.
REMOVE = (
    '[ -f "$3/.edgemoe-farm" ] && [ ! -h "$3/.edgemoe-farm" ] && [ ! -h "$3/runs" ] && [ ! -h "$1" ] && '
    'grep -qsF -- "$2" "$1/holder.json" && rm -rf -- "$1"'
)


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
            # The time of change of the inode is what nobody can set: `cp -p` and `touch -d` set the other.
            state = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
            known = self._do("SELECT sha256 FROM v1 WHERE file = ? AND state = ?", str(path.resolve()), state)
            if known and _SHA256.fullmatch(str(known[0])):
                return str(known[0])
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        # A file that was written just now may change again within the resolution of its time: hash it again next time.
        if self._now_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > FRESH_NS:
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

    @cached_property
    def files(self) -> dict[str, str]:
        """Returns the SHA-256 of each file: what a device is asked to compare."""
        return hashes_in_zip(self.content)

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


def hashes_in_zip(source: bytes | Path) -> dict[str, str]:
    """Returns the SHA-256 of each file in a zip, by its name."""
    with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


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
    def prepare(cls, transport: Transport, python: str, root: str) -> FarmFolder:
        """Makes the folder and finds out its absolute path. Raises DeviceError, where it is not the farm's UnfitError.

        `python`: on the device; it needs no numpy.
        """
        answer = _told(transport.name, agent.call(transport, python, "prepare", root, deadline_s=PREPARE_DEADLINE_S))
        if isinstance(answer.get("refused"), str):
            raise UnfitError(f"{transport.name}: {harmless(answer['refused'], limit=1000)}")
        found = answer.get("root")
        if (
            not isinstance(found, str)
            or not found.startswith("/")
            or not found.isprintable()
            or "\ufffd" in found
            or len(found) > 4096
        ):
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
    python: str,
    place: FarmFolder,
    source: Path,
    cache: HashCache,
    progress: Callable[[int], None] | None = None,
    uploads: UploadTurns | None = None,
    *,
    planned: str | None = None,
) -> str:
    """Puts a container or profile on a device unless it is there; returns its path there.

    `planned`: the hash that it must have, on the device too. Raises DeviceError, UsageError.
    """
    digest = planned or cache.sha256(source)
    target, size_bytes = place.blob(digest, source), _size_bytes(source)
    if look_at_blob(transport, python, target, digest, size_bytes) != "ok":
        _check_planned(transport.name, source, digest, cache)
        with nullcontext() if uploads is None else uploads.taken(progress):
            _check_planned(transport.name, source, digest, cache)  # it may have waited for hours
            transport.upload(source, target, sha256=digest, progress=progress)
        if look_at_blob(transport, python, target, digest, size_bytes, how="fresh") != "ok":
            raise RemoteCommandError(
                f"{transport.name}: {target} changed as soon as it was there: see who writes there"
            )
    return target


def look_at_blob(
    transport: Transport, python: str, target: str, sha256: str, size_bytes: int, *, how: str = "known"
) -> str:
    """Returns `ok`, `absent`, or `damaged` where it was removed; see harness/agent/stores.py. Raises DeviceError."""
    deadline_s = PREPARE_DEADLINE_S + max(size_bytes, 0) / HASH_BYTES_PER_S
    call = agent.call(transport, python, "blob", target, sha256, str(size_bytes), how, deadline_s=deadline_s)
    return str(_told(transport.name, call).get("state"))


def difference(transport: Transport, python: str, folder: str, files: dict[str, str]) -> str | None:
    """Returns in which way an engine's or a site's folder is not what was sent, or None. Raises DeviceError."""
    wanted = json.dumps(files).encode()
    done = agent.call(transport, python, "check", folder, stdin=wanted, deadline_s=CHECK_DEADLINE_S)
    found = _told(transport.name, done).get("differs", "it gave no answer")
    return None if found is None else harmless(str(found), limit=200)


def _told(device: str, done: Completed) -> dict[str, Any]:
    """Returns the JSON object that the agent answered. Raises RemoteCommandError: a device may answer anything."""
    try:
        answer = loads(done.stdout.strip().rpartition(b"\n")[2])
    except ProtocolError as error:
        raise RemoteCommandError(f"{device}: no sensible answer of the farm's own program there: {error}") from None
    return answer if isinstance(answer, dict) else {}


def _check_planned(device: str, source: Path, digest: str, cache: HashCache) -> None:
    if cache.sha256(source) != digest:
        raise RemoteCommandError(
            f"{device}: {source} is not the file that was planned, it was changed since: put it back, or plan anew"
        )


def _size_bytes(source: Path) -> int:
    return source.stat().st_size if source.is_file() else -1


def safe_name(name: str) -> str:
    """Returns a file name that needs no quoting anywhere: other characters become '_'."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[:100] or "unnamed"
