"""Whole files or none: what is written appears under its name when it is complete."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from reports.errors import ReportError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file beside `path` that takes its place on success and vanishes otherwise. Raises ReportError."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        moved(temporary, path)
        temporary = None
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror or error}: name another place") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def moved(source: Path, path: Path) -> Path:
    """Renames a file that is complete, and returns `path`; both content and name then survive a power cut."""
    _sync(source)
    source.replace(path)
    try:
        _sync(path.parent)
    except OSError as error:  # a folder that may not be read, or a file system that syncs none
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP):
            raise
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_aside(path: Path) -> Path:
    """Renames a damaged file to NAME.damaged, in place of an earlier one, and returns that. Raises OSError."""
    return path.replace(path.with_name(f"{path.name}.damaged"))


def _umask() -> int:
    """Returns the process's umask; the only way to ask for it is to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
