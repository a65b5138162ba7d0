"""Logins on real OpenSSH servers: agents, identities, known_hosts, and what is said where one fails."""

from __future__ import annotations

import base64
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_inventory import Device
from harness.device.trust import trust
from harness.errors import DeviceError, HostKeyError, UnreachableError
from harness.transport.ssh import SshTransport
from tests.integration.conftest import Sshd

pytestmark = pytest.mark.integration

OFF = "is it on, and is its SSH server running"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty home folder, and no agent."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """agent(*keys) -> the socket of an agent that holds them."""
    pids: list[int] = []

    def start(*keys: Path) -> str:
        place = tmp_path / f"agent{len(pids)}"
        told = subprocess.run(["ssh-agent", "-s", "-a", place], capture_output=True, text=True, check=True).stdout
        found = re.search(r"SSH_AGENT_PID=(\d+)", told)
        assert found is not None
        pids.append(int(found[1]))
        for key in keys:
            environment = {**os.environ, "SSH_AUTH_SOCK": str(place)}
            subprocess.run(["ssh-add", "-q", key], env=environment, check=True, capture_output=True)
        return str(place)

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGTERM)


def keys(folder: Path, count: int) -> list[Path]:
    made = [folder / f"other{n}" for n in range(count)]
    for path in made:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return made


def hello(device: Device, known_hosts: Path) -> None:
    connection = SshTransport(device, known_hosts, connect_s=5)
    try:
        assert connection.run(["echo", "hello"], deadline_s=20).stdout == b"hello\n"
    finally:
        connection.close()


def without_key(server: Sshd) -> Device:
    return dataclasses.replace(server.device, identity_file=None)


def refusal(device: Device, known_hosts: Path) -> str:
    with pytest.raises(UnreachableError) as raised:
        hello(device, known_hosts)
    assert OFF not in str(raised.value)
    return str(raised.value)


# --- keys and agents --------------------------------------------------------------------------------------------------


def test_no_key_at_all(sshd: Sshd) -> None:
    told = refusal(without_key(sshd), sshd.known_hosts)
    assert "refuses the login (there is no key to offer): make a key with `ssh-keygen -t ed25519`" in told


def test_a_key_of_an_agent(sshd: Sshd, agent: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", agent(sshd.client_key))
    hello(without_key(sshd), sshd.known_hosts)


def test_an_agent_with_more_keys_than_the_server_takes(
    sshd: Sshd, agent: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", agent(*keys(tmp_path, 7), sshd.client_key))
    told = refusal(without_key(sshd), sshd.known_hosts)
    assert re.search(r"refuses the login \([67] keys were offered; the server hung up after [67] keys\)", told)
    hello(sshd.device, sshd.known_hosts)  # the key that is named comes first
    (home / ".ssh/config").write_text(f"Host *\n IdentityFile {sshd.client_key}.pub\n IdentitiesOnly yes\n")
    hello(without_key(sshd), sshd.known_hosts)  # the agent's, chosen by its public part
    (home / ".ssh/config").write_text(f"Host *\n IdentityFile {tmp_path}/other1.pub\n IdentitiesOnly yes\n")
    assert "(1 key was offered)" in refusal(without_key(sshd), sshd.known_hosts)


def test_the_agent_that_ssh_config_names(sshd: Sshd, agent: Callable[..., str], home: Path) -> None:
    (home / ".ssh/config").write_text(f"IdentityAgent {agent(sshd.client_key)}\n")
    hello(without_key(sshd), sshd.known_hosts)
    (home / ".ssh/config").write_text(f"IdentityAgent {home}/none\n")
    assert "no key to offer" in refusal(without_key(sshd), sshd.known_hosts)


@pytest.mark.parametrize(
    "content", [b"\xff\x00" * 3000, b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", b"x" * (2 << 20)]
)
def test_an_identity_file_that_is_no_key_is_named(sshd: Sshd, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken"
    path.write_bytes(content)
    told = refusal(dataclasses.replace(sshd.device, identity_file=str(path)), sshd.known_hosts)
    assert f"{path} is no private key" in told
    assert told.isprintable()


def test_a_key_with_a_passphrase_is_the_agents(
    sshd: Sshd, agent: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", agent(sshd.client_key))
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "a secret", "-f", sshd.client_key], check=True)
    hello(sshd.device, sshd.known_hosts)
    monkeypatch.delenv("SSH_AUTH_SOCK")
    assert f"{sshd.client_key} has a passphrase, see ssh-add" in refusal(sshd.device, sshd.known_hosts)


def test_a_server_that_takes_no_keys(make_sshd: Callable[..., Sshd]) -> None:
    server = make_sshd("pi", "PubkeyAuthentication no", "PasswordAuthentication yes")
    told = refusal(server.device, server.known_hosts)
    assert "refuses the login" in told


# --- known_hosts ------------------------------------------------------------------------------------------------------

CA = "@cert-authority *.lab ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFQZ0IZ/xgdQPSb+6S4ve/OH6UdH/nROuVCrAxGTZ0y6 our CA"


@pytest.mark.parametrize(
    "line",
    [
        CA,
        "@revoked * ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "@revoked",
        "@",
        "damaged",
        "[127.0.0.1]:22 ssh-ed25519 AAAA",
        "x ssh-ed25519 \u00e9\u00e9",
        "|1|x|y ssh-ed25519 AAAA",
        "* ssh-foo AAAA",
        "\udcff\udcfe\x00\x01",
        "* ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA",
    ],
)
def test_a_line_that_is_of_no_use_takes_no_host_away(sshd: Sshd, line: str) -> None:
    good = sshd.known_hosts.read_bytes()
    for content in (
        line.encode("utf-8", "surrogateescape") + b"\n" + good,
        good + line.encode("utf-8", "surrogateescape"),
    ):
        sshd.known_hosts.write_bytes(content)
        hello(sshd.device, sshd.known_hosts)
    trust(sshd.device, sshd.known_hosts, lambda key: True)
    assert sshd.known_hosts.read_bytes() == content, "nothing that was there is lost"


def test_a_revoked_key_is_refused_and_not_trusted_again(sshd: Sshd) -> None:
    key = sshd.host_key
    line = f"@revoked * {key.kind} {base64.b64encode(key.content).decode()}\n"
    sshd.known_hosts.write_text(sshd.known_hosts.read_text() + line)
    for act in (
        lambda: hello(sshd.device, sshd.known_hosts),
        lambda: trust(sshd.device, sshd.known_hosts, lambda key: True),
    ):
        with pytest.raises(HostKeyError, match=f"is REVOKED by {sshd.known_hosts} line 2"):
            act()


def test_an_authority_is_named_where_a_key_is_unknown(make_sshd: Callable[..., Sshd]) -> None:
    server = make_sshd(trusted=False)
    server.known_hosts.write_text(f"\n@cert-authority [127.*]:* ssh-ed25519 {CA.split()[3]}\n")
    with pytest.raises(
        HostKeyError, match=r"is unknown .*known_hosts line 2 trusts an authority, which the farm does not"
    ):
        hello(server.device, server.known_hosts)


@pytest.mark.parametrize("pattern", ["[127.0.0.?]:*", "*", "x,[127.*", "[127.0.0.1]:{port}"])
def test_a_pattern_names_a_host(sshd: Sshd, pattern: str) -> None:
    key = sshd.known_hosts.read_text().split(" ", 1)[1]
    sshd.known_hosts.write_text(f"{pattern.format(port=sshd.port)} {key}")
    hello(sshd.device, sshd.known_hosts)
    sshd.known_hosts.write_text(f"{pattern.format(port=sshd.port)},![127.*]:* {key}")
    with pytest.raises(HostKeyError, match="is unknown"):
        hello(sshd.device, sshd.known_hosts)


def test_the_name_under_which_ssh_config_files_a_key(sshd: Sshd, home: Path) -> None:
    (home / ".ssh/config").write_text("HostKeyAlias Board\n")
    key = sshd.known_hosts.read_text().split(" ", 1)[1]
    with pytest.raises(HostKeyError, match="the host key of board is unknown"):
        hello(sshd.device, sshd.known_hosts)
    sshd.known_hosts.write_text(f"board {key}")
    hello(sshd.device, sshd.known_hosts)


def test_known_hosts_that_cannot_be_read(sshd: Sshd) -> None:
    sshd.known_hosts.unlink()
    sshd.known_hosts.mkdir()
    with pytest.raises(HostKeyError, match=r"pi: .*known_hosts cannot be read \(Is a directory\)"):
        hello(sshd.device, sshd.known_hosts)


# --- what is no SSH server --------------------------------------------------------------------------------------------


def serve(answer: bytes, *, close: bool) -> socket.socket:
    """Returns a server that sends the same to everybody."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            client.sendall(answer)
            if close:
                client.close()
            else:
                client.detach()  # stays open, and nobody collects it

    threading.Thread(target=run, daemon=True).start()
    return server


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-1.5-old\r\n", b"SSH-2.0-x\r\n", b"\xff" * 100]
)
@pytest.mark.parametrize("close", [True, False])
def test_a_failed_handshake_is_told_as_that(tmp_path: Path, answer: bytes, close: bool) -> None:
    server = serve(answer, close=close)
    device = Device("pi", "127.0.0.1", port=server.getsockname()[1], user="me")
    connection = SshTransport(device, tmp_path / "known_hosts", connect_s=1)
    with pytest.raises(UnreachableError, match=r"pi: me@127.0.0.1 port \d+ answers, and the SSH handshake") as raised:
        connection.run(["true"], deadline_s=10)
    server.close()
    assert OFF not in str(raised.value)


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "no-such-host.invalid", "\u2603" * 80, "[::1", "pi:x"])
def test_a_host_that_is_none_is_this_devices_own_trouble(tmp_path: Path, host: str) -> None:
    with pytest.raises(DeviceError) as raised:
        hello(Device("pi", host), tmp_path / "known_hosts")
    assert str(raised.value).startswith("pi: ")


def test_a_command_that_carries_the_connection(sshd: Sshd, home: Path) -> None:
    relay = "import socket,sys,threading,os;s=socket.create_connection((sys.argv[1],int(sys.argv[2])));"
    relay += (
        "threading.Thread(target=lambda:[s.sendall(b) for b in iter(lambda:os.read(0,65536),b'')],daemon=True).start();"
    )
    relay += "[os.write(1,b) for b in iter(lambda:s.recv(65536),b'')]"
    script = home / "relay.py"
    script.write_text(relay)
    (home / ".ssh/config").write_text(f"ProxyCommand {sys.executable} {script} %h %p\n")
    hello(sshd.device, sshd.known_hosts)
    (home / ".ssh/config").write_text("ProxyCommand false\n")
    assert "handshake" in refusal(sshd.device, sshd.known_hosts)


def test_a_jump_host_that_forbids_forwarding(make_sshd: Callable[..., Sshd]) -> None:
    jump, target = make_sshd("jump", "AllowTcpForwarding no"), make_sshd("target")
    device = dataclasses.replace(target.device, proxy_jump=f"{jump.user}@127.0.0.1:{jump.port}")
    assert "does the jump host allow TCP forwarding?" in refusal(device, target.known_hosts)
