"""Keeps what was sent to this device, and looks whether it is still what was sent.

An engine or a numpy is compared file by file. A container is hashed once; from then on the file system's own record of
it (size, inode, times of change) proves that nobody wrote to it, as that costs nothing. What failed is hashed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import time
from typing import Any, Dict, Iterator, Optional, Tuple, Union

from harness.agent.files import read, write
from harness.agent.place import FORMS, is_own, sync

PIECE_BYTES = 1 << 20
LAUNCHER = r"python3(\.\d+\.part)?"  # which harness/device/bootstrap.py adds to a site
RECORD = ".checked.json"


def difference(folder: str, wanted: Dict[str, str]) -> Optional[str]:
    """Returns in which way a folder is not what was sent, or None.

    There is nothing else in it, as it comes first on Python's path; a site has its launcher. What Python has compiled
    of an engine is removed: nothing tells whether it is whole.
    """
    root, kind, name = _parts(folder)
    if not os.path.lexists(folder):
        return "it is missing"
    if not is_own(root, kind, name):
        return "it is not the farm's own folder"
    found = {}
    for path, inner, mode in _walk(folder, ""):
        if os.path.basename(inner) == "__pycache__" and stat.S_ISDIR(mode):
            if kind == "engines":
                shutil.rmtree(path, ignore_errors=True)
        elif stat.S_ISREG(mode):
            found[inner] = path
        elif not stat.S_ISDIR(mode):
            return f"{inner} is no plain file"
    for inner in wanted:
        if inner not in found:
            return f"{inner} is missing"
    for inner, path in found.items():
        if inner not in wanted:
            if kind == "sites" and re.fullmatch(LAUNCHER, inner):
                continue
            return f"{inner} was not sent"
        try:
            if sha256_of(path) != wanted[inner]:
                return f"{inner} has changed"
        except OSError as error:
            return f"{inner} cannot be read ({error.strerror})"
    with contextlib.suppress(OSError):
        os.utime(folder)  # it is in use from now on
    return None


def install(folder: str, source: Union[str, bytes]) -> None:
    """Unpacks a zip; the folder appears when every byte of it would survive a power cut.

    A folder that is there already stays where it is what the zip holds, and goes where it is not.
    """
    import io
    import zipfile  # here only: `attend` should start quickly

    unfinished = f"{folder}.{os.getpid()}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.mkdir(unfinished, 0o700)
    with zipfile.ZipFile(source if isinstance(source, str) else io.BytesIO(source)) as archive:
        archive.extractall(unfinished)
    wanted = {inner: sha256_of(path) for path, inner, mode in _walk(unfinished, "") if stat.S_ISREG(mode)}
    sync_all(unfinished)
    if os.path.lexists(folder):
        if difference(folder, wanted) is None:  # another controller was faster
            shutil.rmtree(unfinished, ignore_errors=True)
            return
        put_aside(folder)
    os.rename(unfinished, folder)
    sync(os.path.dirname(folder))


def look_at_blob(path: str, sha256: str, size_bytes: int, how: str) -> str:
    """Returns `ok`, `absent`, or `damaged`: then it has been removed.

    `how`: `known`, the record proves it, or else its hash; `fresh`, the transport has just hashed it; `full`, its hash
    alone proves it. A size below zero is not known.
    """
    folder = os.path.dirname(path)
    root, kind, name = _parts(folder)
    if not os.path.lexists(folder):
        return "absent"
    if not is_own(root, kind, name) or name != sha256:
        put_aside(folder)
        return "damaged"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return "absent"
    except OSError:  # a link
        put_aside(folder)
        return "damaged"
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        whole = stat.S_ISREG(found.st_mode) and size_bytes in (found.st_size, -1)
        if whole and (how == "full" or (how == "known" and read(folder, RECORD) != _record(found, sha256))):
            try:
                whole = sha256_of(file) == sha256
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # runs begin with a cold cache
            except OSError:  # a medium that cannot be read any more
                whole = False
    if not whole:
        put_aside(folder)
        return "damaged"
    if read(folder, RECORD) != _record(found, sha256):
        write(folder, RECORD, _record(found, sha256))
    with contextlib.suppress(OSError):
        os.utime(folder)  # not the file, whose times are its proof
    return "ok"


def unproven(files: Dict[str, str]) -> Optional[str]:
    """Returns the first of {PATH: SHA256} that was replaced since it was looked at, or None."""
    for path, sha256 in files.items():
        try:
            found = os.lstat(path)
        except OSError:
            return path
        if not stat.S_ISREG(found.st_mode) or read(os.path.dirname(path), RECORD) != _record(found, sha256):
            return path
    return None


def put_aside(path: str) -> None:
    """Removes a file, link or folder of the farm, by a rename first; follows no link."""
    going = f"{path}.{time.time_ns()}.part"
    os.rename(path, going)
    if stat.S_ISDIR(os.lstat(going).st_mode):
        shutil.rmtree(going, ignore_errors=True)
    else:
        os.unlink(going)


def sync_all(folder: str) -> None:
    """Waits until a folder and all in it would survive a power cut. Raises OSError."""
    for path, _, _ in _walk(folder, ""):
        sync(path)
    sync(folder)


def sha256_of(source: Any) -> str:
    """Returns the hash of a file, open or named; a link is not followed. Raises OSError."""
    if isinstance(source, str):
        with os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return sha256_of(file)
    digest = hashlib.sha256()
    for piece in iter(lambda: source.read(PIECE_BYTES), b""):
        digest.update(piece)
    return digest.hexdigest()


def _record(found: os.stat_result, sha256: str) -> Dict[str, Any]:
    return {
        "sha256": sha256,
        "bytes": found.st_size,
        "inode": found.st_ino,
        "modified_ns": found.st_mtime_ns,
        "changed_ns": found.st_ctime_ns,  # which nobody can set
    }


def _walk(folder: str, above: str) -> Iterator[Tuple[str, str, int]]:
    """Yields path, name below the folder and mode of all in it; follows no link."""
    for name in sorted(os.listdir(folder)):
        path, inner = os.path.join(folder, name), f"{above}{name}"
        mode = os.lstat(path).st_mode
        yield path, inner, mode
        if stat.S_ISDIR(mode) and name != "__pycache__":
            yield from _walk(path, inner + "/")


def _parts(folder: str) -> Tuple[str, str, str]:
    """Returns root, kind and name of one of the farm's folders. Raises ValueError for any other."""
    above, name = os.path.split(folder)
    root, kind = os.path.split(above)
    if kind not in FORMS:
        raise ValueError(f"{folder} is none of the farm's folders")
    return root, kind, name
