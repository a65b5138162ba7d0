"""Writes files whole or not at all, and reads no more of a stranger's file than was expected."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Iterator, Optional


def read_bounded(path: str, most_bytes: int) -> bytes:
    """Returns the content of a plain file. Raises OSError for a device, a pipe, and for more bytes than that."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would be waited for
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a plain file", path)
    with os.fdopen(handle, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes / (1 << 20):g} MiB", path)
    return content


@contextmanager
def replacing(path: str) -> Iterator[Any]:
    """Yields a binary file for the folder of `path` that is synced and takes its place on success.

    On an error nothing of it remains and what was there before stays. Where the system can, the file has no name until
    it is complete, so that a process that is killed leaves nothing either. Raises OSError.
    """
    folder, name = os.path.split(os.path.abspath(path))
    complete = os.path.join(folder, f".{name[:100]}.{os.getpid()}.part")
    with suppress(FileNotFoundError):
        os.unlink(complete)  # of a process that had this number before
    aside = _unnamed(folder)
    has_name = aside is None
    if aside is None:
        aside = open(complete, "x+b")  # noqa: SIM115 - closed below
    try:
        with aside:
            yield aside
            aside.flush()
            if not has_name:
                _give_name(aside, complete)
                has_name = True
            os.fsync(aside.fileno())
        os.chmod(complete, 0o644)
        os.replace(complete, path)
    except BaseException:
        if has_name:
            with suppress(FileNotFoundError):
                os.unlink(complete)
        raise
    parent = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(parent)  # the name, too
    finally:
        os.close(parent)


def _unnamed(folder: str) -> Optional[BinaryIO]:
    """Returns a file without a name, or None where the system or the file system knows none."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        return os.fdopen(os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600), "w+b")
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            return None
        raise


def _give_name(file: BinaryIO, path: str) -> None:
    try:
        # Only with a folder does Python call linkat, which follows; the path is absolute, and the folder is not used.
        os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno(), follow_symlinks=True)
    except OSError:  # Android forbids links; without /proc there is nothing to link from
        import shutil  # here only: an engine's start should not wait for it

        file.seek(0)
        with open(path, "xb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
