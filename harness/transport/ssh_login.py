"""Logs in over SSH with keys, as OpenSSH does, and bounds what a server may send meanwhile."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko
from paramiko.agent import AgentSSH
from paramiko.auth_handler import AuthHandler
from paramiko.packet import Packetizer

from harness.errors import UnreachableError
from harness.transport.failures import reason_of
from harness.transport.ssh_config import Hop

FIRST_PACKET_BYTES = 64 << 10  # before the login; OpenSSH sends some thousands
MOST_PACKET_BYTES = (256 << 10) + 1024  # OpenSSH's PACKET_MAX_SIZE, and room for a MAC
MOST_BANNER_BYTES = 64 << 10  # before the first packet
MOST_KEY_BYTES = 1 << 20  # of a private key's file


class Packets(Packetizer):
    """Bounds what a peer may send before anybody knows who it is, and ends the handshake without a thread for it."""

    most_bytes = FIRST_PACKET_BYTES
    _read_bytes = 0
    _end: float | None = None

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        if not 0 <= n <= self.most_bytes:
            raise paramiko.SSHException(f"a packet of {n} bytes, which no SSH server sends")
        content: bytes = super().read_all(n, check_rekey)
        return content

    def _read_timeout(self, timeout: float) -> bytes:
        piece: bytes = super()._read_timeout(timeout)  # type: ignore[misc]
        self._read_bytes += len(piece)
        if self._read_bytes > MOST_BANNER_BYTES:
            raise paramiko.SSHException(f"more than {MOST_BANNER_BYTES} bytes before the first packet")
        return piece

    def start_handshake(self, timeout: float) -> None:
        self._end = time.monotonic() + timeout

    def handshake_timed_out(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def complete_handshake(self) -> None:
        self._end = None


class BoundedTransport(paramiko.Transport):
    """Bounds packets, and asks once for the service of logins, as servers expect: asyncssh hangs up otherwise."""

    packetizer: Packets

    def __init__(self, wire: Any, **options: Any) -> None:
        super().__init__(wire, packetizer_class=Packets, **options)
        self.may_login = False

    def auth_none(self, username: str) -> list[str]:
        return self._login(lambda handler, answered: handler.auth_none(username, answered))

    def auth_publickey(self, username: str, key: paramiko.PKey, event: threading.Event | None = None) -> list[str]:
        return self._login(lambda handler, answered: handler.auth_publickey(username, key, answered))

    def _login(self, act: Callable[[AuthHandler, threading.Event], object]) -> list[str]:
        if not self.is_active() or not self.initial_kex_done:
            raise paramiko.SSHException("No existing session")
        answered = threading.Event()
        self.auth_handler = _Handler(self)
        act(self.auth_handler, answered)
        more: list[str] = self.auth_handler.wait_for_response(answered)
        return more

    def _parse_ext_info(self, message: paramiko.Message) -> None:
        """Ignores what extensions the server has: of their number it may say anything, and each is waited for."""


class _Handler(AuthHandler):
    """Goes on without another request for the service where it was granted."""

    transport: BoundedTransport

    def _request_auth(self) -> None:
        if not self.transport.may_login:
            super()._request_auth()  # type: ignore[misc]
            return
        granted = paramiko.Message()
        granted.add_string("ssh-userauth")
        granted.rewind()
        self._parse_service_accept(granted)

    def _parse_service_accept(self, message: paramiko.Message) -> None:
        self.transport.may_login = True
        super()._parse_service_accept(message)  # type: ignore[misc]


@dataclass
class Login:
    """Logs in with keys, as OpenSSH does: paramiko's AuthStrategy. Its UnreachableError says what was offered."""

    device: str
    hop: Hop
    identity_file: str | None
    wait_s: float

    def authenticate(self, transport: BoundedTransport) -> None:
        told: list[str] = []
        offered = 0
        with _agent(self.hop, self.wait_s) as agent:
            try:
                with suppress(paramiko.BadAuthenticationType):  # as ssh does: some servers want no more
                    transport.auth_none(self.hop.user)
                    return
                for key in self._keys(agent, told):
                    offered += 1
                    try:
                        if transport.auth_publickey(self.hop.user, key):
                            told.append("the key is accepted, and a second factor is asked for")
                    except paramiko.BadAuthenticationType:
                        raise
                    except Exception as error:  # noqa: BLE001 - an agent may fail of one key
                        if not isinstance(error, paramiko.AuthenticationException):
                            told.append(reason_of(error))
                    if transport.is_authenticated():
                        return
                    if not transport.is_active():
                        told.append(f"the server hung up after {offered} key{'s' if offered > 1 else ''}")
                        break
            except paramiko.BadAuthenticationType as error:
                told.append(f"it takes no keys, only {', '.join(error.allowed_types)}")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this device's
                told.append(reason_of(error))
        keys = f"{offered} key{'s were' if offered > 1 else ' was'} offered" if offered else "there is no key to offer"
        why = "; ".join([keys, *dict.fromkeys(told)])
        make = "" if offered or told else "make a key with `ssh-keygen -t ed25519`, and "
        raise UnreachableError(
            f"{self.device}: {self.hop} refuses the login ({why}): {make}add your public key there with ssh-copy-id, "
            f"or set user and identity_file in the inventory{self.hop.noted}"
        )

    def _keys(self, agent: list[paramiko.AgentKey], told: list[str]) -> Iterator[paramiko.PKey]:
        """Yields the keys to offer: identities, each from the agent where that has it, then the agent's others."""
        left = {key.asbytes(): key for key in agent}
        for path in self.hop.identities:
            public = _public_part(path) or _public_part(path.with_name(f"{path.name}.pub"))
            if public in left:
                yield left.pop(public)
            elif path.is_file() and path.suffix != ".pub":
                try:
                    if path.stat().st_size > MOST_KEY_BYTES:
                        raise ValueError("too large for a key")
                    key = paramiko.PKey.from_path(str(path))
                except Exception as error:  # noqa: BLE001 - whatever it is, it is no key
                    locked = isinstance(error, paramiko.PasswordRequiredException) or "assword" in str(error)
                    why = "has a passphrase, see ssh-add" if locked else f"is no private key ({reason_of(error)})"
                    told.append(f"{path} {why}")
                else:
                    yield left.pop(key.asbytes(), key)
        if not self.hop.identities_only:
            yield from left.values()


def _public_part(path: Path) -> bytes | None:
    """Returns the key of a .pub file; None where it is none."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_KEY_BYTES:
            return None
        words = path.read_bytes().split(maxsplit=2)
        return paramiko.pkey.PublicBlob.from_string(b" ".join(words[:2]).decode()).key_blob
    except Exception:  # noqa: BLE001 - whatever it is, it is no public key
        return None


@contextmanager
def _agent(hop: Hop, wait_s: float) -> Iterator[list[paramiko.AgentKey]]:
    """Yields the keys of the agent, none where there is no agent or it does not answer."""
    agent = AgentSSH()
    try:
        if hop.agent:
            wire = socket.socket(socket.AF_UNIX)
            try:
                wire.settimeout(wait_s)
                wire.connect(hop.agent)
                agent._connect(wire)  # type: ignore[attr-defined]
            except Exception:  # noqa: BLE001 - the same as no agent
                wire.close()
        yield list(agent.get_keys())
    finally:
        agent._close()  # type: ignore[attr-defined]
