"""Devices that restart, fill their disk, hang or run a wrong clock, over real OpenSSH: each costs one attempt."""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import zipfile
from pathlib import Path

import pytest

from engine.protocol import RunRequest
from engine.strategies import STRATEGIES, Strategy
from harness.device.bootstrap import WheelCache
from harness.device.opening import open_session, prune_device
from harness.device.remote import RemoteSession
from harness.doctor.device import Examined, examine
from harness.doctor.examination import examine_device
from harness.doctor.survey import prune, survey
from harness.errors import PythonMissingError, UnfitError
from harness.transport.ssh import SshTransport
from reports.records import Fault, RunStatus, last_attempts
from reports.results.health import DeviceHealth
from tests.harness.conftest import MATRIX
from tests.harness.conftest import bench as bench

pytestmark = pytest.mark.integration
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and mounts need root")


def request(strategy="good", run_id="run-1", **changes):
    values = {"prompts": ((1, 2),), "max_new_tokens": 1, "repetitions": 2, "deadline_s": 60, **changes}
    return RunRequest(run_id=run_id, container="c", strategy=strategy, **values)


@pytest.fixture
def session_on(tmp_path, stub_engine):
    """session_on(server, **changes) -> RemoteSession with the stub engine; closed with the test."""
    sessions = []

    def make(server, root=None, **changes):
        options = {"cache_dir": tmp_path / "cache", "engine_source": stub_engine, "python": sys.executable}
        session = RemoteSession(
            lambda: SshTransport(server.device, server.known_hosts, connect_s=5.0),
            root=root or server.device.root, **{**options, **changes},
        )  # fmt: skip
        sessions.append(session)
        return session

    yield make
    for session in sessions:
        session.close()


# --- restart ----------------------------------------------------------------------------------------------------------


class Board:
    """A device whose processes are those of a PID namespace and whose boot id is a file: both go when it restarts."""

    def __init__(self, make_sshd, folder: Path) -> None:
        self._boot_id = folder / "boot_id"
        self._boot_id.write_text("11111111-1111-1111-1111-111111111111\n")
        mount = f"mount --bind {self._boot_id} /proc/sys/kernel/random/boot_id"
        namespace = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c")
        if subprocess.run([*namespace, mount], capture_output=True).returncode:
            pytest.skip("no PID namespace with a /proc of its own can be made here")
        self.server = make_sshd("pi", inside=(*namespace, f'{mount} && exec "$0" "$@"'))

    def restart(self) -> None:
        self.server.process.kill()  # and with it the namespace's init, and so all that runs there
        self.server.process.wait()
        self._boot_id.write_text("22222222-2222-2222-2222-222222222222\n")
        self.server.start()


@pytest.fixture
def board(make_sshd, tmp_path):
    return Board(make_sshd, tmp_path)


@needs_root
def test_a_device_that_restarts_costs_one_attempt(session_on, board) -> None:
    session = session_on(board.server)
    outcome = session.execute(request("sleep"), on_event=lambda event, _: event == "loaded" and board.restart())
    assert (outcome.status, outcome.fault) == (RunStatus.UNREACHABLE, Fault.REBOOTED), outcome.reasons
    assert "the device restarted during the run" in outcome.reasons[0]
    session.selftest()
    assert session.execute(request(run_id="run-2")).status is RunStatus.OK


@needs_root
def test_a_restart_in_the_middle_of_a_sweep_costs_no_cell(session_on, board, bench, tmp_path) -> None:
    for name in ("c.emoe", "c.profile"):
        (tmp_path / name).write_bytes(os.urandom(1000))
    bench.farm.open_session = lambda device: session_on(board.server)
    restarted = []

    def engine_said(measurement, event, content) -> None:
        if event == "loaded" and measurement.cell.strategy == "restless" and not restarted:
            restarted.append(measurement.cell.key)
            board.restart()

    bench.witness.engine_said = engine_said
    matrix = MATRIX.replace("max_new_tokens = 3", "max_new_tokens = 1").replace("naive-swap", "restless")
    strategies = {**STRATEGIES, "restless": Strategy("restless", "", "", residency="none")}
    sha256 = {"c": hashlib.sha256((tmp_path / "c.emoe").read_bytes()).hexdigest()}
    runs = bench.measure(bench.plan(matrix, strategies=strategies, container_sha256=sha256))
    assert [run.fault for run in runs if run.fault] == [Fault.REBOOTED]
    assert len(runs) == 9
    assert {run.status for run in last_attempts(runs)} == {RunStatus.OK}
    assert len(bench.pauses) == 1


