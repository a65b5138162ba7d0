"""Reads a device's facts at their source: files below a root, and its own commands. Standard library only.

Both are parameters, so that everything which reads a device can be shown a captured one.
"""

from __future__ import annotations

import errno
import os
import signal
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

COMMAND_DEADLINE_S = 3.0  # termux-battery-status hangs where its app is missing
MAX_BYTES = 1 << 20  # of a file or an answer: anything longer is no fact

# What a file that is not there, or not for us, or switched off in this kernel, says when it is opened or read.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.ENODEV, errno.ENXIO)


class SilentError(Exception):
    """Reports that something exists and did not answer."""


def run_command(arguments: List[str], deadline_s: float) -> str:
    """Returns what a command prints. Raises FileNotFoundError without it, SilentError if it does not answer."""
    import shutil
    import subprocess  # here only: an engine's start should not wait for them

    path = shutil.which(arguments[0])
    if path is None:
        raise FileNotFoundError(arguments[0])
    try:
        process = subprocess.Popen(
            [path, *arguments[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise SilentError(f"{arguments[0]} cannot be run: {error.strerror}") from None
    try:
        answer, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired as late:
        _end(process)
        if late.stdout:  # it goes on for ever, as tegrastats does
            return late.stdout.decode("utf-8", "replace")[:MAX_BYTES]
        raise SilentError(f"{arguments[0]} did not answer within {deadline_s:g} s") from None
    if process.returncode != 0:
        raise SilentError(f"{arguments[0]} failed with status {process.returncode}")
    return answer.decode("utf-8", "replace")[:MAX_BYTES]


def _end(process: Any) -> None:
    """Ends a process and whatever it started, which may hold its output open."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        process.kill()
    if process.stdout is not None:
        process.stdout.close()
    process.wait()


class Sources:
    """Reads files and commands of one device. A command that was silent once is not asked again."""

    def __init__(
        self,
        root: str = "/",
        run: Callable[[List[str], float], str] = run_command,
        environment: Optional[Mapping[str, str]] = None,
    ) -> None:
        self.root = os.path.realpath(root)
        self.environment: Mapping[str, str] = os.environ if environment is None else environment
        self._run = run
        self._silent: Dict[Tuple[str, ...], str] = {}  # command -> why

    def sensor(self, path: str) -> Optional[str]:
        """Returns a file's text; None if it is absent or unreadable to us. Raises SilentError if reading it fails."""
        try:
            with open(self.at(path), encoding="utf-8", errors="replace") as file:
                return file.read(MAX_BYTES)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise SilentError(f"{path}: {error.strerror}") from None

    def text(self, path: str) -> Optional[str]:
        """Returns a file's text, stripped; None if it is absent, unreadable or empty."""
        try:
            return (self.sensor(path) or "").strip("\0\n\t ") or None
        except SilentError:
            return None

    def number(self, path: str) -> Optional[float]:
        """Returns the number in a file. Raises SilentError if the file fails or holds no number."""
        text = self.sensor(path)
        try:
            return None if text is None else float(text)
        except ValueError:
            raise SilentError(f"{path}: {text!r:.40} is no number") from None

    def names(self, folder: str) -> List[str]:
        """Returns the names in a folder, sorted; nothing if it is absent or unreadable to us."""
        try:
            return sorted(os.listdir(self.at(folder)))
        except OSError:
            return []

    def real(self, path: str) -> Optional[str]:
        """Returns the path, below the root, to which links lead."""
        found = os.path.realpath(self.at(path))
        if not os.path.exists(found):
            return None
        return found[len(self.root.rstrip("/")) :] if found.startswith(self.root.rstrip("/") + "/") else None

    def at(self, path: str) -> str:
        return os.path.join(self.root, path.lstrip("/"))

    def command(self, *arguments: str, deadline_s: float = COMMAND_DEADLINE_S) -> Optional[str]:
        """Returns what a command prints; None if there is no such command. Raises SilentError."""
        if arguments in self._silent:
            raise SilentError(self._silent[arguments])
        try:
            return self._run(list(arguments), deadline_s)
        except FileNotFoundError:
            return None
        except SilentError as error:
            self._silent[arguments] = str(error)
            raise
