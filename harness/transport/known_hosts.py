"""Reads and writes the farm's own known_hosts file, in OpenSSH's format, apart from ~/.ssh/known_hosts.

Being the farm's own, it holds what `edgemoe-farm trust` put there and nothing that an `ssh` once accepted in passing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from reports.files import moved


def default_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns $XDG_CONFIG_HOME/edgemoe-farm/known_hosts, or the same under ~/.config."""
    base = environment.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if base.startswith("/") else Path.home() / ".config"
    return folder / "edgemoe-farm" / "known_hosts"


@dataclass(frozen=True)
class HostKey:
    """A public key under the name by which OpenSSH files it: `host`, or `[host]:port` for ports other than 22."""

    host: str
    kind: str  # e.g. ssh-ed25519
    content: bytes  # as it crosses the wire

    @property
    def fingerprint(self) -> str:
        """Returns the fingerprint as `ssh-keygen -l` prints it."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.content).digest()).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.host} {self.kind} {self.fingerprint}"


@dataclass(frozen=True)
class KnownHosts:
    """The keys in one file; a missing file is an empty one."""

    path: Path

    def find(self, host: str) -> tuple[HostKey, ...]:
        """Returns every key that is filed under `host`."""
        return tuple(
            HostKey(host, kind, content)
            for names, kind, content in self._entries()
            if any(_matches(name, host) for name in names)
        )

    def store(self, key: HostKey) -> None:
        """Files `key` in place of every other key of its host; the file is replaced atomically."""
        lines = []
        for line in self._lines():
            names, rest = _split(line)
            kept = [name for name in names if not _matches(name, key.host)]
            if kept == names:
                lines.append(line)
            elif kept:
                lines.append(f"{','.join(kept)} {rest}")
        lines.append(f"{key.host} {key.kind} {base64.b64encode(key.content).decode()}")
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, prefix=".known_hosts-", delete=False) as file:
            try:
                file.write("".join(f"{line}\n" for line in lines))
                file.flush()
                moved(Path(file.name), self.path)
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []

    def _entries(self) -> Iterator[tuple[list[str], str, bytes]]:
        for line in self._lines():
            names, rest = _split(line)
            words = rest.split()
            if names and len(words) >= 2:
                try:
                    yield names, words[0], base64.b64decode(words[1], validate=True)
                except binascii.Error:
                    continue  # SSH skips a damaged line too: its host is unknown


def _split(line: str) -> tuple[list[str], str]:
    """Returns the host names of a line and its rest; no names for comments, blank lines and @markers."""
    if not line.strip() or line.lstrip().startswith(("#", "@")):
        return [], line
    names, _, rest = line.strip().partition(" ")
    return names.split(","), rest


def _matches(name: str, host: str) -> bool:
    if not name.startswith("|1|"):  # plain
        return name == host
    try:
        _, _, salt, digest = name.split("|")
        expected = hmac.digest(base64.b64decode(salt), host.encode(), "sha1")
        return hmac.compare_digest(expected, base64.b64decode(digest))
    except (ValueError, binascii.Error):
        return False