# --- a full disk ------------------------------------------------------------------------------------------------------


@needs_root
def test_a_device_whose_disk_fills_up_costs_one_attempt(session_on, sshd, tmp_path, mount_tmpfs) -> None:
    root = mount_tmpfs(tmp_path / "small", "8m") / "root"
    session = session_on(sshd, root=str(root))
    outcome = session.execute(request("fills"))
    assert (outcome.status, outcome.fault) == (RunStatus.FAILED, Fault.DISK_FULL), outcome.reasons
    assert "the device's disk is full (0 bytes are free)" in outcome.reasons[0]
    assert session.execute(request(run_id="run-2")).status is RunStatus.OK, "what had filled it went with its run"


@needs_root
def test_a_device_whose_disk_is_full_can_be_pruned(session_on, sshd, tmp_path, mount_tmpfs) -> None:
    root = mount_tmpfs(tmp_path / "small", "8m") / "root"
    session = session_on(sshd, root=str(root))
    ballast = root / "blobs" / ("0" * 64)
    ballast.mkdir()
    with pytest.raises(OSError, match="No space"), (ballast / "old.emoe").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    outcome = session.execute(request())
    assert (outcome.status, outcome.fault) == (RunStatus.FAILED, Fault.DISK_FULL), outcome.reasons
    os.utime(ballast / "old.emoe", (1.5e9, 1.5e9))  # 2017: a date before 2001 is that of a board without a clock
    os.utime(ballast, (1.5e9, 1.5e9))  # 2017: a date before 2001 is that of a board without a clock
    device = type(sshd.device)(**{**vars(sshd.device), "root": str(root)})
    with pytest.raises(UnfitError, match=r"pi: the disk of .*/root has 0\.0 MB free.*devices prune pi"):
        open_session(device, known_hosts=sshd.known_hosts, cache_dir=tmp_path / "cache")
    assert [r.name for r in prune_device(device, known_hosts=sshd.known_hosts, days=30, dry=True).removed] == ["0" * 64]
    assert ballast.exists()
    pruned = prune_device(device, known_hosts=sshd.known_hosts, days=30, dry=False)
    assert pruned.removed[0].bytes > 5_000_000
    assert not ballast.exists()
    assert session.execute(request(run_id="run-2")).status is RunStatus.OK


def test_what_may_be_in_use_is_not_pruned(session_on, sshd, wait_until) -> None:
    session, root = session_on(sshd), Path(sshd.device.root)
    thread = threading.Thread(target=lambda: session.execute(request("slow", max_new_tokens=30)))
    thread.start()
    wait_until((root / "runs/run-1/engine.json").exists, "the engine to run")
    for old in (root / "runs/run-1", *(root / "runs/run-1").iterdir()):
        os.utime(old, (0, 0))
    pruned = prune_device(sshd.device, known_hosts=sshd.known_hosts, days=0, dry=False)
    assert pruned.removed == ()
    session.cancel()
    thread.join(30)
    assert {r.kind for r in prune_device(sshd.device, known_hosts=sshd.known_hosts, days=0, dry=False).removed} == {
        "engines"
    }


# --- a device that hangs ----------------------------------------------------------------------------------------------


