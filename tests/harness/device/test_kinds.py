"""The table of transports: another way to reach devices is one description and a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_inventory import Device
from harness.device import kinds
from harness.device.opening import open_lease
from harness.device.trust import trust
from harness.doctor import controller
from harness.errors import UsageError
from harness.findings import Severity
from harness.transport import Reach, TransportKind
from harness.transport.local import LocalTransport

FOLDER = TransportKind(
    open=lambda device, keyring: Reach(lambda: LocalTransport(device.name, Path(str(device.options["folder"])))),
    address=lambda device: str(device.options["folder"]),
    checks={"folder": lambda keyring, devices: iter([(Severity.NOTE, f"{len(devices)} folders", "none")])},
    options={"folder": str, "depth": int},
    required=("folder",),
)


@pytest.fixture
def _folder_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.TRANSPORTS, "folder", FOLDER)


def local(**options: str | int) -> Device:
    return Device("box", transport="folder", options=options)


@pytest.mark.usefixtures("_folder_kind")
def test_a_new_row_is_all_that_a_device_needs_to_be_reached(tmp_path: Path) -> None:
    device = local(folder=str(tmp_path / "box"))
    with open_lease(device, known_hosts=tmp_path / "known_hosts") as lease:
        assert lease.look().state == "free"
    assert kinds.kind_of(device).address(device) == str(tmp_path / "box")
    with pytest.raises(UsageError, match="transport 'folder' has no host key: there is nothing to trust"):
        trust(device, tmp_path / "known_hosts", lambda key: True)
    here = controller.Controller(tmp_path / "known_hosts", str(tmp_path / "farm.db"), tmp_path, (device,))
    told = {finding.check for finding in controller.examine(here)}
    assert "folder" in told, "its own checks"
    assert "known-hosts" not in told, "which are SSH's"


@pytest.mark.usefixtures("_folder_kind")
@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        (local(), "box: transport 'folder' needs the option 'folder': write it under .devices.box.folder."),
        (local(folder="x", dept=1), "box: transport 'folder' has no option 'dept', did you mean 'depth'?"),
        (local(folder=1), "box: option 'folder' of transport 'folder' must be of type str"),
        (local(folder="x", depth=True), "option 'depth' of transport 'folder' must be of type int"),
        (Device("box", transport="folders"), "box: unknown transport 'folders', did you mean 'folder'?"),
        (Device("box", "h", options={"serial": "x"}), "box: transport 'ssh' has no option 'serial' .known: none."),
    ],
)
def test_what_a_transport_does_not_know_is_named(device: Device, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        kinds.kind_of(device)
