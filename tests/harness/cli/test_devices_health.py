"""doctor, devices health, devices prune and run --deadline, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_inventory import Device
from harness.demo.loopback import Emulated, LoopbackFarm
from harness.errors import DeviceBusyError
from reports.results.database import ResultsDatabase
from tests.harness.cli.test_farm import declare, farm, refused
from tests.harness.cli.test_farm import folder as folder


@pytest.fixture
def pi(folder: Path) -> Iterator[Device]:
    with LoopbackFarm(folder / "loopback", [Emulated("pi", 1e9)]) as inventory:
        declare(folder, inventory.devices)
        farm("trust", "pi", "--yes")
        yield inventory["pi"]


def state() -> str:
    return str(json.loads(farm("devices", "--json").stdout)[0]["health"])


def test_health_is_shown_and_set(folder: Path, pi: Device) -> None:
    assert state() == "good"
    assert not (folder / "results").exists(), "a question leaves nothing behind"
    out = farm("devices", "health", "pi", "--maintenance", "--note", "new SD card").stdout
    assert "pi: maintenance" in out
    assert "new SD card" in out
    assert state() == "maintenance"
    assert "new SD card" in farm("devices").stdout
    summary = json.loads(farm("run", "matrix.toml", "--json", code=4).stdout.splitlines()[-1])
    assert summary["skipped"] == 4
    farm("devices", "health", "pi", "--good")
    assert state() == "good"
    summary = json.loads(farm("run", "--resume", "--json").stdout.splitlines()[-1])
    assert summary["ok"] == 4
    answer = json.loads(farm("devices", "health", "pi", "--json").stdout)
    assert (answer["health"], answer["faults"]) == ("good", 0)
    assert "one of --maintenance" in refused("devices", "health", "pi", "--good", "--canary")
    assert "no device is called 'po'" in refused("devices", "health", "po", "--good")


def test_a_canary_that_fails_puts_into_quarantine_and_one_that_holds_brings_back(folder: Path, pi: Device) -> None:
    declare(folder, {"pi": Device(**{**vars(pi), "python": "/opt/none"})})
    assert "/opt/none was not found" in refused("devices", "health", "pi", "--canary", code=4)
    assert state() == "quarantined"
    declare(folder, {"pi": pi})
    assert farm("devices", "health", "pi", "--canary").stdout.strip() == "pi: good"
    with ResultsDatabase.open(folder / "results/farm.db") as database:
        assert database.health("pi").faults == 0


def test_a_canary_on_a_device_that_is_busy_says_nothing_about_it(
    folder: Path, pi: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*arguments: object, **options: object) -> None:
        raise DeviceBusyError("pi: another controller measures there: wait for it")

    monkeypatch.setattr("harness.cli.devices_health.open_session", busy)
    assert "another controller" in refused("devices", "health", "pi", "--canary", code=4)
    assert state() == "good"


def test_the_doctor(folder: Path, pi: Device) -> None:
    answer = json.loads(farm("doctor", "--quick", "--json").stdout)
    assert answer["examined"] == ["controller", "pi"]
    assert answer["errors"] == 0
    with (folder / "devices.toml").open("a") as file:
        file.write('[devices.gone]\nhost = "127.0.0.1"\nport = 1\n')
    done = farm("doctor", "--quick", code=4)
    assert "127.0.0.1 port 1 cannot be reached" in done.stdout
    assert "-> is it on" in done.stdout
    (finding,) = (f for f in json.loads(farm("doctor", "gone", "--json", code=4).stdout)["findings"])
    assert (finding["where"], finding["check"], finding["severity"]) == ("gone", "reachable", "error")


def test_prune(folder: Path, pi: Device) -> None:
    farm("probe", "pi")
    (answer,) = json.loads(farm("devices", "prune", "pi", "--json").stdout)
    assert answer["removed"] == []
    would = farm("devices", "prune", "pi", "--days", "0", "--dry-run").stdout
    assert "would be removed" in would
    assert "engine " in farm("devices", "prune", "pi", "--days", "0").stdout
    (answer,) = json.loads(farm("devices", "prune", "pi", "--days", "0", "--json").stdout)
    assert answer["removed"] == []
    assert "--days" in refused("devices", "prune", "pi", "--days", "-1")


def test_a_run_with_a_deadline_says_how_to_go_on(folder: Path, pi: Device) -> None:
    done = farm("run", "matrix.toml", "--deadline", "0.001s", code=3)
    assert "edgemoe-farm run --resume" in done.stdout
    assert "is no duration" in farm("run", "matrix.toml", "--deadline", "soon", code=2).stderr
    assert json.loads(farm("run", "--resume", "--deadline", "1h", "--json").stdout.splitlines()[-1])["ok"] == 4
