"""Against real OpenSSH servers: host keys, quoting, deadlines, cut uploads, jump hosts."""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import subprocess

import pytest

from harness.device.trust import trust
from harness.errors import HostKeyError, RemoteTimeoutError, UnreachableError
from harness.transport.known_hosts import KnownHosts
from harness.transport.ssh import SshTransport

pytestmark = pytest.mark.integration


@pytest.fixture
def transport(sshd):
    connection = SshTransport(sshd.device, sshd.known_hosts)
    yield connection
    connection.close()


def hello(device, known_hosts, **options):
    connection = SshTransport(device, known_hosts, **options)
    try:
        return connection.run(["echo", "hello"], deadline_s=10).stdout
    finally:
        connection.close()


# --- host keys ------------------------------------------------------------------------------------------------------


def test_an_unknown_host_key_is_refused(make_sshd) -> None:
    server = make_sshd(trusted=False)
    with pytest.raises(HostKeyError) as raised:
        hello(server.device, server.known_hosts)
    assert "is unknown" in str(raised.value)
    assert server.host_key.fingerprint in str(raised.value)
    assert "`edgemoe-farm trust pi`" in str(raised.value)
    assert not server.known_hosts.exists()


def test_a_changed_host_key_is_refused_with_another_message(sshd) -> None:
    assert hello(sshd.device, sshd.known_hosts) == b"hello\n"
    old = sshd.host_key
    sshd.stop()
    sshd.new_host_key()
    sshd.start()
    with pytest.raises(HostKeyError) as raised:
        hello(sshd.device, sshd.known_hosts)
    assert "has CHANGED" in str(raised.value)
    assert old.fingerprint in str(raised.value)
    assert sshd.host_key.fingerprint in str(raised.value)


def test_a_host_key_that_changes_between_two_connections_is_refused_on_reconnect(sshd, transport) -> None:
    transport.run(["true"], deadline_s=10)
    sshd.stop()
    sshd.new_host_key()
    sshd.start()
    with pytest.raises(HostKeyError, match="has CHANGED"):
        transport.run(["true"], deadline_s=10)


def test_trust_shows_the_fingerprint_that_ssh_keygen_prints_and_stores_the_key(make_sshd) -> None:
    server = make_sshd(trusted=False)
    shown = []
    (stored,) = trust(server.device, server.known_hosts, lambda key: bool(shown.append(key) or True))
    printed = subprocess.run(
        ["ssh-keygen", "-lf", server.folder / "host_key.pub"], capture_output=True, text=True, check=True
    ).stdout
    assert shown[0].fingerprint == printed.split()[1]
    assert stored.stored
    assert server.known_hosts.stat().st_mode & 0o077 == 0
    assert hello(server.device, server.known_hosts) == b"hello\n"
    again = trust(server.device, server.known_hosts, lambda key: pytest.fail("asked about a known key"))
    assert [t.stored for t in again] == [False]


def test_trust_stores_nothing_that_was_not_accepted(make_sshd) -> None:
    server = make_sshd(trusted=False)
    with pytest.raises(HostKeyError, match="was not accepted"):
        trust(server.device, server.known_hosts, lambda key: False)
    assert not server.known_hosts.exists()


def test_trust_replaces_a_changed_key_only_when_told_to(sshd) -> None:
    old = sshd.host_key
    sshd.stop()
    sshd.new_host_key()
    sshd.start()
    with pytest.raises(HostKeyError, match=r"has CHANGED.*trust pi --replace"):
        trust(sshd.device, sshd.known_hosts, lambda key: True)
    assert KnownHosts(sshd.known_hosts).find(old.host) == (old,)
    trust(sshd.device, sshd.known_hosts, lambda key: True, replace=True)
    assert KnownHosts(sshd.known_hosts).find(old.host) == (sshd.host_key,)
    assert hello(sshd.device, sshd.known_hosts) == b"hello\n"


def test_the_kind_of_key_that_is_known_is_the_kind_that_is_asked_for(make_sshd, tmp_path) -> None:
    rsa = tmp_path / "rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", rsa], check=True)
    server = make_sshd("pi", f"HostKey {rsa}", trusted=False)
    content = (tmp_path / "rsa.pub").read_text().split()[1]
    server.known_hosts.write_text(f"[127.0.0.1]:{server.port} ssh-rsa {content}\n")
    (known,) = trust(server.device, server.known_hosts, lambda key: False)
    assert not known.stored
    assert hello(server.device, server.known_hosts) == b"hello\n"


