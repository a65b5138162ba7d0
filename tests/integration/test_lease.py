"""Several controllers for one device: one measures, the others wait. The last tests are over a real OpenSSH server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.protocol import RunRequest
from harness.device.lease import Holder, Owner
from harness.device.remote import RemoteSession
from harness.errors import DeviceBusyError, LeaseLostError
from harness.transport.local import LocalTransport
from reports.records import RunStatus
from tests import command_line

pytestmark = pytest.mark.integration


def request(strategy="good", run_id="run-1", **changes):
    values = {"prompts": ((1, 2),), "max_new_tokens": 1, "repetitions": 2, "deadline_s": 60, **changes}
    return RunRequest(run_id=run_id, container="c", strategy=strategy, **values)


def holder(name, sweep="", **changes):
    return Holder(name, replace(Owner.this_process(sweep or f"sweep-{name}"), who=f"{name}@box", **changes))


@pytest.fixture
def controller(tmp_path, stub_engine):
    """controller(holder, wait_s): a session of one of several controllers, all with the same device."""
    sessions = []

    def make(who, wait_s=0.0):
        session = RemoteSession(
            lambda: LocalTransport("pi", tmp_path / "pi"), root=str(tmp_path / "pi/root"), python=sys.executable,
            cache_dir=tmp_path / "cache", engine_source=stub_engine, holder=who, wait_s=wait_s,
        )  # fmt: skip
        sessions.append(session)
        return session

    yield make
    for session in sessions:
        session.close()


@pytest.fixture
def device(tmp_path):
    return Device(tmp_path / "pi/root")


class Device:
    def __init__(self, root):
        self.root = root

    def queue(self):
        return json.loads((self.root / "lease/alive.json").read_text())["queue"]

    def let_expire(self) -> None:
        """Ages the lease as if the holder had not been heard of for long."""
        path = self.root / "lease/alive.json"
        signs = json.loads(path.read_text())
        path.write_text(json.dumps({**signs, "expires": 0.0, "heartbeat": 0.0}))

    def engine(self, run="run-1"):
        path = self.root / "runs" / run / "engine.json"
        return json.loads(path.read_text())["group"] if path.exists() else None


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


class ControllerDied(Exception):
    pass


def leave_running(session, device, strategy="sleep", **changes):
    """The controller is gone, its engine is not; returns the engine's process group."""
    groups = []

    def die(event, content) -> None:
        if event == "loaded":
            groups.append(device.engine())
            raise ControllerDied

    with pytest.raises(ControllerDied):
        session.execute(request(strategy, **changes), on_event=die)
    assert is_running(groups[0])
    return groups[0]


def dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# --- busy, waiting, given back --------------------------------------------------------------------------------------


def test_a_busy_device_is_refused_with_its_holder(controller, device) -> None:
    ann = controller(holder("ann"))
    ann.hold()
    with pytest.raises(DeviceBusyError, match=r"pi: held by ann@box for sweep sweep-ann since \d\d:\d\d.*unlock pi"):
        controller(holder("ben")).hold()
    assert device.queue() == []
    ann.close()
    assert controller(holder("ben")).hold() > 1


def test_who_waits_is_told_its_place_and_gets_the_device(controller) -> None:
    ann, ben = controller(holder("ann")), controller(holder("ben"), wait_s=60.0)
    token = ann.hold()
    told = []

    def waiting(state) -> None:
        told.append(state)
        ann.close()

    assert ben.hold(waiting) > token
    assert len(told) == 1
    assert told[0].startswith("waiting: 1st in the queue, held by ann@box for sweep sweep-ann since ")


def test_waiting_is_broken_off_and_leaves_no_ticket(controller, device) -> None:
    ann, ben = controller(holder("ann")), controller(holder("ben"), wait_s=60.0)
    ann.hold()

    class Stopped(Exception):
        pass

    def stop() -> None:
        if ben_waits:
            raise Stopped

    ben_waits = []
    with pytest.raises(Stopped):
        ben.hold(ben_waits.append, stop)
    ben.close()
    assert device.queue() == []


def test_a_sign_of_life_costs_nothing_between_short_runs(controller) -> None:
    ann = controller(holder("ann"))
    token = ann.hold()
    calls = []
    ann._lease._call = lambda *arguments, **options: calls.append(arguments)
    assert ann.hold() == token
    assert calls == []


# --- fencing --------------------------------------------------------------------------------------------------------


