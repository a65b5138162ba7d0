"""Each check names what is wrong and the line that fixes it, and says nothing where all is well."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from device_inventory import Device
from engine.codec import from_json, loads
from harness.device.probe import KernelReport
from harness.doctor import controller, device
from harness.doctor.device import Examined, examine, refuse_unfit
from harness.doctor.examination import examine_device
from harness.doctor.survey import SCRIPT, Pruned, Removed, Survey
from harness.errors import DeviceError, RemoteCommandError, UnfitError
from harness.findings import Severity, parted
from reports.results.database import ResultsDatabase
from reports.results.health import DeviceHealth, Health
from tests.harness.conftest import FACTS

PI = Device("pi", "h")
WELL = Survey(
    utc_s=0.0, file_system="ext4", storage="/dev/nvme0n1p2", read_only=False, no_exec=False, free_bytes=100 << 30,
    disk_bytes=200 << 30, free_inodes=1 << 20, write_error=None, direct_reads=True, memory_control_groups=True,
    governors=("performance",), throttled_bits=0, swaps=("/dev/zram0",), android=None, missing_tools=(), stale_runs=0,
    clock_error_s=0.3,
)  # fmt: skip
OPENBLAS = replace(FACTS, blas="libopenblas.so")
UNKNOWN = replace(
    WELL, file_system=None, storage=None, read_only=None, no_exec=None, free_inodes=None, direct_reads=None,
    memory_control_groups=None, governors=(), throttled_bits=None, swaps=(),
)  # fmt: skip


def found(**changes):
    return examine(Examined(PI, "/home/pi/edgemoe-farm", replace(WELL, **changes), OPENBLAS))


@pytest.mark.parametrize("survey", [WELL, UNKNOWN])
def test_nothing_is_said_of_a_device_that_is_well(survey) -> None:
    assert examine(Examined(PI, "/root", survey, OPENBLAS)) == []
    refuse_unfit(Examined(PI, "/root", survey))


@pytest.mark.parametrize(
    ("changes", "check", "severity", "finding", "remedy"),
    [
        ({"write_error": "Read-only file system", "read_only": True}, "root-writable", "error", "read-only", "remount"),
        ({"write_error": "Permission denied"}, "root-writable", "error", "cannot be written (Perm", "`root`"),
        ({"free_bytes": 1 << 20}, "free-space", "error", "has 1.0 MB free", "edgemoe-farm devices prune pi"),
        ({"free_bytes": 500 << 20}, "free-space", "warning", "has 524 MB free", "devices prune pi"),
        ({"free_inodes": 3}, "free-space", "warning", "3 inodes", "prune"),
        ({"missing_tools": ("dd",)}, "tools", "error", "lacks dd", "coreutils"),
        ({"missing_tools": ("timeout",)}, "tools", "note", "watchdog", "coreutils"),
        ({"file_system": "tmpfs"}, "file-system", "warning", "in memory", "`root`"),
        ({"file_system": "fuse.sshfs"}, "file-system", "warning", "fuse.sshfs", "ext4"),
        ({"no_exec": True}, "file-system", "warning", "noexec", "remount,exec"),
        ({"direct_reads": False}, "direct-reads", "note", "O_DIRECT", "pread"),
        ({"clock_error_s": -90.0}, "clock", "warning", "90 s slow", "set-ntp"),
        ({"clock_error_s": 2e8}, "clock", "warning", "2315 days fast", "set-ntp"),
        ({"governors": ("ondemand", "performance")}, "governor", "warning", "ondemand", "scaling_governor"),
        ({"throttled_bits": 0x50005}, "throttled", "warning", "under-voltage, throttling now", "power supply"),
        ({"throttled_bits": 0x80000}, "throttled", "note", "a soft temperature limit at some time", "cooler"),
        ({"swaps": ("/var/swap",)}, "swap", "warning", "/var/swap", "swapoff"),
        ({"swaps": ("/var/swap",)}, "swap", "warning", "/var/swap", "/etc/rpi/swap.conf"),
        ({"memory_control_groups": False}, "memory-control-groups", "note", "control groups", "cgroup_enable=memory"),
        ({"android": "11"}, "android", "note", "screen", "termux-wake-lock"),
    ],
)
def test_a_finding_has_the_line_that_fixes_it(changes, check, severity, finding, remedy) -> None:
    (told,) = found(**changes)
    assert (told.where, told.check, told.severity) == ("pi", check, severity)
    assert finding in told.finding
    assert remedy in told.remedy
    at_the_gate = Examined(PI, "/home/pi/edgemoe-farm", replace(WELL, **changes))
    if told.severity is Severity.ERROR:
        with pytest.raises(UnfitError) as refusal:
            refuse_unfit(at_the_gate)
        assert str(refusal.value) == str(told), "the gate of a run says the same"
    else:
        refuse_unfit(at_the_gate)


def test_new_androids_kill_phantoms() -> None:
    assert [f.remedy for f in found(android="14")][1].startswith("`adb shell settings put global")


def test_numpy_without_a_blas() -> None:
    told = examine(Examined(PI, "/root", WELL, replace(OPENBLAS, blas=None)))
    assert [(f.check, f.severity) for f in told] == [("blas", "warning")]


def test_what_a_device_says_cannot_reach_the_terminal() -> None:
    (told,) = found(write_error="\x1b[31m\n" + "x" * 10_000)
    assert told.finding.isprintable()
    assert len(told.finding) <= 400


def test_every_check_of_a_device_is_tried_here() -> None:
    tried = {"root-writable", "free-space", "tools", "file-system", "direct-reads", "clock", "governor", "throttled",
             "swap", "memory-control-groups", "android", "blas"}  # fmt: skip
    assert set(device.CHECKS) == tried


@pytest.mark.parametrize("python", [sys.executable])
def test_the_survey_of_this_machine_is_one_that_the_checks_understand(python, tmp_path: Path) -> None:
    done = subprocess.run([python, "-I", "-", "survey", str(tmp_path)], input=SCRIPT, capture_output=True, check=True)
    survey = from_json(Survey, loads(done.stdout))
    assert survey.write_error is None
    assert survey.free_bytes > 0
    assert survey.file_system
    assert list(tmp_path.iterdir()) == []


class ScriptedPatient:
    """A session as the doctor sees it."""

    facts = OPENBLAS

    def __init__(self, kernels: KernelReport, selftest: DeviceError | None = None, unused_bytes: int = 0) -> None:
        self._kernels, self._selftest, self._unused_bytes = kernels, selftest, unused_bytes

    def kernels(self) -> KernelReport:
        return self._kernels

    def selftest(self) -> None:
        if self._selftest:
            raise self._selftest

    def prune(self, *, days: float, dry: bool) -> Pruned:
        assert dry, "a doctor removes nothing"
        return Pruned((Removed("blobs", "old", self._unused_bytes),), {})

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("patient", "health", "check"),
    [
        (ScriptedPatient(KernelReport("native", ())), DeviceHealth(), None),
        (ScriptedPatient(KernelReport("numpy", ("no library for riscv64",))), DeviceHealth(), "kernels"),
        (
            ScriptedPatient(KernelReport("native", ()), RemoteCommandError("pi: it fails: look")),
            DeviceHealth(),
            "engine",
        ),
        (ScriptedPatient(KernelReport("native", ()), unused_bytes=1 << 30), DeviceHealth(), "unused"),
        (ScriptedPatient(KernelReport("native", ())), DeviceHealth(Health.QUARANTINED, "lost", "", 3, 3), "health"),
        (ScriptedPatient(KernelReport("native", ())), DeviceHealth(Health.SUSPECT, "lost", "", 1, 1), "health"),
        (ScriptedPatient(KernelReport("native", ())), DeviceHealth(Health.MAINTENANCE, "in maintenance"), "health"),
    ],
)
def test_an_examination(patient, health, check) -> None:
    def open_session(gate):
        gate("/root", WELL)
        return patient

    told = examine_device(PI, open_session, health=health)
    assert [finding.check for finding in told] == ([] if check is None else [check])
    assert all(finding.remedy for finding in told)


# --- the controller ---------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> controller.Controller:
    """A controller that is well."""
    (tmp_path / "known_hosts").write_text("")
    (tmp_path / "known_hosts").chmod(0o600)
    (tmp_path / "key").write_text("")
    (tmp_path / "key").chmod(0o600)
    tmp_path.chmod(0o700)
    with ResultsDatabase.open(tmp_path / "farm.db"):
        pass
    keyed = Device("pi", "h", identity_file=str(tmp_path / "key"))
    return controller.Controller(tmp_path / "known_hosts", str(tmp_path / "farm.db"), tmp_path / "cache", (keyed,))


def told_of(here: controller.Controller) -> set[tuple[str, str]]:
    return {(finding.check, str(finding.severity)) for finding in controller.examine(here)}


def test_nothing_is_said_of_a_controller_that_is_well(here) -> None:
    assert told_of(here) == set()


def test_what_is_wrong_with_a_controller(here, tmp_path: Path) -> None:
    here.known_hosts.chmod(0o666)
    assert told_of(here) == {("known-hosts", "error")}
    here.known_hosts.unlink()
    assert told_of(here) == {("known-hosts", "warning")}
    here.known_hosts.write_text("")
    (tmp_path / "key").chmod(0o644)
    assert told_of(here) == {("keys", "warning")}
    (tmp_path / "key").unlink()
    assert told_of(here) == {("keys", "error")}
    assert ("results", "error") not in told_of(replace(here, results=str(tmp_path / "none/farm.db")))
    (tmp_path / "farm.db").write_text("this is no database, and long enough to be told from one that is empty\n" * 99)
    assert ("results", "error") in told_of(here)


@pytest.mark.parametrize(
    ("message", "what", "remedy"),
    [
        ("the disk is full: free some of it", "the disk is full", "free some of it"),
        ("no numpy: `sudo apt install python3-numpy`", "no numpy", "`sudo apt install python3-numpy`"),
        ("pi: cannot be reached: Connection refused", "pi: cannot be reached: Connection refused", "see the message"),
        ("[Errno 5] Input/output error: '/x'", "[Errno 5] Input/output error: '/x'", "see the message"),
        ("nothing to part", "nothing to part", "see the message"),
    ],
)
def test_half_of_a_message_is_no_remedy(message, what, remedy) -> None:
    assert parted(message) == (what, remedy)