# --- jump hosts and ssh_config --------------------------------------------------------------------------------------


def test_a_jump_host_is_held_to_its_key_as_well(make_sshd) -> None:
    jump, target = make_sshd("jump", trusted=False), make_sshd("target")
    device = dataclasses.replace(target.device, proxy_jump=f"{target.device.user}@127.0.0.1:{jump.port}")
    with pytest.raises(HostKeyError, match=rf"target: the host key of \[127.0.0.1\]:{jump.port} is unknown"):
        hello(device, target.known_hosts)
    jump.trust()
    assert hello(device, target.known_hosts) == b"hello\n"


def test_trust_asks_for_the_jump_host_first(make_sshd) -> None:
    jump, target = make_sshd("jump", trusted=False), make_sshd("target", trusted=False)
    device = dataclasses.replace(target.device, proxy_jump=f"{target.device.user}@127.0.0.1:{jump.port}")
    asked = []
    trust(device, target.known_hosts, lambda key: bool(asked.append(key) or True))
    assert asked == [jump.host_key, target.host_key]
    assert [key.whose for key in asked] == ["the jump host on the way to the device", "the device"]
    assert hello(device, target.known_hosts) == b"hello\n"


def test_an_alias_of_ssh_config_with_its_proxy_jump(make_sshd, tmp_path) -> None:
    jump, target = make_sshd("jump"), make_sshd("target")
    config = tmp_path / "ssh_config"
    config.write_text(
        f"Host lab\n  HostName 127.0.0.1\n  Port {target.port}\n  User {target.device.user}\n"
        f"  IdentityFile {target.client_key}\n  ProxyJump hop\n"
        f"Host hop\n  HostName 127.0.0.1\n  Port {jump.port}\n  User {target.device.user}\n"
        f"  IdentityFile {target.client_key}\n  IdentityFile /nonexistent/key\n"
    )
    device = dataclasses.replace(target.device, host="lab", port=None, user=None, identity_file=None)
    assert hello(device, target.known_hosts, ssh_config=config) == b"hello\n"
    target.known_hosts.write_text(
        "".join(line for line in target.known_hosts.read_text().splitlines(True) if f":{jump.port} " not in line)
    )
    with pytest.raises(HostKeyError, match="is unknown"):
        hello(device, target.known_hosts, ssh_config=config)


# --- what cannot be reached -----------------------------------------------------------------------------------------


def test_a_server_that_is_off(sshd) -> None:
    sshd.stop()
    with pytest.raises(UnreachableError, match=rf"pi: .*127.0.0.1 port {sshd.port} cannot be reached .*is it on"):
        hello(sshd.device, sshd.known_hosts)


def test_a_login_that_is_refused(sshd, tmp_path) -> None:
    other = tmp_path / "other_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    device = dataclasses.replace(sshd.device, identity_file=str(other))
    with pytest.raises(UnreachableError, match=r"refuses the login .*ssh-copy-id"):
        hello(device, sshd.known_hosts)


