"""The lease on a device, with its clock and its boot in the test's hands."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import agent
from harness.agent import lease, place, runs

TTL_S = 100.0


class Competitor:
    """Asks as a controller would; `now` and `boot` are the device's."""

    def __init__(self, root: Path, name: str, sweep: str = "") -> None:
        self.root, self.name = place.prepare(str(root)), name
        self.owner = {"who": f"{name}@box", "sweep": sweep or f"sweep of {name}", "process": "1 2", "pid": 7}

    def ask(self, now: float, boot: str = "boot-1", **options: object):
        return lease.request(self.root, self.name, self.owner, TTL_S, lambda: now, boot, **options)

    def renew(self, token: int, now: float, boot: str = "boot-1") -> bool:
        return lease.renew(self.root, self.name, token, TTL_S, lambda: now, boot)["granted"]

    def release(self, now: float) -> None:
        lease.release(self.root, self.name, lambda: now, "boot-1")


@pytest.fixture
def three(tmp_path: Path) -> tuple[Competitor, Competitor, Competitor]:
    return Competitor(tmp_path, "ann"), Competitor(tmp_path, "ben"), Competitor(tmp_path, "cas")


def test_a_lease_is_one_holders_until_it_is_released(three) -> None:
    ann, ben, _ = three
    first = ann.ask(10.0)
    assert (first["granted"], first["state"], first["token"]) == (True, "held", 1)
    refused = ben.ask(11.0)
    assert (refused["granted"], refused["position"], refused["owner"]) == (False, 1, ann.owner)
    assert (refused["since_s"], refused["heartbeat_age_s"], refused["expires_in_s"]) == (1.0, 1.0, 99.0)
    ann.release(12.0)
    second = ben.ask(13.0)
    assert second["granted"]
    assert second["token"] > first["token"]
    assert second["queue"] == []


def test_asking_again_keeps_what_one_has(three) -> None:
    ann, ben, _ = three
    token = ann.ask(0.0)["token"]
    assert ben.ask(1.0)["position"] == 1
    again = ann.ask(60.0)
    assert (again["granted"], again["token"], again["heartbeat_age_s"]) == (True, token, 0.0)
    assert ben.ask(60.0)["position"] == 1


def test_a_holder_that_gives_no_sign_of_life_loses_it_to_whoever_asks_and_not_before(three, tmp_path) -> None:
    ann, ben, _ = three
    token = ann.ask(0.0)["token"]
    assert ann.renew(token, 99.0)
    assert not ben.ask(198.9)["granted"]
    assert lease.look(str(tmp_path), lambda: 199.0, "boot-1")["state"] == "expired"
    assert ann.renew(token, 250.0), "nobody wanted it meanwhile"
    assert ben.ask(350.0)["granted"]
    assert not ann.renew(token, 351.0)


def test_a_lease_of_another_boot_is_void(three, tmp_path) -> None:
    ann, ben, cas = three
    token = ann.ask(1000.0)["token"]
    assert not ben.ask(1001.0)["granted"]
    assert lease.look(str(tmp_path), lambda: 5.0, "boot-2")["state"] == "expired"
    taken = cas.ask(5.0, "boot-2")
    assert taken["granted"], "ben's place in the queue was of that boot, too"
    assert taken["token"] > token
    assert not ann.renew(token, 6.0, "boot-2")


def test_a_device_that_does_not_tell_its_boots_apart_is_judged_by_its_clock(three) -> None:
    ann, ben, _ = three
    ann.ask(1000.0, boot=None)
    assert not ben.ask(1001.0, boot=None)["granted"]
    assert ben.ask(5.0, boot=None)["granted"], "time does not go backwards without a restart"


def test_who_came_first_is_next(three) -> None:
    ann, ben, cas = three
    ann.ask(0.0)
    assert [ben.ask(1.0)["position"], cas.ask(2.0)["position"], ben.ask(3.0)["position"]] == [1, 2, 1]
    ann.release(4.0)
    assert not cas.ask(5.0)["granted"]
    assert not ann.ask(5.0)["granted"]
    assert ben.ask(6.0)["granted"]
    assert [waiter["owner"] for waiter in cas.ask(7.0)["queue"]] == [cas.owner, ann.owner]