def test_a_device_that_hangs_is_given_up_in_time_and_used_again_when_it_is_back(session_on, sshd, tmp_path) -> None:
    session, stopped = session_on(sshd, idle_s=1.0, reconnect_s=1.0), []

    def hang(event, content) -> None:
        if event == "loaded":
            stopped.extend([sshd.process.pid, *sshd.sessions()])
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)

    outcome = session.execute(request("sleep"), on_event=hang)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    assert (outcome.status, outcome.fault) == (RunStatus.UNREACHABLE, Fault.LINK_LOST), outcome.reasons
    assert "not back within 1 s" in outcome.reasons[0]
    assert session.execute(request(run_id="run-2")).status is RunStatus.OK
    assert list((Path(sshd.device.root) / "runs").iterdir()) == [], "the engine that was left behind has been ended"


# --- a wrong clock ----------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong_clock(tmp_path):
    """A Python whose clock is three years slow, as on a board without a battery or a network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "slow")], check=True)
    (site,) = (tmp_path / "slow/lib").glob("python*/site-packages")
    (site / "numpy.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    # Not sitecustomize.py: Debian's own one comes before it.
    (site / "slow_clock.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() - 3 * 365 * 86400\n")
    (site / "slow_clock.pth").write_text("import slow_clock\n")
    return str(tmp_path / "slow/bin/python3")


def test_nothing_depends_on_a_devices_clock_and_the_doctor_says_that_it_is_wrong(session_on, sshd, wrong_clock) -> None:
    session = session_on(sshd, python=wrong_clock)
    outcome = session.execute(request())
    assert outcome.status is RunStatus.OK, outcome.reasons
    transport = SshTransport(sshd.device, sshd.known_hosts)
    found = survey(transport, wrong_clock, sshd.device.root, deadline_s=60)
    assert found.clock_error_s == pytest.approx(-3 * 365 * 86400, abs=60)
    findings = [f for f in examine(Examined(sshd.device, sshd.device.root, found)) if f.check == "clock"]
    assert "its clock is 1095 days slow" in findings[0].finding
    assert "set-ntp" in findings[0].remedy
    right = survey(transport, sys.executable, sshd.device.root, deadline_s=60)
    assert right.clock_error_s == 0.0, "one machine, one clock: what is left is the time on the way"
    # A clock that jumps ahead makes all look old; what is alive stays all the same, the rest is only sent again.
    pruned = prune(transport, wrong_clock, sshd.device.root, days=-3 * 365 - 1)
    assert {removed.kind for removed in pruned.removed} == {"engines"}
    transport.close()


# --- doctor -----------------------------------------------------------------------------------------------------------


def opener(server, tmp_path, **changes):
    device = type(server.device)(**{**vars(server.device), **changes})
    return device, lambda gate: open_session(
        device, known_hosts=server.known_hosts, cache_dir=tmp_path / "cache", offline=True, gate=gate
    )


def checks(findings):
    return {finding.check for finding in findings if finding.severity == "error"}


def test_the_doctor_finds_nothing_fatal_on_a_device_that_works(sshd, tmp_path) -> None:
    device, open_it = opener(sshd, tmp_path)
    assert checks(examine_device(device, open_it, health=DeviceHealth(), selftest=False)) == set()


def test_the_doctor_names_what_keeps_it_out(sshd, make_sshd, tmp_path) -> None:
    device, open_it = opener(sshd, tmp_path, python="/opt/none")
    (finding,) = examine_device(device, open_it, health=DeviceHealth())
    assert (finding.check, finding.finding) == ("python", "/opt/none was not found")
    assert finding.remedy
    stranger = make_sshd("stranger", trusted=False)
    device, open_it = opener(stranger, tmp_path)
    (finding,) = examine_device(device, open_it, health=DeviceHealth())
    assert finding.check == "host-key"
    assert "edgemoe-farm trust stranger" in finding.remedy
    stranger.trust()
    stranger.stop()
    (finding,) = examine_device(device, open_it, health=DeviceHealth())
    assert (finding.check, finding.severity) == ("reachable", "error")


@needs_root
def test_the_doctor_and_the_gate_of_a_run_say_the_same(sshd, tmp_path, mount_tmpfs) -> None:
    root = mount_tmpfs(tmp_path / "small", "16m")
    device, open_it = opener(sshd, tmp_path, root=str(root / "root"))
    findings = examine_device(device, open_it, health=DeviceHealth(), selftest=False)
    assert checks(findings) == {"free-space"}
    assert {finding.check for finding in findings} >= {"free-space", "file-system"}
    with pytest.raises(UnfitError) as refusal:
        open_session(device, known_hosts=sshd.known_hosts, cache_dir=tmp_path / "cache")
    assert str(refusal.value).split(" has ")[0] == str(findings[0]).split(" has ")[0]
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    found = examine_device(device, open_it, health=DeviceHealth(), selftest=False)
    assert "root-writable" in checks(found)
    assert any("mounted read-only" in finding.finding for finding in found)


# --- numpy for a device that has none ---------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path):
    """A Python without numpy."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    return str(tmp_path / "bare/bin/python3")


