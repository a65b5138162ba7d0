"""Reaches devices over SSH, on fabric, whose Connection knows ssh_config, aliases and jump hosts.

Four of its defaults are not ours. It accepts unknown and changed host keys: here every connection of the chain, jump
hosts included, loads the farm's own known_hosts and refuses others. Its `run` quotes no environment and keeps all
output: here commands go through a channel of our own, built by shell.py, with bounded output. Its waits have no end:
here each has one. And it leaves Nagle's algorithm on, which costs 40 ms a command.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import paramiko
from fabric import Config, Connection

from device_inventory import Device
from harness.errors import FarmError, HostKeyError, UnreachableError
from harness.transport import Keyring, Reach, TransportKind
from harness.transport.known_hosts import HostKey, KnownHosts
from harness.transport.shell import STALL_S, ShellTransport
from harness.transport.ssh_files import check_keys, check_known_hosts
from reports.text import harmless

CONNECT_S = 15.0
KEEPALIVE_S = 5
UNANSWERED_S = 15.0  # what was sent and not acknowledged for so long ends the connection (TCP_USER_TIMEOUT)
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
        self._connection: Connection | None = None

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            _close(connection)

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
                raise UnreachableError(f"{self.name}: the connection was lost: {_reason(error)}") from None
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
            while channel.recv_ready():
                on_stdout(channel.recv(1 << 16))
                moved = True
            while channel.recv_stderr_ready():
                on_stderr(channel.recv_stderr(1 << 16))
                moved = True
            if ended:
                return channel.exit_status
            now = self._clock()
            if now >= end:
                raise TimeoutError
            if moved:
                heard = now
            elif silence_s is not None and now - heard >= silence_s:
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
            reused = self._connection is not None and self._connection.is_connected
            if not reused:
                self.close()
                self._connection = self._connect()
            assert self._connection is not None
            try:
                channel: paramiko.Channel = self._connection.transport.open_session(timeout=self._connect_s)
                return channel
            except _BROKEN as error:
                self.close()
                reason = _reason(error)
                if not reused:
                    break
        raise UnreachableError(f"{self.name}: connected, but the device opens no session: {reason}")

    def _connect(self) -> Connection:
        connection = _chain(self._device, self._known_hosts, self._ssh_config, self._connect_s)[-1]
        with _explained(self._device, connection):
            _open(connection, self._unanswered_s)
        return connection


def presented_keys(
    device: Device, known_hosts: Path, *, ssh_config: Path | None = None, connect_s: float = CONNECT_S
) -> Iterator[HostKey]:
    """Yields the host keys that a device's jump hosts, and then the device itself, present. Nothing logs in.

    Each must be in `known_hosts` before the next is asked for: what lies behind a jump host is reached through it,
    and only over a connection that is trusted.
    """
    hops = len(_chain(device, known_hosts, ssh_config, connect_s))
    for hop in range(hops):
        connection = _chain(device, known_hosts, ssh_config, connect_s)[hop]
        try:
            with _explained(device, connection):
                if isinstance(connection.gateway, Connection):
                    _open(connection.gateway)
                key = _presented_key(connection, KnownHosts(known_hosts), connect_s)
        finally:
            _close(connection)
        yield key


def _presented_key(connection: Connection, known: KnownHosts, connect_s: float) -> HostKey:
    if connection.gateway:
        wire = connection.open_gateway()
    else:
        wire = socket.create_connection((connection.host, connection.port), connect_s)
    transport = paramiko.Transport(wire)
    try:
        name = _filed_name(connection)
        algorithms = [_ALGORITHMS.get(key.kind, (key.kind,)) for key in known.find(name)]
        options = transport.get_security_options()
        wanted = [algorithm for group in algorithms for algorithm in group if algorithm in options.key_types]
        # A server has keys of several kinds: ask for the kind that is known, or a good key would look changed.
        options.key_types = [*wanted, *(kind for kind in options.key_types if kind not in wanted)]
        transport.start_client(timeout=connect_s)
        key = transport.get_remote_server_key()
        return HostKey(name, key.get_name(), key.asbytes())
    finally:
        transport.close()


_ALGORITHMS = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}


def _chain(device: Device, known_hosts: Path, ssh_config: Path | None, connect_s: float) -> list[Connection]:
    """Returns the unopened connections to a device: its jump hosts in order, then the device, all strict."""
    identity = Path(device.identity_file).expanduser() if device.identity_file else None
    if identity is not None and not identity.is_file():
        raise UnreachableError(f"{device.name}: identity_file {identity} does not exist: correct it in the inventory")

    def options() -> dict[str, Any]:  # anew each time: fabric writes into it
        return {
            "key_filename": [str(identity)] if identity else [],
            "look_for_keys": identity is None,
            "banner_timeout": connect_s,
            "auth_timeout": connect_s,
            "channel_timeout": connect_s,
        }

    # Lazy: a stray /etc/invoke.yml or ~/.fabric.yml has no say. The overrides reach jump hosts named in ssh_config.
    overrides = {"connect_kwargs": options(), "timeouts": {"connect": int(connect_s)}}
    config = Config(lazy=True, overrides=overrides, runtime_ssh_path=str(ssh_config) if ssh_config else None)
    try:
        config.load_ssh_config()
        gateway = None
        for jump in device.proxy_jump.split(",") if device.proxy_jump else ():
            gateway = Connection(jump, config=config.clone(), gateway=gateway, connect_kwargs=options())
        connection = Connection(
            device.host,
            user=device.user,
            port=device.port,
            config=config,
            gateway=gateway,
            connect_timeout=int(connect_s),
            connect_kwargs=options(),
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this device's
        raise UnreachableError(f"{device.name}: ssh_config cannot be used: {_reason(error)}") from None
    chain = [connection]
    while isinstance(chain[0].gateway, Connection):
        chain.insert(0, chain[0].gateway)
    for link in chain:
        files = link.connect_kwargs.get("key_filename") or []
        link.connect_kwargs["key_filename"] = [f for f in files if Path(f).expanduser().is_file()]  # as OpenSSH does
        if known_hosts.exists():
            link.client.load_host_keys(str(known_hosts))
        link.client.set_missing_host_key_policy(_Refuse(device, known_hosts))
    return chain


class _Refuse(paramiko.MissingHostKeyPolicy):
    def __init__(self, device: Device, known_hosts: Path) -> None:
        self._device, self._known_hosts = device, known_hosts

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        raise HostKeyError(
            f"{self._device.name}: the host key of {hostname} is unknown ({key.get_name()} {key.fingerprint}): "
            f"compare it with the device's own and run `edgemoe-farm trust {self._device.name}`"
        )


def _open(connection: Connection, unanswered_s: float = UNANSWERED_S) -> None:
    """Opens a connection and the gateways before it, each with the settings that notice a dead link."""
    if isinstance(connection.gateway, Connection):
        _open(connection.gateway, unanswered_s)
    connection.open()
    transport = connection.transport
    transport.set_keepalive(KEEPALIVE_S)
    if isinstance(transport.sock, socket.socket):  # behind a gateway it is a channel
        transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * unanswered_s))


def _close(connection: Connection) -> None:
    connection.close()
    if isinstance(connection.gateway, Connection):
        _close(connection.gateway)


def _filed_name(connection: Connection) -> str:
    """Returns the name under which OpenSSH files the host in known_hosts."""
    return connection.host if connection.port == 22 else f"[{connection.host}]:{connection.port}"


@contextmanager
def _explained(device: Device, connection: Connection) -> Iterator[None]:
    """Turns what paramiko and the sockets raise while connecting into one line that names device and remedy."""
    name, where = device.name, f"{connection.user}@{connection.host} port {connection.port}"
    try:
        yield
    except FarmError:
        raise
    except paramiko.BadHostKeyException as error:
        raise HostKeyError(
            f"{name}: the host key of {error.hostname} has CHANGED: {error.expected_key.fingerprint} is trusted, "
            f"{error.key.fingerprint} was presented. If the device was set up anew: "
            f"`edgemoe-farm trust {name} --replace`; if not, someone may be between you and it"
        ) from None
    except (paramiko.AuthenticationException, paramiko.PasswordRequiredException) as error:
        raise UnreachableError(
            f"{name}: {where} refuses the login ({_reason(error)}): add your public key there with ssh-copy-id, or "
            "set user and identity_file in the inventory"
        ) from None
    except _BROKEN as error:
        raise UnreachableError(
            f"{name}: {where} cannot be reached ({_reason(error)}): is it on, and is its SSH server running?"
        ) from None


def _reason(error: BaseException) -> str:
    text = str(error) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)
    return harmless(text, limit=300)


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