def test_a_passphrase_is_asked_of_nobody_and_in_no_message(sshd, tmp_path, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    locked, secret = tmp_path / "locked", "correct-horse-battery-staple"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", secret, "-f", locked], check=True)
    device = dataclasses.replace(sshd.device, identity_file=str(locked))
    with pytest.raises(UnreachableError, match=r"refuses the login .*ssh-copy-id") as refused:
        hello(device, sshd.known_hosts)
    assert secret not in str(refused.value) + caplog.text


def test_an_identity_file_that_is_not_there(sshd) -> None:
    device = dataclasses.replace(sshd.device, identity_file="/nonexistent/key")
    with pytest.raises(UnreachableError, match="pi: identity_file /nonexistent/key does not exist"):
        hello(device, sshd.known_hosts)


def test_a_server_that_says_nothing_is_given_up(tmp_path) -> None:
    import socket

    from device_inventory import Device

    with socket.create_server(("127.0.0.1", 0)) as silent:
        device = Device(name="mute", host="127.0.0.1", port=silent.getsockname()[1], user="x")
        with pytest.raises(
            UnreachableError, match=r"mute: .* answers, and the SSH handshake with it failed \((no answer in|it does)"
        ):
            hello(device, tmp_path / "known_hosts", connect_s=0.5)


# --- commands -------------------------------------------------------------------------------------------------------


def test_hostile_words_reach_the_command_unchanged(transport, tmp_path) -> None:
    mark = tmp_path / "injected"
    hostile = [
        f"$(touch {mark})",
        f"`touch {mark}`",
        f"; touch {mark}",
        f"' \" \\ | touch {mark} &",
        "a\nb",
        "--",
        "*",
        "",
    ]
    done = transport.run(["printf", "%s|", *hostile], deadline_s=10)
    assert done.stdout.decode() == "".join(f"{word}|" for word in hostile)
    done = transport.run(
        ["sh", "-c", 'printf %s "$VALUE"'], deadline_s=10, environment={"VALUE": f"x; touch {mark} $(touch {mark})"}
    )
    assert done.stdout.decode() == f"x; touch {mark} $(touch {mark})"
    assert not mark.exists()


def test_a_hostile_file_name_is_a_name_and_nothing_else(transport, tmp_path, sshd) -> None:
    mark = tmp_path / "injected"
    source = tmp_path / f"model'; touch {shlex.quote(mark.name)}; $(touch injected) `x`\n -rf.bin"
    source.write_bytes(b"weights")
    target = f"{sshd.folder}/sub/{source.name}"
    transport.upload(source, target)
    assert [p.name for p in (sshd.folder / "sub").iterdir()] == [source.name]
    assert (sshd.folder / "sub" / source.name).read_bytes() == b"weights"
    assert not mark.exists()
    assert not (sshd.folder / "injected").exists()


def test_a_command_that_overruns_its_deadline_is_dead_on_the_device(transport, tmp_path, wait_until) -> None:
    note = tmp_path / "pids"
    script = f'sleep 1000 & echo "$! $$" >{shlex.quote(str(note))}; trap "" TERM; sleep 1000'
    with pytest.raises(RemoteTimeoutError, match=r"pi: .*did not end within 1 s and was killed on the device"):
        transport.run(["sh", "-c", script], deadline_s=1)
    pids = note.read_text().split()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the whole process group to die")


def test_a_killed_command_is_told_from_a_lost_link(transport, sshd) -> None:
    done = transport.run(["sh", "-c", "kill -9 $PPID; sleep 1"], deadline_s=10, check=False)
    assert done.exit_status != 0
    with pytest.raises(UnreachableError, match="connection was lost"):
        transport.run(["sh", "-c", "echo x; sleep 30"], deadline_s=60, on_stdout=lambda piece: sshd.kill_sessions())
    assert transport.run(["echo", "back"], deadline_s=10).stdout == b"back\n"


def test_silence_counts_as_a_lost_link(transport) -> None:
    with pytest.raises(UnreachableError, match=r"no sign of life for 0.3 s"):
        transport.run(["sleep", "5"], deadline_s=20, silence_s=0.3)


# --- uploads --------------------------------------------------------------------------------------------------------


def test_a_cut_upload_goes_on_where_it_stopped(sshd, relay, tmp_path) -> None:
    source, target = tmp_path / "model.bin", sshd.folder / "there" / "model.bin"
    source.write_bytes(os.urandom(24_000_000))
    transport = SshTransport(sshd.device_at(relay.port), sshd.known_hosts)
    relay.limit = 16_000_000
    with pytest.raises(UnreachableError):
        transport.upload(source, str(target))
    assert not target.exists(), "nothing half-written may have the final name"
    relay.limit, first = None, relay.forwarded
    sent = transport.upload(source, str(target))
    transport.close()
    assert target.read_bytes() == source.read_bytes()
    assert sent < 24_000_000 - 12_000_000
    assert relay.forwarded - first < 12_000_000
    assert [p.name for p in target.parent.iterdir()] == ["model.bin"]


def test_a_server_without_sftp_will_do(make_sshd, tmp_path) -> None:
    server = make_sshd("bare")  # no Subsystem line: there is no sftp
    source = tmp_path / "file"
    source.write_bytes(b"content")
    transport = SshTransport(server.device, server.known_hosts)
    transport.upload(source, str(server.folder / "file"))
    transport.close()
    assert (server.folder / "file").read_bytes() == b"content"