def test_a_holder_that_was_fenced_out_starts_nothing(controller, device) -> None:
    ann, ben = controller(holder("ann")), controller(holder("ben"))
    ann.hold()
    device.let_expire()
    ben.hold()
    outcome = ann.execute(request("good"))
    assert outcome.status is RunStatus.UNREACHABLE
    assert "lost, ben@box for sweep sweep-ben has taken the device" in outcome.reasons[0]
    assert not (device.root / "runs/run-1").exists()
    with pytest.raises(DeviceBusyError, match="held by ben@box"):
        ann.hold()
    assert ben.execute(request("good")).status is RunStatus.OK


def test_what_a_former_holder_left_running_is_ended_before_the_next_measures(controller, device) -> None:
    ann, ben = controller(holder("ann")), controller(holder("ben"))
    group = leave_running(ann, device, "stubborn")
    device.let_expire()
    ben.hold()
    assert not is_running(group)
    assert ann.execute(request("stubborn")).status is RunStatus.UNREACHABLE


def test_a_run_that_loses_its_device_half_way_is_unreachable_and_never_ok(controller, device) -> None:
    ann, ben = controller(holder("ann")), controller(holder("ben"))

    def take_over(event, content) -> None:
        if event == "loaded":
            device.let_expire()
            ben.hold()

    outcome = ann.execute(request("sleep"), on_event=take_over)
    assert outcome.status is RunStatus.UNREACHABLE
    assert "ben@box for sweep sweep-ben has taken the device" in outcome.reasons[0]


def test_a_former_holder_can_end_and_remove_nothing_of_its_successor(controller, device) -> None:
    """The controller that hung, and the one that goes on with its sweep elsewhere, know a run by the same id."""
    hung, resumed = controller(holder("hung", "run")), controller(holder("resumed", "run"))
    group = leave_running(hung, device)
    device.let_expire()
    resumed.hold()
    assert is_running(group), "the same sweep inherits what runs"
    hung._discard(hung._place.run("run-1"))
    hung._remove(hung._place.run("run-1"))
    assert is_running(group)
    resumed._discard(resumed._place.run("run-1"))
    assert not is_running(group)


def test_what_was_cut_off_under_another_holder_is_measured_anew(controller, device) -> None:
    ann, ben = controller(holder("ann")), controller(holder("ben"))
    leave_running(ann, device)
    device.let_expire()
    ben.hold()
    ben.close()
    outcome = controller(holder("resumed", "sweep-ann")).execute(request("good"))
    assert outcome.status is RunStatus.OK, outcome.reasons


def test_two_engines_of_one_holder_do_not_run_side_by_side(controller, device) -> None:
    ann = controller(holder("ann"))
    group = leave_running(ann, device)
    assert ann.execute(request("good", "run-2")).status is RunStatus.OK
    assert not is_running(group)


def test_an_upload_notices_that_the_device_is_lost(controller, device, tmp_path) -> None:
    ann, ben = controller(holder("ann")), controller(holder("ben"))
    ann.hold()
    device.let_expire()
    ben.hold()
    ann._lease._renewed_s -= 1000
    (tmp_path / "model").write_bytes(bytes(1 << 20))
    with pytest.raises(LeaseLostError, match="pi: the lease on the device was lost, ben@box"):
        ann.put(tmp_path / "model")


# --- resume ---------------------------------------------------------------------------------------------------------


def test_a_resumed_sweep_takes_over_from_its_killed_controller_at_once(controller, device) -> None:
    dead = holder("killed", "run", pid=dead_process())
    group = leave_running(controller(dead), device, "slow", max_new_tokens=3)
    resumed = controller(holder("resumed", "run"))
    resumed.hold()
    outcome = resumed.execute(request("slow", max_new_tokens=3))
    assert outcome.status is RunStatus.OK, outcome.reasons
    assert not is_running(group)


@pytest.mark.parametrize(
    "changes",
    [
        {"sweep": "another"},
        {"process": "elsewhere pid:[1] 5"},
        {"process": ""},
        {"pid": os.getpid()},
    ],
)
def test_a_holder_that_may_live_is_waited_for(controller, changes) -> None:
    usual = {"sweep": "run", "pid": dead_process()}
    controller(holder("killed", **{**usual, **changes})).hold()
    with pytest.raises(DeviceBusyError):
        controller(holder("resumed", "run")).hold()


