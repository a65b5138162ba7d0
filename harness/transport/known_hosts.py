"""Reads and writes the farm's own known_hosts file, in OpenSSH's format, apart from ~/.ssh/known_hosts.

Lines are read as OpenSSH reads them: patterns, `@revoked`, none that is damaged. `@cert-authority` is not supported.
Being the farm's own, it holds what `edgemoe-farm trust` put there and nothing that an `ssh` once accepted in passing.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import HostKeyError
from reports.files import moved

MOST_BYTES = 16 << 20


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
    whose: str = field(default="the device", compare=False)  # or a jump host before it, in words

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
        return tuple(HostKey(host, entry.kind, entry.content) for entry in self._entries(host) if not entry.marker)

    def revoked(self, key: HostKey) -> int | None:
        """Returns the line that revokes a key; None where none does."""
        lines = (e.line for e in self._entries(key.host) if e.marker == "@revoked" and e.content == key.content)
        return next(lines, None)

    def authority(self, host: str) -> int | None:
        """Returns the line that lets an authority certify keys of `host`, which the farm does not support."""
        return next((e.line for e in self._entries(host) if e.marker == "@cert-authority"), None)

    def store(self, key: HostKey) -> None:
        """Files `key` in place of every other key of its host; the file is replaced atomically."""
        lines = []
        for line in self._lines():
            names, rest = _split(line)
            kept = [name for name in names if not _is_name(name, key.host)]
            if kept == names:
                lines.append(line)
            elif kept:
                lines.append(f"{','.join(kept)} {rest}")
        lines.append(f"{key.host} {key.kind} {base64.b64encode(key.content).decode()}")
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".known_hosts-", delete=False) as file:
            try:
                file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
                file.flush()
                moved(Path(file.name), self.path)
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise

    def _lines(self) -> list[str]:
        """Returns the lines, whatever bytes they hold. Raises OSError."""
        try:
            with self.path.open("rb") as file:
                content = file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            return []
        if len(content) > MOST_BYTES:
            raise OSError(errno.EFBIG, f"more than {MOST_BYTES >> 20} MB", str(self.path))
        lines = content.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
        return [line.removesuffix("\r") for line in lines]

    def _entries(self, host: str) -> Iterator[_Entry]:
        for number, line in enumerate(self._lines(), 1):
            marker, *others = line.split(maxsplit=1) if line.lstrip().startswith("@") else ("", line)
            names, rest = _split(" ".join(others))
            words = rest.split()
            if len(words) >= 2 and _matches(names, host):
                try:
                    content = base64.b64decode(words[1].encode(), validate=True)
                except ValueError:
                    continue  # SSH skips a damaged line too: its host is unknown
                yield _Entry(marker, words[0], content, number)


@dataclass(frozen=True)
class _Entry:
    marker: str  # empty, @revoked or @cert-authority
    kind: str
    content: bytes
    line: int


def _split(line: str) -> tuple[list[str], str]:
    """Returns the host names of a line and its rest; no names for comments, blank lines and @markers."""
    if not line.strip() or line.lstrip().startswith(("#", "@")):
        return [], line
    names, _, rest = line.strip().partition(" ")
    return names.split(","), rest


def _matches(names: list[str], host: str) -> bool:
    """Tells whether a list of names and patterns names a host: one does, and none behind "!" does."""
    if any(name.startswith("!") and _is_pattern_of(name[1:], host) for name in names):
        return False
    return any(_is_name(name, host) or _is_pattern_of(name, host) for name in names)


def _is_pattern_of(pattern: str, host: str) -> bool:
    """Tells whether a name with `*` and `?` fits a host, in time that grows with their lengths alone."""
    pattern, host = pattern.lower(), host.lower()
    at = place = 0
    star, tried = -1, 0
    while place < len(host):
        if at < len(pattern) and pattern[at] == "*":
            star, tried, at = at, place, at + 1
        elif at < len(pattern) and pattern[at] in ("?", host[place]):
            at, place = at + 1, place + 1
        elif star >= 0:
            tried += 1
            at, place = star + 1, tried
        else:
            return False
    return not pattern[at:].strip("*")


def _is_name(name: str, host: str) -> bool:
    """Tells whether a name, plain or hashed, is that of a host and no pattern."""
    if not name.startswith("|1|"):
        return name.lower() == host.lower()
    try:
        _, _, salt, digest = name.split("|")
        wanted, key = base64.b64decode(digest.encode()), base64.b64decode(salt.encode())
        spelled = {host.encode("utf-8", "surrogateescape"), host.lower().encode("utf-8", "surrogateescape")}
        return any(hmac.compare_digest(hmac.digest(key, name, "sha1"), wanted) for name in spelled)
    except ValueError:
        return False


def keys_of(device: str, host: str, known: KnownHosts) -> tuple[HostKey, ...]:
    """Returns the keys of a host on the way to `device`. Raises HostKeyError where they cannot be read."""
    try:
        return known.find(host)
    except OSError as error:
        raise HostKeyError(f"{device}: {known.path} cannot be read ({error.strerror}): mend or remove it") from None


def refuse_revoked(device: str, key: HostKey, known: KnownHosts) -> None:
    """Raises HostKeyError where a line of the file revokes the key."""
    line = known.revoked(key)
    if line is not None:
        raise HostKeyError(
            f"{device}: the host key of {key.host} is REVOKED by {known.path} line {line} ({key.fingerprint}): "
            "give the device another key"
        )


def verify(device: str, presented: HostKey, known: KnownHosts) -> None:
    """Raises HostKeyError unless the key that a host on the way to `device` presented is one of its keys."""
    host = presented.host
    trusted = keys_of(device, host, known)
    refuse_revoked(device, presented, known)
    if presented in trusted:
        return
    if trusted:
        shown = next((key for key in trusted if key.kind == presented.kind), trusted[0])
        raise HostKeyError(
            f"{device}: the host key of {host} has CHANGED: {shown.fingerprint} is trusted, "
            f"{presented.fingerprint} was presented. If the device was set up anew: "
            f"`edgemoe-farm trust {device} --replace`; if not, someone may be between you and it"
        )
    line = known.authority(host)
    why = f"; {known.path} line {line} trusts an authority, which the farm does not support" if line else ""
    raise HostKeyError(
        f"{device}: the host key of {host} is unknown ({presented.kind} {presented.fingerprint}{why}): "
        f"compare it with the device's own and run `edgemoe-farm trust {device}`"
    )
