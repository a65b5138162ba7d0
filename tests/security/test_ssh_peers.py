"""What is no honest SSH server: its packets are bounded, and a connection that fails leaves nothing open."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import paramiko
import pytest

from device_inventory import Device
from harness.errors import DeviceError, UnreachableError
from harness.transport.known_hosts import HostKey, KnownHosts
from harness.transport.ssh import SshTransport, presented_keys
from harness.transport.ssh_login import BoundedTransport
from tests.programs.fuzz.ssh import KINDS, LyingServer

Serve = Callable[[Callable[[socket.socket], None]], int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(act) -> the port of a server that does `act` with each connection."""
    servers: list[socket.socket] = []

    def start(act: Callable[[socket.socket], None]) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)
        threading.Thread(target=accept, args=(server, act), daemon=True).start()
        port: int = server.getsockname()[1]
        return port

    def accept(server: socket.socket, act: Callable[[socket.socket], None]) -> None:
        with suppress(OSError):
            while True:
                wire, _ = server.accept()
                threading.Thread(target=talk, args=(wire, act), daemon=True).start()

    def talk(wire: socket.socket, act: Callable[[socket.socket], None]) -> None:
        with suppress(OSError), wire:
            act(wire)

    yield start
    for server in servers:
        server.close()


def endless_packet(wire: socket.socket) -> None:
    wire.sendall(b"SSH-2.0-OpenSSH_9.9\r\n" + struct.pack(">I", 0xFFFFFFF4))
    while True:
        wire.sendall(bytes(1 << 16))


def endless_banner(wire: socket.socket) -> None:
    while True:
        wire.sendall(b"y" * (1 << 16))


def garbage(wire: socket.socket) -> None:
    wire.sendall(b"SSH-2.0-x\r\n" + struct.pack(">IBB", 12, 4, 20) + os.urandom(10))
    wire.recv(1 << 16)
    time.sleep(60)


def hung_up(wire: socket.socket) -> None:
    wire.recv(1)


def silence(wire: socket.socket) -> None:
    time.sleep(60)


def failure(
    port: int, folder: Path, act: Callable[[SshTransport], object] = lambda t: t.run(["true"], deadline_s=2)
) -> str:
    transport = SshTransport(Device("liar", "127.0.0.1", port=port, user="me"), folder / "known_hosts", connect_s=0.5)
    with pytest.raises(UnreachableError) as raised:
        act(transport)
    return str(raised.value)


@pytest.mark.parametrize(
    ("act", "told"),
    [(endless_packet, "a packet of 4294967"), (endless_banner, "more than 65536 bytes before the first packet")],
)
def test_what_comes_before_the_login_is_bounded(
    serve: Serve, tmp_path: Path, act: Callable[[socket.socket], None], told: str
) -> None:
    port = serve(act)
    tracemalloc.start()
    try:
        assert told in failure(port, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("act", [endless_packet, endless_banner, garbage, hung_up, silence])
def test_a_connection_that_fails_leaves_nothing_open(
    serve: Serve, tmp_path: Path, act: Callable[[socket.socket], None]
) -> None:
    port = serve(act)
    device = Device("liar", "127.0.0.1", port=port, user="me")
    opened = own_sockets(port)
    transport = SshTransport(device, tmp_path / "known_hosts", connect_s=0.3)
    for _ in range(3):  # and nobody calls close()
        with pytest.raises(UnreachableError):
            transport.run(["true"], deadline_s=2)
        with pytest.raises(DeviceError):
            list(presented_keys(device, tmp_path / "known_hosts", connect_s=0.3))
    settled(lambda: own_sockets(port) <= opened, "sockets to be closed")
    settled(lambda: not [t for t in threading.enumerate() if isinstance(t, (paramiko.Transport, threading.Timer))],
            "threads to end")  # fmt: skip


def own_sockets(port: int) -> int:
    """Returns how many connections to the port this process has open, as a client."""
    mine = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(f"socket:[{words[9]}]" in mine and words[2].endswith(f":{port:04X}") for words in lines)


def settled(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"waited 30 s for {what}"
        time.sleep(0.05)


def test_extensions_without_end_are_not_waited_for() -> None:
    message = paramiko.Message()
    message.add_int(0xFFFFFFFF)
    message.rewind()
    near, far = socket.socketpair()
    with near, far:
        BoundedTransport(near)._parse_ext_info(message)


def flood(channel: paramiko.Channel, mark: bytes) -> None:
    """Sends output as fast as it can, where two megabytes are allowed."""
    with suppress(Exception):
        channel.sendall(b"begin-" + mark)
        for _ in range(1000):
            channel.out_window_size = 1 << 30  # type: ignore[attr-defined]
            channel.sendall(bytes(1 << 16))


def test_a_device_that_heeds_no_window_is_given_up(tmp_path: Path) -> None:
    server = LyingServer(flood)
    known = KnownHosts(tmp_path / "known_hosts")
    known.store(HostKey(f"[127.0.0.1]:{server.port}", server.key.get_name(), server.key.asbytes()))
    transport = SshTransport(Device("liar", "127.0.0.1", port=server.port, user="me"), known.path, connect_s=5)
    transport._knows_timeout = True
    try:
        with pytest.raises(UnreachableError, match="liar: the device sends more than it may, and does not wait"):
            transport.run(["true"], deadline_s=30, on_stdout=lambda piece: time.sleep(0.5))
    finally:
        transport.close()
        server.close()


def test_each_kind_of_wrong_packet_is_tried_by_the_fuzz() -> None:
    assert len(KINDS) > 12
