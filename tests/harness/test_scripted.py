"""Scripted devices under the real RemoteSession: every fault costs what it must, and nothing else; no real waiting."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from device_inventory import Inventory, InventoryError
from engine.protocol import RunRequest
from harness.device.opening import open_session
from harness.device.remote import RemoteSession
from harness.errors import DiskFullError, UnreachableError
from harness.scripted import FaultKind, FaultScript, ScriptedDevice, ScriptedFault, ScriptedTransport, declare
from harness.scripted.course import course
from harness.scripted.faults import OF_UPLOADS
from harness.sweep.plan import SCRIPTED, emulated_conditions
from reports.records import RunStatus


class Clock:
    """Time passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connect(tmp_path, clock):
    """connect(*schedule) -> (device, a function that opens a session to it)."""

    def make(*schedule: tuple[int, FaultKind], faults: FaultScript | None = None):
        declare(tmp_path / "pi", "pi", faults=faults or FaultScript(schedule=schedule))
        device = ScriptedDevice(tmp_path / "pi", clock=clock, sleep=clock.sleep)

        def session() -> RemoteSession:
            return RemoteSession(
                lambda: ScriptedTransport(device),
                root="edgemoe-farm",
                cache_dir=tmp_path / "cache",
                clock=clock,
                sleep=clock.sleep,
            )

        return device, session

    return make


def request(run_id="run-1", **changes) -> RunRequest:
    values = {"prompts": ((1, 2), (3,)), "max_new_tokens": 4, "repetitions": 3, "deadline_s": 60.0, **changes}
    return RunRequest(run_id=run_id, container="blobs/x/c.emoe", strategy="naive-swap", **values)


def folders(device: ScriptedDevice) -> list[str]:
    return [path.name for path in device.home.glob("*/runs/*")]


def test_a_run_is_complete_and_says_that_it_is_made_up(connect) -> None:
    device, session = connect()
    outcome = session().execute(request())
    assert (outcome.status, outcome.reasons) == (RunStatus.OK, ())
    assert len(outcome.samples) == 6
    assert "scripted" in outcome.facts.model
    assert outcome.load.notes == ("scripted: every number is made up",)
    assert folders(device) == []
    assert device.starts() == ["run-1"]


def test_the_same_seed_gives_the_same_numbers(connect) -> None:
    device, session = connect()
    outcome = session().execute(request())
    text = '{"run_id": "r", "container": "c", "strategy": "edgemoe", "prompts": [[1]], "max_new_tokens": 2}'
    one, same, other = (course(text, device.facts, seed, None, 60.0) for seed in ("1", "1", "2"))
    assert one == same != other
    assert {s.tokens for s in outcome.samples if s.prompt == 0} == {outcome.samples[0].tokens}


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        (FaultKind.DROP, RunStatus.OK, None),
        (FaultKind.OFFLINE, RunStatus.UNREACHABLE, "not back within 120 s"),
        (FaultKind.STALL, RunStatus.TIMED_OUT, "no end within 60 s"),
        (FaultKind.THROTTLE, RunStatus.OK, None),
        (FaultKind.REBOOT, RunStatus.UNREACHABLE, "the device restarted during the run"),
        (FaultKind.SLOW_DISK, RunStatus.OK, None),
        (FaultKind.DAMAGE, RunStatus.FAILED, "damaged output"),
        (FaultKind.DISK_FULL, RunStatus.FAILED, "disk is full"),
        (FaultKind.OUT_OF_MEMORY, RunStatus.OUT_OF_MEMORY, "counted 1 out-of-memory kill"),
    ],
)
def test_a_fault_costs_its_own_run_and_no_other(connect, clock, kind, status, reason) -> None:
    device, session = connect((2, kind))
    open_ = session()
    assert open_.execute(request("run-1")).status is RunStatus.OK
    outcome = open_.execute(request("run-2"))
    assert outcome.status is status
    assert (outcome.reasons == ()) if reason is None else (reason in outcome.reasons[0])
    assert open_.execute(request("run-3")).status is RunStatus.OK
    assert device.starts() == ["run-1", "run-2", "run-3"], "each engine was started once"
    assert folders(device) == []


@pytest.mark.parametrize("variant", range(7))
def test_damage_of_every_kind_is_a_failure_and_harmless(connect, tmp_path, monkeypatch, variant) -> None:
    faults = FaultScript()
    monkeypatch.setattr(FaultScript, "of_run", lambda *_: ScriptedFault(FaultKind.DAMAGE, 0.5, variant))
    outcome = connect(faults=faults)[1]().execute(request())
    assert outcome.status is RunStatus.FAILED
    assert all(reason.isprintable() for reason in outcome.reasons)
    assert "\x1b" not in outcome.log_tail


def test_a_throttled_run_is_slower_from_some_sample_on(connect) -> None:
    _, session = connect((1, FaultKind.THROTTLE))
    times = [sum(sample.steps.time_s) for sample in session().execute(request()).samples]
    assert max(times) > 1.8 * min(times)
    assert times[-1] > 1.8 * times[0]


