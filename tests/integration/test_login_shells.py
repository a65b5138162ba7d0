"""Over real OpenSSH servers: what login shells print, how they quote, and a Python that numpy kills."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.device.bootstrap import WheelCache
from harness.device.deploy import FarmFolder
from harness.device.probe import find_python
from harness.device.remote import RemoteSession
from harness.errors import PythonMissingError, RemoteCommandError
from harness.transport.ssh import SshTransport
from tests.integration.conftest import Sshd

pytestmark = pytest.mark.integration

NOISY = 'echo before; echo before >&2; eval "$SSH_ORIGINAL_COMMAND"; s=$?; echo after; echo after >&2; exit $s'


def opened(server: Sshd) -> SshTransport:
    return SshTransport(server.device, server.known_hosts)


def force(server_folder: Path, script: str) -> str:
    """Returns the sshd option that has every command run by a script."""
    path = server_folder / "forced"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"ForceCommand {path}"


def check(transport: SshTransport, root: str) -> None:
    """Does what a session does first."""
    try:
        done = transport.run(
            ["sh", "-c", 'echo "$1"; echo "$1" >&2; exit 3', "sh", "a\nb!"], deadline_s=20, check=False
        )
        assert (done.exit_status, done.stdout, done.stderr) == (3, b"a\nb!\n", b"a\nb!\n")
        assert FarmFolder.prepare(transport, sys.executable, root).root == root
        assert find_python(transport, sys.executable).numpy
    finally:
        transport.close()


@pytest.mark.parametrize("where", ["stdout", "stderr"])
def test_a_bashrc_that_prints(make_sshd: Callable[..., Sshd], where: str) -> None:
    server = make_sshd()
    redirect = ">&2" if where == "stderr" else ""
    (server.folder / ".bashrc").write_text(f'echo "Welcome to the lab"{redirect}; printf "no line break"{redirect}\n')
    check(opened(server), f"{server.folder}/root")


def test_a_wrapper_that_prints_before_and_after(make_sshd: Callable[..., Sshd], tmp_path: Path) -> None:
    server = make_sshd("pi", force(tmp_path, f'echo "running $SSH_ORIGINAL_COMMAND"; {NOISY}'))
    check(opened(server), f"{server.folder}/root")


@pytest.mark.parametrize("shell", ["tcsh", "fish", "dash"])
def test_a_login_shell_of_another_kind(make_sshd: Callable[..., Sshd], tmp_path: Path, shell: str) -> None:
    binary = shutil.which(shell)
    if binary is None:
        pytest.skip(f"{shell} is not installed: apt install {shell}")
    server = make_sshd("pi", force(tmp_path, f'exec {binary} -c "$SSH_ORIGINAL_COMMAND"'))
    config = server.folder / ".config/fish/config.fish"
    config.parent.mkdir(parents=True)
    config.write_text("echo Welcome from fish\n")
    (server.folder / ".cshrc").write_text("echo Welcome from csh\n")
    check(opened(server), f"{server.folder}/root")


def test_an_upload_past_a_shell_that_prints(make_sshd: Callable[..., Sshd], tmp_path: Path) -> None:
    server = make_sshd("pi", force(tmp_path, NOISY))
    source = tmp_path / "it's a file!"
    source.write_bytes(bytes(range(256)) * 4000)
    transport = opened(server)
    transport.upload(source, f"{server.folder}/there/{source.name}")
    transport.close()
    assert (server.folder / "there" / source.name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("script", ["echo This account is not available.; exit 1", "echo hello", "exit 0"])
def test_an_account_that_runs_nothing_is_told_as_that(
    make_sshd: Callable[..., Sshd], tmp_path: Path, script: str
) -> None:
    server = make_sshd("pi", force(tmp_path, script))
    transport = opened(server)
    with pytest.raises(RemoteCommandError, match=r"pi: the login shell there, or a ForceCommand, .* runs no command"):
        transport.run(["true"], deadline_s=20)
    transport.close()


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV"])
def test_a_python_that_numpy_kills_is_named_by_the_signal_and_gets_a_wheel(
    sshd: Sshd, tmp_path: Path, name: str
) -> None:
    number = int(getattr(signal, name))
    package = tmp_path / "site/numpy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"import os\nos.kill(os.getpid(), {number})\n")
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    transport = opened(sshd)
    with pytest.raises(PythonMissingError) as raised:
        find_python(transport, str(python))
    transport.close()
    assert f"(it is killed while it imports numpy, signal {number} ({name})): install there a numpy" in str(
        raised.value
    )
    assert raised.value.bare is not None, "the wheel is tried"
    with pytest.raises(PythonMissingError, match=rf"signal {number} .*none is in .* --offline forbids"):
        RemoteSession(
            lambda: opened(sshd), root=f"{sshd.folder}/root", cache_dir=tmp_path / "cache", python=str(python),
            wheels=WheelCache(tmp_path / "wheels", offline=True),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exec kill -11 $$", r"ends with signal 11 \(SIGSEGV\)"),
        ("exit 127", "ends with status 127"),
        ("true", "ends with status 0"),
    ],
)
def test_a_python_that_answers_nothing_is_not_one_that_is_not_there(
    sshd: Sshd, tmp_path: Path, script: str, told: str
) -> None:
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    transport = opened(sshd)
    with pytest.raises(PythonMissingError, match=f"pi: {python} gives no answer, it {told}: set `python`"):
        find_python(transport, str(python))
    transport.close()
