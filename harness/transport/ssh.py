"""Reaches devices over SSH, on paramiko and fabric's Connection; ssh_config.py says how OpenSSH would.

Unknown and changed host keys are refused, of jump hosts, too, by the farm's own known_hosts. Commands go through a
channel of our own, built by shell.py, with bounded output. Each wait has an end, each packet a bound, and each
connection that fails is closed. Nagle's algorithm is off: it costs 40 ms a command.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import paramiko
from fabric import Config, Connection

from device_inventory import Device
from harness.errors import UnreachableError
from harness.transport import Keyring, Reach, TransportKind
from harness.transport.failures import of_device, reason_of
from harness.transport.known_hosts import HostKey, KnownHosts, keys_of, refuse_revoked, verify
from harness.transport.shell import STALL_S, ShellTransport
from harness.transport.ssh_config import Carrier, Hop, hops, tcp
from harness.transport.ssh_files import check_keys, check_known_hosts
from harness.transport.ssh_login import MOST_PACKET_BYTES, BoundedTransport, Login

CONNECT_S = 15.0
KEEPALIVE_S = 5
UNANSWERED_S = 15.0  # what was sent and not acknowledged for so long ends the connection (TCP_USER_TIMEOUT)
MOST_UNREAD_BYTES = 16 << 20  # of a command's output: eight times what its window allows
_ALGORITHMS = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}
# What a lost link or a broken peer raises: what the peer sent is parsed in a thread of paramiko, which passes on
# whatever that ends with (struct.error, ValueError, UnicodeError ...).
_BROKEN = (Exception,)
logging.getLogger("paramiko").addHandler(logging.NullHandler())  # its failures reach the user as our errors


class SshTransport(ShellTransport):
    """Reaches one device of the inventory. Connects at the first act, and again after the link was lost."""

    def __init__(
        self,
        device: Device,
        known_hosts: Path,
        *,
        ssh_config: Path | None = None,
        connect_s: float = CONNECT_S,
        unanswered_s: float = UNANSWERED_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(device.name, clock=clock)
        self._device = device
        self._known_hosts = known_hosts
        self._ssh_config = ssh_config
        self._connect_s = connect_s
        self._unanswered_s = unanswered_s
        self._link: _Link | None = None

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _execute(
        self,
        command_line: str,
        stdin: Iterable[bytes],
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        *,
        wait_s: float,
        silence_s: float | None,
    ) -> int:
        end = self._clock() + wait_s
        channel = self._open_channel()
        try:
            channel.settimeout(min(STALL_S, wait_s))
            try:
                channel.exec_command(command_line)
            except _BROKEN as error:
                raise UnreachableError(f"{self.name}: the connection was lost: {reason_of(error)}") from None
            self._send(channel, stdin)
            status = self._receive(channel, on_stdout, on_stderr, end, silence_s)
            if status < 0 and self._link_is_lost(channel):
                raise UnreachableError(f"{self.name}: the connection was lost while a command ran")
            return status
        except UnreachableError:
            self.close()
            raise
        finally:
            with suppress(*_BROKEN):
                channel.close()

    def _send(self, channel: paramiko.Channel, stdin: Iterable[bytes]) -> None:
        """Sends all input. A command that ends before it has read everything is no error: its exit status tells."""
        for piece in stdin:
            view = memoryview(piece)
            while view:
                try:
                    view = view[channel.send(view) :]  # type: ignore[arg-type]
                except TimeoutError:
                    raise UnreachableError(f"{self.name}: the device took no input for {STALL_S:g} s") from None
                except _BROKEN:  # the channel is closed
                    return
        with suppress(*_BROKEN):  # the same, at the last moment
            channel.shutdown_write()

    def _receive(
        self,
        channel: paramiko.Channel,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        end: float,
        silence_s: float | None,
    ) -> int:
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        heard = self._clock()
        while True:
            ended = channel.closed or (channel.eof_received and channel.exit_status_ready())
            moved = False
            if channel.recv_ready():
                on_stdout(channel.recv(1 << 16))
                moved = True
            if channel.recv_stderr_ready():
                on_stderr(channel.recv_stderr(1 << 16))
                moved = True
            if ended and not moved:
                return channel.exit_status
            now = self._clock()
            if now >= end:
                raise TimeoutError
            if len(channel.in_buffer) + len(channel.in_stderr_buffer) > MOST_UNREAD_BYTES:
                raise UnreachableError(f"{self.name}: the device sends more than it may, and does not wait")
            if moved:
                heard = now
                continue
            if silence_s is not None and now - heard >= silence_s:
                raise UnreachableError(f"{self.name}: no sign of life for {silence_s:g} s")
            if channel.eof_received:  # the pipe stays readable from here on: wait for the exit status instead
                channel.status_event.wait(0.05)
            else:
                poll.poll(1000 * min(end - now, 1.0))

    def _link_is_lost(self, channel: paramiko.Channel) -> bool:
        """Tells whether an exit status of -1 means that the connection ended, not that a signal killed the command."""
        transport = channel.get_transport()
        transport.join(0.2)  # its thread closes the channels a moment before it says that it is no longer active
        return not transport.is_active()

    def _open_channel(self) -> paramiko.Channel:
        """Opens a session on a connection that works; replaces a dead connection once."""
        for _ in range(2):
            reused = self._link is not None and self._link.is_open
            if not reused:
                self.close()
                self._link = self._connect()
            assert self._link is not None
            try:
                channel: paramiko.Channel = self._link.transport.open_session(timeout=self._connect_s)
                return channel
            except _BROKEN as error:
                self.close()
                reason = reason_of(error)
                if not reused:
                    break
        raise UnreachableError(f"{self.name}: connected, but the device opens no session: {reason}")

    def _connect(self) -> _Link:
        link = _chain(self._device, self._known_hosts, self._ssh_config, self._connect_s)[-1]
        try:
            link.open(self._unanswered_s)
        except BaseException:
            link.close()
            raise
        return link


def presented_keys(
    device: Device, known_hosts: Path, *, ssh_config: Path | None = None, connect_s: float = CONNECT_S
) -> Iterator[HostKey]:
    """Yields the host keys that a device's jump hosts, and then the device itself, present. Nothing logs in.

    Each must be in `known_hosts` before the next is asked for: what lies behind a jump host is reached through it,
    and only over a connection that is trusted.
    """
    last = len(_chain(device, known_hosts, ssh_config, connect_s)) - 1
    for hop in range(last + 1):
        link = _chain(device, known_hosts, ssh_config, connect_s)[hop]
        try:
            key = link.presented_key()
        finally:
            link.close()
        which = f" {hop + 1} of {last}" if last > 1 else ""
        yield key if hop == last else replace(key, whose=f"the jump host{which} on the way to the device")


def _chain(device: Device, known_hosts: Path, ssh_config: Path | None, connect_s: float) -> list[_Link]:
    """Returns the unopened connections to a device: its jump hosts in order, then the device, all strict."""
    chain: list[_Link] = []
    for hop in hops(device, ssh_config):
        chain.append(_Link(device, hop, KnownHosts(known_hosts), connect_s, chain[-1] if chain else None))
    return chain


class _Link:
    """One connection of the way to a device. Whatever fails of it is an UnreachableError or a HostKeyError."""

    def __init__(self, device: Device, hop: Hop, known: KnownHosts, connect_s: float, gateway: _Link | None) -> None:
        self._device, self._hop, self._known, self._connect_s = device, hop, known, connect_s
        self._gateway = gateway
        self._wire: Any = None
        self._carrier: Carrier | None = None
        # Of fabric's ways to read ssh_config none is used: an empty one, and no stray /etc/invoke.yml or ~/.fabric.yml.
        settings = Config(lazy=True, ssh_config=paramiko.SSHConfig())
        with of_device(device.name, f"the way to {hop} cannot be prepared", "correct it in the inventory"):
            self._connection = Connection(hop.host, user=hop.user, port=hop.port, config=settings)

    @property
    def is_open(self) -> bool:
        return bool(self._connection.is_connected)

    @property
    def transport(self) -> paramiko.Transport:
        transport: paramiko.Transport = self._connection.transport
        return transport

    def open(self, unanswered_s: float = UNANSWERED_S) -> None:
        """Opens the links before it and itself, with the settings that notice a dead one. Raises DeviceError."""
        name, hop, client = self._device.name, self._hop, self._connection.client
        wire = self._dial(unanswered_s)
        client.set_missing_host_key_policy(_Strict(name, self._filed_as, self._known))
        with of_device(name, *self._broken_handshake()):
            client.connect(
                hop.host, hop.port, hop.user, sock=wire, timeout=self._connect_s, banner_timeout=self._connect_s,
                auth_timeout=self._connect_s, channel_timeout=self._connect_s, transport_factory=self._transport,
                auth_strategy=Login(name, hop, self._device.identity_file, self._connect_s),
            )  # fmt: skip
            self._connection.transport = client.get_transport()
            self._connection.transport.packetizer.most_bytes = MOST_PACKET_BYTES
            self._connection.transport.set_keepalive(KEEPALIVE_S)

    def presented_key(self) -> HostKey:
        """Opens the links before it, and returns the key that it presents; nothing logs in. Raises DeviceError."""
        transport = self._transport(self._dial(UNANSWERED_S))
        try:
            with of_device(self._device.name, *self._broken_handshake()):
                transport.start_client(timeout=self._connect_s)
                found = transport.get_remote_server_key()
                key = HostKey(self._filed_as, found.get_name(), found.asbytes())
                refuse_revoked(self._device.name, key, self._known)
                return key
        finally:
            transport.close()

    def close(self) -> None:
        """Closes it and the links before it, however far they came."""
        for part in (self._connection.client, self._wire, self._carrier, self._gateway):
            if part is not None:
                with suppress(Exception):
                    part.close()
        self._wire = self._carrier = None

    @property
    def _filed_as(self) -> str:
        """Returns the name under which OpenSSH files the host in known_hosts."""
        hop = self._hop
        return hop.alias or (hop.host if hop.port == 22 else f"[{hop.host}]:{hop.port}")

    def _dial(self, unanswered_s: float) -> Any:
        """Returns what carries the connection: a socket, a channel of the gateway, or a command."""
        name, hop = self._device.name, self._hop
        if self._gateway is not None:
            self._gateway.open(unanswered_s)
        try:
            if self._gateway is not None:
                self._wire = self._gateway.transport.open_channel(
                    "direct-tcpip", (hop.host, hop.port), ("", 0), timeout=self._connect_s
                )
            elif hop.command is not None:
                self._carrier = Carrier(hop.command)
                self._wire = self._carrier.wire
            else:
                self._wire = tcp(hop, self._connect_s, unanswered_s)
        except socket.gaierror as error:
            self._fail(f"{name}: the name {hop.host} is not known ({reason_of(error)}): is it spelled as it should be?")
        except paramiko.ChannelException as error:
            via = f" from its jump host {self._gateway._hop}" if self._gateway is not None else ""
            remedy = "is it on, and does the jump host allow TCP forwarding?"
            self._fail(f"{name}: {hop} cannot be reached{via} ({reason_of(error)}): {remedy}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this device's
            self._fail(
                f"{name}: {hop} cannot be reached ({reason_of(error)}): is it on, and is its SSH server running?"
            )
        return self._wire

    def _fail(self, message: str) -> NoReturn:
        raise UnreachableError(message + self._hop.noted) from None

    def _broken_handshake(self) -> tuple[str, str]:
        what = f"{self._hop} answers, and the SSH handshake with it failed"
        remedy = f"does an SSH server listen on that port, and does it let this machine in?{self._hop.noted}"
        return what, remedy

    def _transport(self, wire: Any, **options: Any) -> paramiko.Transport:
        """Returns an unstarted transport that asks first for the kind of key that is known.

        A server has keys of several kinds: a good key of another kind would look changed.
        """
        transport = BoundedTransport(wire, **options)
        transport.banner_timeout = self._connect_s
        security = transport.get_security_options()
        known = {
            algorithm
            for key in keys_of(self._device.name, self._filed_as, self._known)
            for algorithm in _ALGORITHMS.get(key.kind, (key.kind,))
        }
        kinds = list(security.key_types)
        security.key_types = sorted(kinds, key=lambda kind: (kind not in known, kinds.index(kind)))
        return transport


class _Strict(paramiko.MissingHostKeyPolicy):
    """Compares the key that was presented with the farm's own known_hosts."""

    def __init__(self, device: str, filed_as: str, known: KnownHosts) -> None:
        self._device, self._filed_as, self._known = device, filed_as, known

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        verify(self._device, HostKey(self._filed_as, key.get_name(), key.asbytes()), self._known)


def _reach(device: Device, keyring: Keyring) -> Reach:
    connect = partial(
        SshTransport, device, keyring.known_hosts, ssh_config=keyring.ssh_config, connect_s=device.connect_s
    )
    return Reach(connect)


def _address(device: Device) -> str:
    user = f"{device.user}@" if device.user else ""
    port = f":{device.port}" if device.port else ""
    via = f" via {device.proxy_jump}" if device.proxy_jump else ""
    return f"{user}{device.host}{port}{via}"


SSH = TransportKind(
    open=_reach,
    address=_address,
    trust=lambda device, keyring: presented_keys(device, keyring.known_hosts, ssh_config=keyring.ssh_config),
    checks={"known-hosts": check_known_hosts, "keys": check_keys},
)