def make_wheel(folder: Path, content: str, version: str = "9.9") -> tuple[str, str]:
    """Makes a small numpy for this Python; returns the wheel's name and hash."""
    folder.mkdir(exist_ok=True)
    about = f"numpy-{version}.dist-info"
    name = f"numpy-{version}-cp3{sys.version_info[1]}-cp3{sys.version_info[1]}-linux_{platform.machine()}.whl"
    files = {
        "numpy/__init__.py": content,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: numpy\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n",
    }
    record = f"{about}/RECORD,,\n"
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record += f"{path},sha256={digest},{len(text)}\n"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        for path, text in {**files, f"{about}/RECORD": record}.items():
            wheel.writestr(path, text)
    return name, hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """Where pip finds a numpy that is small, and fetches nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture
def locked(index) -> dict[str, str]:
    return dict([make_wheel(index, "__version__ = '9.9'\n")])


def test_a_device_without_numpy_gets_it_once(session_on, sshd, bare, locked, tmp_path) -> None:
    wheels = tmp_path / "wheels"
    with pytest.raises(PythonMissingError, match=r"pi: .*/bare/bin/python3 has no usable numpy: (run `|install)"):
        session_on(sshd, python=bare)
    with pytest.raises(PythonMissingError, match=r"\(none is in .*wheels, and --offline forbids to fetch one\): "):
        session_on(sshd, python=bare, wheels=WheelCache(wheels, offline=True, locked=locked))
    first = session_on(sshd, python=bare, wheels=WheelCache(wheels, locked=locked))
    assert first.python.numpy == "9.9"
    assert Path(first.python.path).parent.parent == Path(sshd.device.root) / "sites"
    assert first.bytes_sent > 0
    assert first.execute(request()).status is RunStatus.OK
    assert list((Path(sshd.device.root) / "blobs").iterdir()) == [], "the archive is not kept there"
    second = session_on(sshd, python=bare, wheels=WheelCache(wheels, offline=True, locked=locked))
    assert (second.python, second.bytes_sent) == (first.python, 0)


def test_a_wheel_that_does_not_work_there_is_named(session_on, sshd, bare, locked, index, tmp_path) -> None:
    locked |= [make_wheel(index, "raise ImportError('Illegal instruction')\n", "9.10")]
    with pytest.raises(
        PythonMissingError, match=r"numpy-9\.10.* was put there, and does not work: .*Illegal instruction"
    ):
        session_on(sshd, python=bare, wheels=WheelCache(tmp_path / "wheels", locked=locked))


def test_a_controller_that_finds_no_wheel_says_what_would_help(session_on, sshd, bare, locked, index, tmp_path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(
        PythonMissingError, match=r"pip here could not fetch numpy-9.9.*: No matching distribution.*\): (run `|install)"
    ):
        session_on(sshd, python=bare, wheels=WheelCache(tmp_path / "wheels", locked=locked))
    assert not list((tmp_path / "wheels").iterdir())


def test_another_wheel_than_the_locked_one_is_not_sent(session_on, sshd, bare, locked, index, tmp_path) -> None:
    make_wheel(index, "__version__ = '6.6'\n")
    with pytest.raises(
        PythonMissingError, match=r"the index's numpy-9.9.* is not the one that is locked: it was changed"
    ):
        session_on(sshd, python=bare, wheels=WheelCache(tmp_path / "wheels", locked=locked))
    assert not list((tmp_path / "wheels").iterdir())
    assert not list((Path(sshd.device.root) / "sites").iterdir())


@pytest.mark.parametrize(
    "damage", [lambda wheel: wheel[:-100], lambda wheel: b"", lambda wheel: wheel.replace(b"9", b"6")]
)
def test_a_cut_or_changed_wheel_in_the_cache_is_fetched_again(session_on, sshd, bare, locked, tmp_path, damage) -> None:
    (name,) = locked
    wheels = tmp_path / "wheels"
    session_on(sshd, python=bare, wheels=WheelCache(wheels, locked=locked))
    whole = (wheels / name).read_bytes()
    (wheels / name).write_bytes(damage(whole))
    with pytest.raises(PythonMissingError, match=r"/numpy-9.9.* is damaged, and --offline forbids to fetch one\): "):
        session_on(sshd, python=bare, wheels=WheelCache(wheels, offline=True, locked=locked))
    session_on(sshd, python=bare, wheels=WheelCache(wheels, locked=locked))
    assert (wheels / name).read_bytes() == whole


def cut(site: Path) -> None:
    (site / "numpy/__init__.py").write_text("")


def change(site: Path) -> None:
    source = site / "numpy/__init__.py"
    source.write_text(source.read_text().replace("9.9", "6.6"))


def add(site: Path) -> None:
    (site / "json.py").write_text("raise SystemExit(7)\n")


def remove_list(site: Path) -> None:
    (site / "numpy-9.9.dist-info/RECORD").unlink()


def change_with_list(site: Path) -> None:
    change(site)
    (site / "numpy-9.9.dist-info/RECORD").write_text("")


def link(site: Path) -> None:
    (site / "numpy/__init__.py").rename(site / "numpy/elsewhere.py")
    (site / "numpy/__init__.py").symlink_to("elsewhere.py")


@pytest.mark.parametrize("damage", [cut, change, add, remove_list, change_with_list, link])
def test_a_numpy_that_is_not_whole_on_the_device_is_put_there_again(
    session_on, sshd, bare, locked, tmp_path, damage
) -> None:
    wheels = tmp_path / "wheels"
    first = session_on(sshd, python=bare, wheels=WheelCache(wheels, locked=locked))
    site = Path(first.python.path).parent
    damage(site)
    second = session_on(sshd, python=bare, wheels=WheelCache(wheels, locked=locked))
    assert second.python.numpy == "9.9"
    assert second.execute(request()).status is RunStatus.OK
    assert (site / "numpy/__init__.py").read_text() == "__version__ = '9.9'\n"
    assert not (site / "json.py").exists()


def test_an_archive_on_the_device_is_checked_before_it_is_unpacked(session_on, sshd, bare, locked, tmp_path) -> None:
    """An archive of the right name and size lies there: what an upload of another time left, and somebody changed."""
    ((name, digest),) = locked.items()
    session_on(sshd, python=bare, wheels=WheelCache(tmp_path / "wheels", locked=locked))
    root = Path(sshd.device.root)
    shutil.rmtree(root / "sites" / digest[:16])
    content = (tmp_path / "wheels" / name).read_bytes()
    (root / "blobs" / digest).mkdir()
    (root / "blobs" / digest / name).write_bytes(content.replace(b"'9.9'", b"'6.6'"))
    again = session_on(sshd, python=bare, wheels=WheelCache(tmp_path / "wheels", locked=locked))
    assert again.python.numpy == "9.9"
    assert list((root / "blobs").iterdir()) == []
