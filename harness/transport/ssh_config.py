"""Finds out how OpenSSH would reach a device: `ssh -G` resolves ssh_config, and nothing of it is parsed here.

So Include, Match, ProxyJump none, quotes and whatever comes are read as ssh reads them. What the farm then cannot do as
ssh does is named with its file and line.
"""

from __future__ import annotations

import getpass
import glob
import os
import pwd
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from device_inventory import Device
from harness.errors import FarmError, UnreachableError
from reports.text import harmless

DEADLINE_S = 30.0  # `Match exec` may run anything
MOST_HOPS = 8
_SYSTEM = Path("/etc/ssh/ssh_config")
_CONFIG_BYTES, _MOST_FILES = 1 << 20, 64
_DEFAULT_KEYS = ("id_rsa", "id_ecdsa", "id_ecdsa_sk", "id_ed25519", "id_ed25519_sk")
# Directives that ssh heeds and the farm does not, and the values of `ssh -G` that change nothing.
_NOT_HEEDED = {
    "proxyusefdpass": ("no",), "pkcs11provider": ("none",), "pubkeyauthentication": ("true", "yes"),
    "certificatefile": (), "bindaddress": (), "bindinterface": (),
}  # fmt: skip
_ALGORITHMS = ("ciphers", "kexalgorithms", "macs", "hostkeyalgorithms")


@dataclass(frozen=True)
class Hop:
    """One connection on the way to a device, as ssh would make it."""

    host: str
    port: int
    user: str
    identities: tuple[Path, ...]  # private keys or their .pub, in the order in which they are offered
    identities_only: bool = False  # no other key of an agent is offered
    agent: str | None = None  # its socket; None: no agent
    alias: str | None = None  # under which its host key is filed, instead of host and port
    command: str | None = None  # that carries the connection, instead of TCP
    family: int = socket.AF_UNSPEC
    notes: tuple[str, ...] = ()  # what of ssh_config is not heeded, each with file and line

    def __str__(self) -> str:
        return f"{self.user}@{self.host} port {self.port}"

    @property
    def noted(self) -> str:
        """Returns what to add to a failure: what of ssh_config was not heeded."""
        return f" ({'; '.join(self.notes)})" if self.notes else ""


