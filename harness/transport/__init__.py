"""Carries commands and files to devices: one interface, several implementations.

Each kind of transport describes itself in a `TransportKind` beside its code; harness/device/kinds.py is the table.

shell.py builds every act from one primitive (a command line with streamed input and output), which ssh.py and local.py
supply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from device_inventory import Device
from harness.findings import Told
from harness.transport.known_hosts import HostKey


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
        """Returns the bytes of files sent by all uploads so far, broken ones included."""
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


@dataclass(frozen=True)
class Reach:
    """How to connect to one device, and how time passes there."""

    connect: Callable[[], Transport]
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Keyring:
    """The controller's files that a transport may need: the farm's own host keys, and an ssh_config (None: yours)."""

    known_hosts: Path
    ssh_config: Path | None = None


@dataclass(frozen=True)
class TransportKind:
    """One way to reach devices: a row of the table in harness/device/kinds.py.

    `open` says how to connect to a device; it does not connect. `address` shows where a device is. `trust` yields the
    host keys that a person must accept, None where there are none. `checks` are what `doctor` looks at on the
    controller, given the devices of this kind. `options` are the keys, with their types, that the inventory may give
    under the kind's name, as in `[devices.phone.adb]`; those in `required` must be there.
    """

    open: Callable[[Device, Keyring], Reach]
    address: Callable[[Device], str]
    trust: Callable[[Device, Keyring], Iterator[HostKey]] | None = None
    checks: Mapping[str, Callable[[Keyring, Sequence[Device]], Iterator[Told]]] = field(default_factory=dict)
    options: Mapping[str, type] = field(default_factory=dict)
    required: tuple[str, ...] = ()