def test_a_run_goes_on_without_its_controller_and_is_collected_by_the_next(connect, clock) -> None:
    class ControllerDied(Exception):
        pass

    def die(event, content) -> None:
        if event == "loaded":
            raise ControllerDied

    device, session = connect()
    with pytest.raises(ControllerDied):
        session().execute(request(), on_event=die)
    clock.sleep(3600.0)
    before = clock.now
    outcome = session().execute(request())
    assert outcome.status is RunStatus.OK
    assert clock.now - before < 1.0, "nothing was left to wait for"
    assert device.starts() == ["run-1"]


def test_a_run_that_is_kept_is_there_until_it_is_forgotten(connect) -> None:
    device, session = connect()
    first = session()
    assert first.execute(request(), keep=True).status is RunStatus.OK
    assert folders(device) == ["run-1"]
    again = session().execute(request(), keep=True)  # the first controller died before it had stored the outcome
    assert again.status is RunStatus.OK
    assert device.starts() == ["run-1"]
    first.forget("run-1")
    assert folders(device) == []


def test_a_failed_run_that_is_kept_fails_again_and_is_not_repeated(connect) -> None:
    device, session = connect((1, FaultKind.DAMAGE))
    outcomes = [session().execute(request(), keep=True) for _ in range(2)]
    assert {outcome.status for outcome in outcomes} == {RunStatus.FAILED}
    assert device.starts() == ["run-1"]


def test_what_another_controller_left_goes_before_the_next_run(connect) -> None:
    device, session = connect()
    session().execute(request(), keep=True)
    resumed = session()
    resumed.forget("run-1")
    assert resumed.execute(request("run-2")).status is RunStatus.OK
    assert folders(device) == []


def test_a_device_restarts_under_another_boot_id(connect, clock) -> None:
    device, session = connect((1, FaultKind.REBOOT))
    boot = device.boot_id()
    session().execute(request())
    assert device.boot_id() != boot
    assert session().facts.boot_id == device.boot_id()


def test_a_cut_upload_goes_on_where_it_stopped(connect, tmp_path) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(bytes(800_000))
    device, session = connect((0, FaultKind.DROP))
    open_ = session()
    sent_before = open_.bytes_sent
    path = Path(open_.put(model))
    assert path.stat().st_size == 800_000
    assert path.is_relative_to(device.home)
    assert open_.bytes_sent - sent_before == 800_000
    again = session()
    again.put(model)
    assert again.bytes_sent == 0


def test_a_full_disk_refuses_the_first_upload_and_takes_the_next(connect, tmp_path) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(bytes(1000))
    open_ = connect((0, FaultKind.DISK_FULL))[1]()
    with pytest.raises(DiskFullError, match=r"pi: model.bin needs"):
        open_.put(model)
    assert open_.deployed(model) is None
    assert open_.put(model)


def test_a_device_that_is_off_cannot_be_reached(connect) -> None:
    device, session = connect()
    device.cut_off(60.0)
    with pytest.raises(UnreachableError, match="pi: cannot be reached"):
        session()


def test_faults_follow_from_seed_device_and_count_alone() -> None:
    script = FaultScript(7, {"drop": 0.2, "reboot": 0.1})
    found = [script.of_run("pi", n) for n in range(1, 1001)]
    assert found == [script.of_run("pi", n) for n in range(1, 1001)]
    assert found != [script.of_run("orin", n) for n in range(1, 1001)]
    kinds = [fault.kind for fault in found if fault]
    assert 150 < kinds.count(FaultKind.DROP) < 250
    assert 60 < kinds.count(FaultKind.REBOOT) < 140
    assert set(kinds) == {FaultKind.DROP, FaultKind.REBOOT}
    uploads = {fault.kind for n in range(1, 1001) if (fault := script.of_upload("pi", n))}
    assert uploads <= set(OF_UPLOADS)


def test_an_inventory_may_declare_scripted_devices_and_records_say_so(tmp_path) -> None:
    declare(tmp_path / "pi", "pi", speed=1000.0)
    entry = {"host": "scripted", "scripted": str(tmp_path / "pi")}
    device = Inventory.parse({"version": 1, "devices": {"pi": entry}})["pi"]
    assert emulated_conditions(device) == (SCRIPTED,)
    session = open_session(device, known_hosts=tmp_path / "known_hosts", cache_dir=tmp_path / "cache")
    assert session.execute(request()).status is RunStatus.OK
    with pytest.raises(InventoryError, match="scripted"):
        Inventory.parse({"version": 1, "devices": {"pi": {**entry, "scripted": "\n"}}})


def test_a_run_is_cancelled_on_the_device(connect) -> None:
    open_ = connect((1, FaultKind.STALL))[1]()
    outcome = open_.execute(request(), on_event=lambda event, _: event == "started" and open_.cancel())
    assert outcome.status is RunStatus.FAILED
    assert outcome.reasons == ("cancelled",)


def test_a_file_is_looked_for_again_after_a_run_that_failed(connect, tmp_path) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(bytes(1000))
    open_ = connect((2, FaultKind.OUT_OF_MEMORY))[1]()
    path = Path(open_.put(model))
    assert open_.execute(request("run-1")).status is RunStatus.OK
    path.unlink()
    open_.put(model)
    assert not path.exists(), "it was seen there already"
    assert open_.execute(request("run-2")).status is RunStatus.OUT_OF_MEMORY
    open_.put(model)
    assert path.exists()