# --- two controllers, two processes ---------------------------------------------------------------------------------

CONTROLLER = """
import sys
from pathlib import Path
from device_inventory import Inventory
from engine.protocol import RunRequest
from harness.device.lease import Holder
from harness.device.opening import open_session
inventory, known_hosts, cache, engine, name = sys.argv[1:]
device = Inventory.load(Path(inventory))["pi"]
for n in range(3):
    session = open_session(
        device, known_hosts=Path(known_hosts), cache_dir=Path(cache), engine_source=Path(engine),
        holder=Holder.this_process(name), wait_s=120.0,
    )
    token = session.hold()
    for m in range(2):
        request = RunRequest(f"{name}-{n}-{m}", str(Path(device.root) / "busy"), "alone", ((1,),), 1)
        outcome = session.execute(request)
        print(token, outcome.status.value, *outcome.reasons, flush=True)
    session.close()
"""


@pytest.fixture
def inventory(sshd, tmp_path):
    """A file that declares one device, which is trusted."""
    device, path = sshd.device, tmp_path / "devices.toml"
    path.write_text(
        f'version = 1\n[devices.pi]\nhost = "{device.host}"\nport = {device.port}\nuser = "{device.user}"\n'
        f'identity_file = "{device.identity_file}"\nroot = "{device.root}"\npython = "{device.python}"\n'
    )
    return path


def test_two_controllers_never_measure_at_once(sshd, inventory, stub_engine, tmp_path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONTROLLER, str(inventory), str(sshd.known_hosts), str(tmp_path / name),
             str(stub_engine), name],
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
        )
        for name in ("ann", "ben")
    ]  # fmt: skip
    lines = [process.communicate(timeout=200)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(line.split()[1:] == ["ok"] for line in (*lines[0], *lines[1])), lines
    tokens = [{int(line.split()[0]) for line in of_one} for of_one in lines]
    assert [len(of_one) for of_one in tokens] == [3, 3]
    assert not tokens[0] & tokens[1]


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def farm(inventory, sshd):
    """farm(*arguments, code, typed) -> what the command says."""

    def run(*arguments, code=0, typed=None):
        options = ("--inventory", inventory, "--known-hosts", sshd.known_hosts)
        return command_line.farm(*arguments, *options, code=code, typed=typed)

    return run


def test_locks_are_shown_and_taken_away(farm, controller, device) -> None:
    def locks():
        (found,) = json.loads(farm("devices", "locks", "--json").stdout)
        return found

    free = locks()
    assert (free["device"], free["state"], free["holder"], free["error"]) == ("pi", "free", None, None)
    assert "nothing to unlock" in farm("devices", "unlock", "pi").stdout

    ann = controller(holder("ann"))
    token = ann.hold()
    held = locks()
    assert (held["state"], held["holder"], held["sweep"], held["token"]) == ("held", "ann@box", "sweep-ann", token)
    assert 0 <= held["heartbeat_age_s"] <= held["since_s"]
    assert 0 < held["expires_in_s"] <= 180
    assert "ann@box" in farm("devices", "locks", "pi").stdout

    for typed in ("n\n", ""):
        left = farm("devices", "unlock", "pi", code=4, typed=typed)
        assert "held, ann@box for sweep sweep-ann" in left.stdout
        assert "pi: left to ann@box" in left.stderr
    assert "pi: unlocked, free now" in farm("devices", "unlock", "pi", typed="y\n").stdout
    assert locks()["token"] > token
    outcome = ann.execute(request("good"))
    assert outcome.status is RunStatus.UNREACHABLE
    assert "removed by `devices unlock`" in outcome.reasons[0]
    ann.hold()
    device.let_expire()
    assert locks()["state"] == "expired"
    farm("devices", "unlock", "pi")
    ann.hold()
    farm("devices", "unlock", "pi", "--yes")


def test_locks_of_a_device_that_is_gone(farm, sshd) -> None:
    sshd.stop()
    result = farm("devices", "locks", "--json", code=4)
    (found,) = json.loads(result.stdout)
    assert found["state"] is None
    assert "cannot be reached" in found["error"]
    assert "1 of 1 devices cannot be asked: pi" in result.stderr


def test_options_of_the_group_are_not_silently_ignored(inventory) -> None:
    assert "give options after `locks`" in command_line.refused("devices", "--json", "locks", "--inventory", inventory)
