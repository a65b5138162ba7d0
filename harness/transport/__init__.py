"""How commands and files reach a device. One interface, several implementations: ssh, local, fake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Completed:
    """A command that ended on the device."""

    exit_status: int
    stdout: bytes
    stderr: bytes


class Transport(Protocol):
    """A connection to one device. Every act has a deadline and raises harness.errors.DeviceError on failure.

    Paths on the device are strings, absolute or relative to the home folder.
    """

    name: str  # of the device, for messages

    def run(
        self,
        arguments: Sequence[str],
        *,
        deadline_s: float,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        check: bool = True,
    ) -> Completed:
        """Runs a command to its end; the deadline holds on the device too. `check`: a non-zero exit raises."""
        ...

    def upload(self, source: Path, target: str, *, progress: Callable[[int], None] | None = None) -> int:
        """Puts a file at `target` atomically, going on from where a cut upload stopped; returns the bytes sent."""
        ...

    def write(self, content: bytes, target: str) -> None:
        """Puts a small file at `target` atomically."""
        ...

    def read(self, source: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """The bytes of a file from `offset`, at most `limit`."""
        ...

    def close(self) -> None: ...
