"""A device in use: most of it over a real OpenSSH server and over the local transport alike."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Never

import pytest

from engine.protocol import RunRequest, Settle
from harness.device.remote import RemoteSession
from harness.errors import DiskFullError, PythonMissingError, UnreachableError, UsageError
from harness.transport.local import LocalTransport
from harness.transport.ssh import SshTransport
from reports import records
from reports.records import RunStatus
from tests.harness.fake_transport import FakeTransport, LinkFault


def request(strategy="good", run_id="run-1", **changes):
    values = {"prompts": ((1, 2),), "max_new_tokens": 1, "repetitions": 2, "deadline_s": 60, **changes}
    return RunRequest(run_id=run_id, container="c", strategy=strategy, **values)


@pytest.fixture
def open_session(tmp_path, stub_engine):
    """open_session(connect, **changes) -> RemoteSession with the stub engine; closed with the test."""
    sessions = []

    def make(connect, root=None, **changes):
        options = {"cache_dir": tmp_path / "cache", "engine_source": stub_engine, "reconnect_s": 5.0}
        options.update({"python": sys.executable, **changes})
        session = RemoteSession(connect, root=root or str(tmp_path / "pi" / "root"), **options)
        sessions.append(session)
        return session

    yield make
    for session in sessions:
        session.close()


@pytest.fixture(params=["local", "ssh"])
def connect(request, tmp_path):
    """A function that opens a new transport to one device, whose farm folder is tmp_path/pi/root."""
    if request.param == "local":
        return lambda: LocalTransport("pi", tmp_path / "pi")
    server = request.getfixturevalue("sshd")
    return lambda: SshTransport(server.device, server.known_hosts)


@pytest.fixture
def over_ssh(sshd):
    return lambda: SshTransport(sshd.device, sshd.known_hosts)


def runs(tmp_path):
    return sorted(path.name for path in (tmp_path / "pi" / "root" / "runs").iterdir())


def engine_group(tmp_path, run="run-1"):
    path = tmp_path / "pi" / "root" / "runs" / run / "engine.json"
    return json.loads(path.read_text())["group"] if path.exists() else None


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


# --- a run and its endings ------------------------------------------------------------------------------------------


def test_a_good_run_comes_back_whole_and_leaves_nothing(open_session, connect, tmp_path) -> None:
    session = open_session(connect)
    events = []
    outcome = session.execute(request(), on_event=lambda event, content: events.append(event))
    assert (outcome.status, outcome.reasons) == (RunStatus.OK, ())
    assert [s.repetition for s in outcome.samples] == [0, 1]
    assert outcome.facts.hostname == session.facts.hostname == "stub"
    assert outcome.load is not None
    assert outcome.totals is not None
    assert events == ["started", "loaded", "sample", "sample", "finished"]
    assert outcome.log_tail.startswith("stub: ")
    assert "-m engine run --request" in outcome.command
    assert runs(tmp_path) == []


@pytest.mark.parametrize(
    ("strategy", "status", "fault", "reason"),
    [
        ("memory", RunStatus.OUT_OF_MEMORY, records.Fault.OUT_OF_MEMORY, "does not fit"),
        ("killed", RunStatus.FAILED, records.Fault.KILLED, "killed by signal 9; no out-of-memory kill was counted"),
        ("garbage", RunStatus.FAILED, records.Fault.DAMAGED_OUTPUT, "damaged output: not JSON"),
        ("flood", RunStatus.FAILED, records.Fault.DAMAGED_OUTPUT, "an event is longer than"),
        ("escape", RunStatus.FAILED, records.Fault.ENGINE, "exited with status 3: red word"),
    ],
)
def test_a_bad_ending_is_an_outcome_with_its_reason(
    open_session, connect, tmp_path, strategy, status, fault, reason
) -> None:
    outcome = open_session(connect).execute(request(strategy))
    assert (outcome.status, outcome.fault) == (status, fault)
    assert reason in outcome.reasons[0]
    assert all(c.isprintable() or c == "\n" for c in outcome.log_tail)
    assert runs(tmp_path) == []


@pytest.mark.parametrize("strategy", ["sleep", "stubborn"])
def test_the_deadline_of_a_run_holds_on_the_device(open_session, connect, tmp_path, strategy) -> None:
    session, groups = open_session(connect), []

    def note(event, content) -> None:
        if event == "loaded":
            groups.append(engine_group(tmp_path))

    outcome = session.execute(request(strategy, deadline_s=0.5), on_event=note)
    assert outcome.status is RunStatus.TIMED_OUT
    assert "0.5 s" in outcome.reasons[0]
    assert groups
    assert not is_running(groups[0])


def test_a_run_is_watched_and_its_conditions_come_back(open_session, connect) -> None:
    outcome = open_session(connect).execute(request(settle=Settle(max_wait_s=60, governor="none such")))
    assert outcome.status is RunStatus.OK
    assert outcome.conditions.readings >= 2
    assert outcome.conditions.resident is not None
    assert outcome.conditions.cpu_s > 0
    assert outcome.conditions.unsettled[0].endswith("not none such")
    assert not any(text.startswith("watch:") for text in outcome.conditions.unknown)
    assert (outcome.conditions.memory_limit_bytes, outcome.conditions.memory_limit_method) == (None, "none")


def test_a_device_that_settles_says_so_and_can_be_cancelled(open_session, tmp_path) -> None:
    """No engine runs yet, and what waits for it ends all the same."""
    session = open_session(lambda: LocalTransport("pi", tmp_path / "pi"))
    waiting, said = threading.Event(), []

    def note(event, content) -> None:
        said.append((event, content))
        waiting.set()

    canceller = threading.Thread(target=lambda: (waiting.wait(30), session.cancel()))
    canceller.start()
    outcome = session.execute(request(settle=Settle(max_wait_s=600, max_load=-1.0)), on_event=note)
    canceller.join()
    assert (outcome.status, outcome.reasons) == (RunStatus.FAILED, ("cancelled",))
    assert {event for event, _ in said} == {"settling"}
    assert "other tasks want a processor" in said[0][1]["reasons"][0]
    assert runs(tmp_path) == []


def test_a_device_whose_watch_fails_is_measured_and_unknown(open_session, stub_engine, tmp_path) -> None:
    (stub_engine / "device" / "watch.py").write_text("raise OSError('no sensors here')")
    outcome = open_session(lambda: LocalTransport("pi", tmp_path / "pi")).execute(request())
    assert outcome.status is RunStatus.OK
    assert "was not watched" in outcome.conditions.unknown[0]
    assert "no sensors here" in outcome.log_tail


def test_a_run_that_is_interrupted_is_killed_on_the_device(open_session, connect, tmp_path) -> None:
    groups = []

    def interrupt(event, content) -> None:
        if event == "loaded":
            groups.append(engine_group(tmp_path))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_session(connect).execute(request("sleep"), on_event=interrupt)
    assert not is_running(groups[0])
    assert runs(tmp_path) == []


def test_a_run_is_cancelled_from_another_thread(open_session, connect, tmp_path) -> None:
    session, loaded = open_session(connect), threading.Event()
    canceller = threading.Thread(target=lambda: (loaded.wait(30), session.cancel()))
    canceller.start()
    outcome = session.execute(request("stubborn"), on_event=lambda event, _: event == "loaded" and loaded.set())
    canceller.join(30)
    assert (outcome.status, outcome.reasons) == (RunStatus.FAILED, ("cancelled",))
    assert runs(tmp_path) == []
    assert session.execute(request("sleep", "run-2")).reasons == ("cancelled",)


def test_an_engine_that_cannot_start_says_why(open_session, connect, tmp_path) -> None:
    session = open_session(connect)
    session.python = type(session.python)("/nonexistent/python3", "3.11", "2")
    outcome = session.execute(request())
    assert outcome.status is RunStatus.FAILED
    assert "/nonexistent/python3" in outcome.reasons[0]


# --- lost links and dead controllers --------------------------------------------------------------------------------


def test_a_detached_run_survives_killed_connections_and_is_collected(open_session, over_ssh, sshd, tmp_path) -> None:
    session, groups, killed = open_session(over_ssh), [], []

    def cut(event, content) -> None:
        if event in ("loaded", "sample"):
            groups.append(engine_group(tmp_path))
            killed.append(sshd.kill_sessions())

    outcome = session.execute(request("slow", max_new_tokens=5), on_event=cut)
    assert killed[0] > 0
    assert outcome.status is RunStatus.OK, outcome.reasons
    assert len(outcome.samples) == 2
    assert set(groups) == {groups[0]}, "the engine was started again"
    assert runs(tmp_path) == []


def test_a_link_that_drops_at_any_byte_costs_nothing(open_session, tmp_path) -> None:
    def connect():
        return FakeTransport(LocalTransport("pi", tmp_path / "pi"))

    whole = open_session(connect).execute(request())
    for after_bytes in (0, 1, 500, 2000):
        session = open_session(connect)
        session.hold()
        session._transport._script = iter(
            [LinkFault("drop", after_bytes), None, LinkFault("refuse"), LinkFault("refuse")]
        )
        outcome = session.execute(request(run_id=f"run-{after_bytes}"))
        assert outcome.status is RunStatus.OK, outcome.reasons
        assert outcome.samples == whole.samples


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        (LinkFault("stall"), RunStatus.TIMED_OUT, "gave no end in time"),
        (LinkFault("truncate", 600), RunStatus.FAILED, "ended without its last event"),
    ],
)
def test_a_wire_that_lies_costs_one_run(open_session, tmp_path, fault, status, reason) -> None:
    session = open_session(lambda: FakeTransport(LocalTransport("pi", tmp_path / "pi")))
    session.hold()
    session._transport._script = iter([fault])
    outcome = session.execute(request())
    assert outcome.status is status
    assert reason in outcome.reasons[0]
    assert session.execute(request(run_id="run-2")).status is RunStatus.OK


def test_the_run_of_a_controller_that_died_is_collected_and_not_run_again(
    open_session, connect, tmp_path, wait_until
) -> None:
    class ControllerDied(Exception):
        pass

    def die(event, content) -> None:
        if event == "loaded":
            raise ControllerDied

    first = open_session(connect)
    with pytest.raises(ControllerDied):
        first.execute(request("slow", max_new_tokens=3), on_event=die)
    group = engine_group(tmp_path)
    wait_until((tmp_path / "pi/root/runs/run-1/exit.json").exists, "the engine to end without a controller")
    outcome = open_session(connect).execute(request("slow", max_new_tokens=3))
    assert outcome.status is RunStatus.OK, outcome.reasons
    assert len(outcome.samples) == 2
    assert not is_running(group)
    assert runs(tmp_path) == []


def test_a_run_folder_of_another_request_is_never_taken_for_this_one(open_session, connect) -> None:
    class ControllerDied(Exception):
        pass

    def die(event, content) -> Never:
        raise ControllerDied

    with pytest.raises(ControllerDied):
        open_session(connect).execute(request(), on_event=die)
    outcome = open_session(connect).execute(request(repetitions=1))
    assert outcome.status is RunStatus.FAILED
    assert "another request" in outcome.reasons[0]


def test_a_device_that_dies_in_a_run_is_unreachable(open_session, over_ssh, sshd) -> None:
    session = open_session(over_ssh, reconnect_s=1.0)
    outcome = session.execute(request("sleep"), on_event=lambda event, _: event == "loaded" and sshd.kill_everything())
    assert outcome.status is RunStatus.UNREACHABLE
    assert outcome.reasons[0].startswith("pi: ")
    assert "not back within 1 s" in outcome.reasons[0]
    assert outcome.facts is not None, "what it said before is kept"


def test_an_engine_that_dies_with_its_supervisor_is_noticed(open_session, connect, tmp_path) -> None:
    def kill_both(event, content) -> None:
        if event == "loaded":
            group = engine_group(tmp_path)
            parent = int(Path(f"/proc/{group}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(parent, signal.SIGKILL)
            os.kill(group, signal.SIGKILL)

    outcome = open_session(connect).execute(request("sleep"), on_event=kill_both)
    assert outcome.status is RunStatus.FAILED
    assert "the engine and its supervisor was killed" in outcome.reasons[0]


def test_what_was_given_up_for_lost_is_ended_before_the_next_run(open_session, tmp_path) -> None:
    session = open_session(lambda: FakeTransport(LocalTransport("pi", tmp_path / "pi")), reconnect_s=0.3)
    groups = []

    def cut(event, content) -> None:
        if event == "loaded":
            groups.append(engine_group(tmp_path))
            session._transport._script = iter([LinkFault("refuse")] * 3)
            raise UnreachableError("pi: the connection was lost")

    assert session.execute(request("sleep"), on_event=cut).status is RunStatus.UNREACHABLE
    assert is_running(groups[0])
    session._transport._script = iter(())
    assert session.execute(request("good", "run-2")).status is RunStatus.OK
    assert not is_running(groups[0])
    assert runs(tmp_path) == []


# --- deployment -----------------------------------------------------------------------------------------------------


def test_what_a_device_has_costs_no_bytes(open_session, connect, tmp_path) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(os.urandom(3_000_000))
    first = open_session(connect)
    path = first.put(model)
    assert first.bytes_sent > 3_000_000
    second = open_session(connect)
    assert second.put(model) == path
    assert second.bytes_sent == 0
    assert second.engine_sha256 == first.engine_sha256
    assert Path(path).read_bytes() == model.read_bytes()
    assert Path(path).is_relative_to(tmp_path / "pi" / "root" / "blobs")


def test_only_what_runs_on_a_device_is_deployed(open_session, connect, stub_engine, tmp_path) -> None:
    for name in ("offline", "tests", "__pycache__"):
        (stub_engine / name).mkdir()
        (stub_engine / name / "x.py").write_text("")
    open_session(connect)
    (deployed,) = (tmp_path / "pi" / "root" / "engines").iterdir()
    names = {p.name for p in (deployed / "engine").iterdir()} - {"__pycache__"}  # made by the device's python
    assert names == {"device", *(path.name for path in stub_engine.glob("*.py"))}


def test_a_cut_upload_goes_on_within_one_put(open_session, sshd, relay, tmp_path) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(os.urandom(20_000_000))
    device = sshd.device_at(relay.port)
    session = open_session(lambda: SshTransport(device, sshd.known_hosts))
    relay.limit = 12_000_000
    path = session.put(model)
    assert Path(path).read_bytes() == model.read_bytes()
    assert relay.forwarded < 30_000_000, "it began again from the start"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_named_before_anything_is_sent(open_session, sshd, over_ssh, tmp_path, mount_tmpfs) -> None:
    root = mount_tmpfs(tmp_path / "small", "24m")
    model = tmp_path / "model.bin"
    model.write_bytes(bytes(20_000_000))
    session = open_session(over_ssh, root=str(root / "root"))
    before = session.bytes_sent
    with pytest.raises(DiskFullError, match=r"pi: model.bin needs 20.0 MB .* \d+\.\d MB are free"):
        session.put(model)
    assert session.bytes_sent == before


def test_a_file_that_is_missing_here_is_not_the_devices_fault(open_session, connect, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"gone\.bin cannot be read"):
        open_session(connect).put(tmp_path / "gone.bin")


# --- python on the device -------------------------------------------------------------------------------------------


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_a_python_that_is_too_old_is_named_with_its_version(open_session, connect, tmp_path) -> None:
    answer = '{"path": "/usr/bin/python3", "version": [3, 6, 9], "numpy": "1.13.3", "reason": ""}'
    old = script(tmp_path / "python3", f"echo '{answer}'; exit 1")
    with pytest.raises(PythonMissingError, match=r"pi: the engine needs python3 >= 3.8 .*/usr/bin/python3 is 3\.6\.9"):
        open_session(connect, python=old)


def test_a_missing_numpy_is_named_with_the_command_that_installs_it(open_session, connect, tmp_path) -> None:
    real = os.path.realpath("/proc/self/exe")
    bare = script(tmp_path / "python3", f'exec {real} -I -S "$@"')
    with pytest.raises(PythonMissingError, match=r"pi: .* has no usable numpy: (run `|install python3 and numpy)"):
        open_session(connect, python=bare)


def test_a_declared_python_that_is_not_there(open_session, connect) -> None:
    with pytest.raises(PythonMissingError, match="pi: /opt/none was not found"):
        open_session(connect, python="/opt/none")
