"""Keeps what is only shown from ending what is done: full disks, closed streams, encodings that lack a character."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from typing import Any, TextIO, cast


class Unfailing:
    """Writes to a stream, and drops what that refuses: for output whose loss is no reason to fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Makes standard streams that were closed, replaces what an encoding lacks, and drops what stderr refuses.

    A closed one is opened on /dev/null: the next file that is opened would get its number otherwise, and with it
    whatever is written there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - for as long as we live
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, Unfailing):
        sys.stderr = cast(TextIO, Unfailing(sys.stderr))
    logging.raiseExceptions = False


def stdout_may_fail() -> None:
    """Drops what standard output refuses, too: for commands whose exit code tells."""
    if not isinstance(sys.stdout, Unfailing):
        sys.stdout = cast(TextIO, Unfailing(sys.stdout))