def test_who_waits_and_dies_loses_the_place(three) -> None:
    ann, ben, cas = three
    token = ann.ask(0.0)["token"]
    ben.ask(1.0)
    for now in range(2, 80, 10):
        ann.renew(token, now)
        assert cas.ask(float(now))["position"] == (2 if now <= 61 else 1)


def test_who_leaves_the_queue_leaves_no_trace(three) -> None:
    ann, ben, cas = three
    ann.ask(0.0)
    ben.ask(1.0)
    ben.release(2.0)
    assert cas.ask(3.0, queue=False)["position"] == 1
    assert ann.ask(4.0)["queue"] == []


def test_a_dead_holder_is_replaced_without_waiting_but_only_that_one(three) -> None:
    ann, ben, cas = three
    ann.ask(0.0)
    ben.ask(1.0)
    assert not cas.ask(2.0, instead_of="ben")["granted"]
    assert cas.ask(3.0, instead_of="ann")["granted"]
    assert not ben.ask(4.0, instead_of="ann")["granted"]


def test_only_the_same_sweep_inherits_what_runs(tmp_path) -> None:
    folders = {name: tmp_path / "runs" / name for name in ("s1-a", "s1-b", "s10-a", "s1-c.77.part")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    runs.own(str(folders["s1-a"]), "killed")
    runs.own(str(folders["s10-a"]), "killed")  # s1-b: whoever inherited it was killed before it could say so
    runs.inherit(str(tmp_path), "resumed", "s1")
    assert [name for name, folder in folders.items() if runs.is_own(str(folder), "resumed")] == ["s1-a", "s1-b"]
    runs.inherit(str(tmp_path), "nobody", "")
    assert not any(runs.is_own(str(folder), "nobody") for folder in folders.values())


def test_unlocking_fences_the_holder_out_and_nobody_who_came_since(three, tmp_path) -> None:
    ann, ben, _ = three
    token = ann.ask(0.0)["token"]
    ben.ask(1.0)
    after = lease.unlock(str(tmp_path), token, lambda: 2.0, "boot-1")
    assert (after["state"], after["holder"]) == ("free", None)
    assert after["token"] > token
    assert not ann.renew(token, 3.0)
    taken = ben.ask(4.0)
    assert taken["granted"]
    assert lease.unlock(str(tmp_path), token, lambda: 5.0, "boot-1")["holder"] == "ben", "that was ann's token"


def test_the_token_survives_release_restart_and_lost_signs_of_life(three, tmp_path) -> None:
    ann, ben, _ = three
    tokens = [ann.ask(0.0)["token"]]
    ann.release(1.0)
    tokens.append(ben.ask(2.0)["token"])
    (tmp_path / "lease/alive.json").write_text("{ half of it")
    tokens.append(ann.ask(3.0)["token"])
    tokens.append(ben.ask(1.0, "boot-2")["token"])
    assert tokens == sorted(set(tokens))


def test_half_a_change_is_no_change(three, tmp_path) -> None:
    """An agent that is killed between its two files leaves the lease to nobody new."""
    ann, ben, cas = three
    ann.ask(0.0)
    before = (tmp_path / "lease/lease.json").read_bytes()
    assert ben.ask(101.0)["granted"]
    (tmp_path / "lease/lease.json").write_bytes(before)
    assert not ben.renew(2, 102.0)
    assert cas.ask(103.0)["granted"]


def test_a_lock_that_is_never_given_back_is_an_error_with_a_name(three, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lease, "LOCK_S", 0.05)
    three[0].ask(0.0)
    with lease.locked(str(tmp_path)), pytest.raises(TimeoutError, match="lease/lock has been locked for"):
        three[1].ask(1.0)


def test_what_is_sent_to_a_device_needs_nothing_there_but_python(tmp_path: Path) -> None:
    for name, source in agent._SOURCES:
        for node in ast.walk(ast.parse(source, feature_version=(3, 8))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                ours = module.startswith(("harness.agent", "engine."))  # the deployed engine's, where it is needed
                assert ours or module.split(".")[0] in sys.stdlib_module_names, name
    place.prepare(str(tmp_path))
    command = [sys.executable, "-I", "-c", agent._BOOT, str(len(agent.AGENT)), "look", str(tmp_path)]
    done = subprocess.run(command, input=agent.AGENT, capture_output=True, cwd=tmp_path, check=True, timeout=60)
    assert json.loads(done.stdout)["state"] == "free"


# --- the race -------------------------------------------------------------------------------------------------------

COMPETITOR = """
import fcntl, os, random, sys, time
from harness.agent import lease, runs
root, name, seed, ttl_s = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
chance, owner = random.Random(seed), {"who": name, "sweep": "race", "process": "1 2", "pid": 7}
def now():
    with open(root + "/clock") as file:
        return float(file.read())
while True:
    seen = lease.request(root, name, owner, ttl_s, now, "boot")
    if not seen["granted"]:
        time.sleep(chance.uniform(0, 5e-3))
        continue
    witness = os.open(root + "/witness", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed holder's goes with it
        line = "{}\\n".format(seen["token"])
    except OSError:
        line = "both\\n"
    with open(root + "/log", "a") as log:
        log.write(line)
    time.sleep(chance.uniform(0, 1e-3))
    os.close(witness)
    lease.release(root, name, now, "boot")
    time.sleep(chance.uniform(0, 1e-3))
"""


def test_a_thousand_times_never_both(tmp_path: Path) -> None:
    """Three processes; each 40th time who seems to hold the lease is killed, wherever it is, else the oldest. Only then
    does the device's clock go on."""
    times, ttl_s, clock_s = 1000, 1e4, 0.0
    place.prepare(str(tmp_path))
    (tmp_path / "log").touch()

    def set_clock() -> None:
        (tmp_path / "clock.part").write_text(str(clock_s))
        (tmp_path / "clock.part").rename(tmp_path / "clock")

    def holder() -> str | None:
        return json.loads((tmp_path / "lease/lease.json").read_text())["holder"]

    def start(n: int) -> tuple[str, subprocess.Popen[bytes]]:
        name = f"controller-{n}"
        return name, subprocess.Popen(
            [sys.executable, "-c", COMPETITOR, str(tmp_path), name, str(n), str(ttl_s)],
            cwd=Path(__file__).parents[3],
        )

    set_clock()
    competitors = [start(n) for n in range(3)]
    started, kills, fell_while_holding = 3, 0, 0
    try:
        while (done := (tmp_path / "log").read_bytes().count(b"\n")) < times:
            assert all(process.poll() is None for _, process in competitors)
            if done < 40 * (kills + 1):
                time.sleep(0.01)
                continue
            kills += 1
            names = [name for name, _ in competitors]
            name, process = competitors.pop(names.index(who) if (who := holder()) in names else 0)
            process.kill()
            process.wait()
            # Its lease, if it had it, expires, and so does its ticket; nobody else's lease is as old as that. The lock
            # keeps the others from taking the lease at the old time between the look and the jump: a holder that
            # is killed amid its release leaves a lease that is void at once.
            with lease.locked(str(tmp_path)):
                held = holder() == name
                fell_while_holding += held
                clock_s += ttl_s + 1 if held else lease.TICKET_TTL_S + 1
                set_clock()
            competitors.append(start(started))
            started += 1
    finally:
        for _, process in competitors:
            process.kill()
            process.wait()
    tokens = (tmp_path / "log").read_text().split()
    assert "both" not in tokens
    assert [int(token) for token in tokens] == sorted({int(token) for token in tokens})
    assert kills >= 20
    assert fell_while_holding > 0
