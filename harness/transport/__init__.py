"""How commands and files reach a device. One interface, several implementations: ssh, local, fake.

shell.py builds every act from one primitive (a command line with streamed input and output), which ssh and local
supply; fake wraps any of them and breaks the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Completed:
    """A command that ended on the device. Output that went to `on_stdout` is not repeated here."""

    exit_status: int  # as in a shell; negative: a signal killed it (SSH does not tell which: -1)
    stdout: bytes
    stderr: bytes


class Transport(Protocol):
    """A connection to one device, used by one thread at a time. A lost connection is opened again by the next act.

    Every act has a deadline and raises harness.errors.DeviceError on failure; UnreachableError says that trying
    again may help. Paths on the device are strings, absolute or relative to the home folder.
    """

    name: str  # of the device, for messages

    @property
    def bytes_sent(self) -> int:
        """Of files, by all uploads so far, broken ones included."""
        ...

    def run(
        self,
        arguments: Sequence[str],
        *,
        deadline_s: float,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        check: bool = True,
        on_stdout: Callable[[bytes], None] | None = None,
        silence_s: float | None = None,
    ) -> Completed:
        """Runs a command to its end; the deadline holds on the device too.

        `check`: a non-zero exit raises RemoteCommandError. `on_stdout` takes output as it comes; an exception from
        it breaks the command off and is passed on. `silence_s`: for commands that give a sign of life on stderr;
        without any output for so long the link counts as lost. Output kept in memory is bounded.
        """
        ...

    def upload(
        self,
        source: Path,
        target: str,
        *,
        sha256: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Puts a file at `target` atomically, going on from where a cut upload stopped; returns the bytes sent.

        The content is checked on the device before it appears there. `sha256` saves hashing the source; `progress`
        is told how many bytes of the file the device has. Raises DiskFullError before the first byte is sent.
        """
        ...

    def close(self) -> None: ...