@dataclass(frozen=True)
class Destination:
    """What somebody wrote to name a host: [user@]host[:port], where an IPv6 address with a port is in brackets."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Destination:
        """Reads it as `ssh -J` does, `ssh://` included. Raises ValueError."""
        rest = text.removeprefix("ssh://").rstrip("/") if text.startswith("ssh://") else text
        user, at, place = rest.rpartition("@")
        found = re.fullmatch(r"\[([^\[\]]+)\](?::([0-9]+))?", place) or re.fullmatch(
            r"([^:\[\]]+)(?::([0-9]+))?", place
        )
        host, port = (found[1], found[2]) if found else (place, None)
        port_number = None if port is None else int(port)
        if not host or host.startswith("-") or (at and not user) or user.startswith("-"):
            raise ValueError(f"{text!r} is not [user@]host[:port]")
        if (not found and (set(host) & set("[]") or host.count(":") < 2)) or (
            port_number is not None and not 0 < port_number < 65536
        ):
            raise ValueError(f"{text!r} is not [user@]host[:port]")
        return cls(host, user or None, port_number)


def hops(device: Device, ssh_config: Path | None = None) -> tuple[Hop, ...]:
    """Returns the jump hosts of a device in order, then the device. Raises UnreachableError."""
    try:
        here = Destination.parse(device.host)
        if (here.user and device.user) or (here.port and device.port):
            raise ValueError(f"{device.host!r} and the keys user or port say the same twice: say it once")
        target = Destination(here.host, device.user or here.user, device.port or here.port)
        jumps = None if device.proxy_jump is None else _jumps(device.proxy_jump)
        return tuple(_chain(target, jumps, _Resolver(device, ssh_config)))
    except FarmError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this device's
        raise UnreachableError(f"{device.name}: {harmless(error)}: correct it in the inventory or ssh_config") from None


def _jumps(text: str) -> list[Destination]:
    return [] if text.strip().lower() == "none" else [Destination.parse(jump.strip()) for jump in text.split(",")]


def _chain(target: Destination, jumps: list[Destination] | None, resolver: _Resolver, depth: int = 0) -> list[Hop]:
    """Returns the way to `target`: over `jumps`, or over those of ssh_config where that is None, as ssh nests them."""
    if depth > MOST_HOPS:
        raise ValueError(f"more than {MOST_HOPS} jump hosts lead to {target.host}, or they go round in circles")
    hop, configured = resolver.resolve(target)
    if jumps is None:
        jumps = _jumps(configured) if configured else []
    if not jumps:
        return [hop]
    *before, last = jumps
    return [*_chain(last, before or None, resolver, depth + 1), hop]


class _Resolver:
    """Resolves one destination after another for a device, by `ssh -G` where ssh is installed."""

    def __init__(self, device: Device, ssh_config: Path | None) -> None:
        self._device = device
        self._identity = Path(device.identity_file).expanduser() if device.identity_file else None
        self._files = _files(ssh_config)
        self._ssh = shutil.which("ssh")
        if self._identity is not None and not self._identity.is_file():
            raise UnreachableError(
                f"{device.name}: identity_file {self._identity} does not exist: correct it in the inventory"
            )

    def resolve(self, target: Destination) -> tuple[Hop, str]:
        """Returns the hop, and the value of ProxyJump."""
        if self._ssh is None:
            return self._without_ssh(target), ""
        command = [self._ssh, "-G"]
        if self._files.given is not None:
            command += ["-F", self._files.given]
        command += ["-i", str(self._identity)] if self._identity else []
        command += ["-l", target.user] if target.user else []
        command += ["-p", str(target.port)] if target.port else []
        try:
            done = subprocess.run(
                [*command, "--", target.host],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"ssh -G {target.host}: no end within {DEADLINE_S:g} s: does a `Match exec` hang?"
            ) from None
        told = done.stderr.decode("utf-8", "replace")
        if done.returncode != 0:
            lines = [
                line for line in told.splitlines() if line.strip() and not line.startswith(("Pseudo-", "Warning:"))
            ]
            why = lines[0].strip().rstrip(".") if lines else "without a reason"
            raise ValueError(f"ssh refuses its configuration: {why}")
        return self._hop(target, done.stdout.decode("utf-8", "surrogateescape"))

    def _hop(self, target: Destination, answer: str) -> tuple[Hop, str]:
        found: dict[str, list[str]] = {}
        for line in answer.splitlines():
            key, _, value = line.partition(" ")
            found.setdefault(key.lower(), []).append(value.strip())
        one = {key: values[0] for key, values in found.items()}
        host, user = one.get("hostname", target.host).strip("[]"), one.get("user") or getpass.getuser()
        port = int(one.get("port", "22"))
        tokens = _Tokens(target.host, host, port, user, one)
        families = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}
        command, agent = one.get("proxycommand", "none"), one.get("identityagent", "SSH_AUTH_SOCK")
        hop = Hop(
            host, port, user,
            identities=tuple(tokens.path(name) for name in found.get("identityfile", []) if name.lower() != "none"),
            identities_only=one.get("identitiesonly") == "yes",
            agent=_agent(agent, tokens),
            alias=one.get("hostkeyalias"),
            command=None if command.lower() == "none" else tokens.expand(command),
            family=families.get(one.get("addressfamily", ""), socket.AF_UNSPEC),
            notes=tuple(self._files.not_heeded(one)),
        )  # fmt: skip
        return hop, one.get("proxyjump", "")

    def _without_ssh(self, target: Destination) -> Hop:
        """Returns what needs no ssh_config. Raises ValueError where there is one that cannot be read."""
        device, own = self._device, self._files.user
        if own.is_file() and not (device.user and device.port and device.identity_file):
            raise ValueError(
                f"{own} is read by `ssh -G`, and ssh is not installed: install openssh-client, or set user, port and "
                "identity_file of the device"
            )
        defaults = (Path.home() / ".ssh" / name for name in _DEFAULT_KEYS)
        identities = (self._identity,) if self._identity else tuple(defaults)
        user, agent = target.user or getpass.getuser(), os.environ.get("SSH_AUTH_SOCK")
        return Hop(target.host, target.port or 22, user, identities, agent=agent)


def _agent(value: str, tokens: _Tokens) -> str | None:
    """Returns the socket that IdentityAgent names; None where there is no agent."""
    if value.lower() == "none":
        return None
    if value == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK") or None
    return os.environ.get(value[1:]) or None if re.fullmatch(r"\$[A-Za-z_]\w*", value) else str(tokens.path(value))


class _Tokens:
    """Expands what `ssh -G` leaves: `~`, `%h` and its like, and `${VARIABLE}`; see TOKENS in ssh_config(5)."""

    def __init__(self, original: str, host: str, port: int, user: str, one: Mapping[str, str]) -> None:
        local = socket.gethostname()
        self._values = {
            "%": "%", "h": host, "n": original, "p": str(port), "r": user, "u": getpass.getuser(), "l": local,
            "L": local.partition(".")[0], "d": str(Path.home()), "i": str(os.getuid()),
            "k": one.get("hostkeyalias", original), "j": one.get("proxyjump", ""),
        }  # fmt: skip

    def expand(self, text: str) -> str:
        """Returns the text with its tokens expanded. Raises ValueError for one that the farm does not know."""

        def value(found: re.Match[str]) -> str:
            if found[1] not in self._values:
                raise ValueError(f"ssh_config: the token %{found[1]} in {text!r} is not supported")
            return self._values[found[1]]

        def variable(found: re.Match[str]) -> str:
            if found[1] not in os.environ:
                raise ValueError(f"ssh_config: {found[0]} in {text!r} is not set")
            return os.environ[found[1]]

        return re.sub(r"%(.)", value, re.sub(r"\$\{(\w+)\}", variable, text))

    def path(self, text: str) -> Path:
        return Path(self.expand(text.strip('"'))).expanduser()


@dataclass(frozen=True)
class _Files:
    """Says which configuration ssh is told to read; None: what it reads by itself."""

    given: str | None
    user: Path

    def not_heeded(self, one: Mapping[str, str]) -> Iterator[str]:
        """Yields each directive that is in force and not heeded by the farm, with its file and line."""
        wanted = {key for key, idle in _NOT_HEEDED.items() if key in one and one[key].lower() not in idle}
        lines = dict(self._lines({*wanted, *_ALGORITHMS}))
        for key in (*wanted, *_ALGORITHMS):
            if key in lines or key in wanted:
                yield f"{lines.get(key, key)} is not supported"

    def _lines(self, keys: set[str]) -> Iterator[tuple[str, str]]:
        """Yields keys and where they stand, the first place last."""
        found: list[tuple[str, str]] = []
        seen = 0
        todo = [Path(self.given)] if self.given else [self.user, _SYSTEM]
        while todo and (seen := seen + 1) <= _MOST_FILES:
            path = todo.pop(0)
            try:
                text = path.read_bytes()[:_CONFIG_BYTES].decode("utf-8", "replace") if path.is_file() else ""
            except OSError:
                continue
            for number, line in enumerate(text.splitlines(), 1):
                words = line.replace("=", " ", 1).split()
                key = words[0].lower() if words else ""
                if key in keys:
                    found.append((key, f"{words[0]} ({path} line {number})"))
                elif key == "include":
                    base = path.parent if path == _SYSTEM else self.user.parent
                    names = (glob.glob(str(base / Path(word.strip('"')).expanduser())) for word in words[1:])  # noqa: PTH207 - Path.glob takes no absolute pattern
                    todo += [Path(name) for group in names for name in sorted(group)]
        yield from reversed(found)


def _files(ssh_config: Path | None) -> _Files:
    """Returns what to read. ssh takes the home folder of the user database, and the farm $HOME, as all its files."""
    user = Path.home() / ".ssh" / "config"
    if ssh_config is not None:
        return _Files(str(ssh_config), ssh_config)
    try:
        is_usual = Path(pwd.getpwuid(os.getuid()).pw_dir).resolve() == Path.home().resolve()
    except KeyError:
        is_usual = True
    if is_usual:
        return _Files(None, user)
    return _Files(next((str(path) for path in (user, _SYSTEM) if path.is_file()), "none"), user)


def tcp(hop: Hop, connect_s: float, unanswered_s: float) -> socket.socket:
    """Returns a TCP connection to the first address that answers. Raises OSError."""
    failure: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(hop.host, hop.port, hop.family, socket.SOCK_STREAM):
        wire = socket.socket(family, kind, protocol)
        try:
            wire.settimeout(connect_s)
            wire.connect(address)
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * unanswered_s))
            return wire
        except OSError as error:
            wire.close()
            failure = error
    raise failure or OSError("it has no address")


class Carrier:
    """A command that carries a connection, as ProxyCommand: what it reads and writes is a socket's."""

    def __init__(self, command: str) -> None:
        """Starts it by the shell, as ssh does. Raises OSError."""
        self.wire, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"], stdin=theirs.fileno(), stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError:
            self.wire.close()
            raise
        finally:
            theirs.close()

    def close(self) -> None:
        self.wire.close()
        self._process.kill()
        self._process.wait()
