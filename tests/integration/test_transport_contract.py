"""What every transport does, over a real OpenSSH server and on this machine alike."""

from __future__ import annotations

import os
import shutil
from typing import Never

import pytest

from harness.errors import DiskFullError, RemoteCommandError, RemoteTimeoutError
from harness.transport import Completed, shell
from harness.transport.local import LocalTransport
from harness.transport.ssh import SshTransport


@pytest.fixture(params=["local", "ssh"])
def transport(request, tmp_path):
    if request.param == "local":
        connection = LocalTransport("pi", tmp_path / "pi")
    else:
        server = request.getfixturevalue("sshd")
        connection = SshTransport(server.device, server.known_hosts)
    yield connection
    connection.close()


def sh(transport, script, *arguments, **options):
    return transport.run(["sh", "-c", script, "sh", *arguments], **{"deadline_s": 10, **options})


def test_output_and_status(transport) -> None:
    done = sh(transport, "echo out; echo err >&2; exit 7", check=False)
    assert done == Completed(7, b"out\n", b"err\n")


def test_a_failure_is_an_error_that_carries_the_last_word(transport) -> None:
    with pytest.raises(RemoteCommandError, match=r"pi: .* failed \(exit status 3\): no such thing"):
        sh(transport, "echo first >&2; echo no such thing >&2; exit 3")


def test_a_command_that_is_not_there(transport) -> None:
    with pytest.raises(RemoteCommandError, match=r"pi: `no-such-command-here` failed \(exit status 127\)"):
        transport.run(["no-such-command-here"], deadline_s=10)


def test_input_arrives_whole_and_ends(transport) -> None:
    content = os.urandom(1_500_000)
    assert transport.run(["cat"], deadline_s=20, stdin=content).stdout == content


def test_a_command_need_not_read_its_input(transport) -> None:
    assert transport.run(["echo", "done"], deadline_s=20, stdin=bytes(8_000_000)).stdout == b"done\n"


def test_output_comes_as_it_is_made(transport) -> None:
    pieces = []
    done = sh(transport, "echo a; sleep 0.3; echo b", on_stdout=pieces.append)
    assert b"".join(pieces) == b"a\nb\n"
    assert len(pieces) >= 2
    assert done.stdout == b""


def test_an_exception_of_the_listener_breaks_the_command_off(transport) -> None:
    class Enough(Exception):
        pass

    def listen(piece) -> Never:
        raise Enough

    with pytest.raises(Enough):
        sh(transport, "echo x; sleep 5", on_stdout=listen, deadline_s=10)
    assert sh(transport, "echo still here").stdout == b"still here\n"


def test_endless_output_is_cut(transport, monkeypatch) -> None:
    monkeypatch.setattr(shell, "OUTPUT_LIMIT_BYTES", 1 << 20)
    with pytest.raises(RemoteCommandError, match=r"pi: .*wrote to stdout more than 1048576 bytes"):
        transport.run(["yes"], deadline_s=30)


def test_the_deadline(transport) -> None:
    with pytest.raises(RemoteTimeoutError, match=r"pi: .*did not end within 1 s"):
        transport.run(["sleep", "60"], deadline_s=0.2)


def test_a_status_of_124_in_time_is_the_commands_own(transport) -> None:
    assert sh(transport, "exit 124", check=False).exit_status == 124


def test_a_device_without_timeout_still_holds_the_deadline(transport, tmp_path, wait_until) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sleep", "echo", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    note = tmp_path / "pid"
    words = ["sh", "-c", shell._WATCHDOG, "sh"]
    path = {"PATH": str(tools)}
    sh_binary = shutil.which("sh")

    def watched(seconds, *command, **options):
        return transport.run([sh_binary, *words[1:], seconds, *command], environment=path, check=False, **options)

    assert watched("5", "cat", deadline_s=20, stdin=b"through").stdout == b"through"
    assert watched("5", sh_binary, "-c", "exit 5", deadline_s=20).exit_status == 5
    done = watched("1", sh_binary, "-c", f"echo $$ >{note}; exec sleep 60", deadline_s=20)
    assert done.exit_status == 137
    wait_until(lambda: not os.path.exists(f"/proc/{note.read_text().strip()}"), "the command to die")


@pytest.mark.parametrize("name", ["1BAD", "A B", "A;B", ""])
def test_a_variable_with_a_hostile_name_is_refused(transport, name) -> None:
    with pytest.raises(RemoteCommandError, match="environment variable"):
        transport.run(["true"], deadline_s=10, environment={name: "x"})


def test_a_zero_byte_is_refused(transport) -> None:
    with pytest.raises(RemoteCommandError, match="zero byte"):
        transport.run(["echo", "a\0b"], deadline_s=10)


@pytest.mark.parametrize("size", [0, 1, shell.BLOCK_BYTES, 3 * shell.CHUNK_BYTES + 17])
def test_an_upload_arrives_whole(transport, tmp_path, size) -> None:
    source, target = tmp_path / "source", tmp_path / "pi" / "deep" / "er" / "target"
    source.write_bytes(os.urandom(size))
    told = []
    assert transport.upload(source, str(target), progress=told.append) == size
    assert target.read_bytes() == source.read_bytes()
    assert told == sorted(told)
    assert told[-1:] == ([size] if size else [])
    assert transport.bytes_sent == size
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_an_upload_goes_on_from_a_partial_file(transport, tmp_path) -> None:
    source, target = tmp_path / "source", tmp_path / "pi" / "target"
    source.write_bytes(os.urandom(1_000_000))
    digest = shell._sha256(source)
    target.parent.mkdir(exist_ok=True)
    (tmp_path / "pi" / f"target.{digest[:16]}.part").write_bytes(source.read_bytes()[:700_000])
    assert transport.upload(source, str(target)) == 1_000_000 - 700_000 // shell.BLOCK_BYTES * shell.BLOCK_BYTES
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("damage", ["other bytes", "too long"])
def test_a_damaged_partial_file_is_thrown_away(transport, tmp_path, damage) -> None:
    source, target = tmp_path / "source", tmp_path / "pi" / "target"
    source.write_bytes(os.urandom(1_000_000))
    target.parent.mkdir(exist_ok=True)
    partial = tmp_path / "pi" / f"target.{shell._sha256(source)[:16]}.part"
    partial.write_bytes(bytes(700_000) if damage == "other bytes" else source.read_bytes() + b"more")
    transport.upload(source, str(target))
    assert target.read_bytes() == source.read_bytes()


def test_content_that_is_not_what_was_promised_never_gets_the_name(transport, tmp_path) -> None:
    source, target = tmp_path / "source", tmp_path / "pi" / "target"
    source.write_bytes(b"content")
    with pytest.raises(RemoteCommandError, match=r"pi: .*source could not be put .*checksum"):
        transport.upload(source, str(target), sha256="0" * 64)
    assert not target.exists()


def test_a_folder_that_cannot_be_made(transport, tmp_path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    with pytest.raises(RemoteCommandError, match="pi: "):
        transport.upload(source, "/proc/none/target")


def test_a_disk_that_is_too_small_is_named_with_numbers(transport, tmp_path, monkeypatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    monkeypatch.setattr(shell, "DISK_MARGIN_BYTES", 1 << 60)  # no disk has that much to spare
    with pytest.raises(DiskFullError, match=r"pi: source needs 0\.0 MB .* \d+\.\d MB are free: free some space"):
        transport.upload(source, str(tmp_path / "pi" / "target"))
    assert transport.bytes_sent == 0
