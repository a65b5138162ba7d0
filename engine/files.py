"""Writes files whole or not at all."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any, Iterator


@contextmanager
def replacing(path: str) -> Iterator[Any]:
    """Yields a binary file beside `path` that is synced and takes its place on success.

    On an error nothing of it remains and what was there before stays. Raises OSError.
    """
    import tempfile  # here only: an engine's start should not wait for it

    folder, name = os.path.split(os.path.abspath(path))
    aside = tempfile.NamedTemporaryFile(prefix=f".{name[:100]}.", dir=folder, delete=False)  # noqa: SIM115 - closed below
    try:
        with aside:
            yield aside
            aside.flush()
            os.fsync(aside.fileno())
        os.chmod(aside.name, 0o644)
        os.replace(aside.name, path)
    except BaseException:
        os.unlink(aside.name)
        raise
    parent = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(parent)  # the name, too
    finally:
        os.close(parent)
