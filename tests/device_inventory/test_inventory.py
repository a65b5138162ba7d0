from __future__ import annotations

from pathlib import Path

import pytest

import device_inventory
from device_inventory import Device, Inventory, InventoryError

EXAMPLE = Path(device_inventory.__file__).parent / "example.toml"


def load(tmp_path, text, version="version = 1\n"):
    path = tmp_path / "farm.toml"
    path.write_text(version + text)
    return Inventory.load(path)


def test_the_example_shows_every_kind_of_device() -> None:
    devices = Inventory.load(EXAMPLE).devices
    assert devices["phone"].port == 8022
    assert devices["remote-pi"].proxy_jump == "farm@gateway.example.org:2222"
    assert devices["pi4-storage"].emulated_read_bytes_per_s == 43e6
    assert devices["jetson-orin"].root == "/mnt/ssd/edgemoe-farm"
    assert devices["lab-pi4"] == Device("lab-pi4", "lab-pi", identity_file="~/.ssh/id_ed25519")


def test_a_device_overrides_the_defaults(tmp_path) -> None:
    devices = load(
        tmp_path,
        '[defaults]\nuser = "pi"\ntags = ["x"]\n[devices.a]\nhost = "a"\n[devices.b]\nhost = "b"\nuser = "me"\n',
    ).devices
    assert (devices["a"].user, devices["b"].user) == ("pi", "me")
    assert devices["a"].tags == ("x",)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "device 'pi': key 'host' is missing"),
        ('host = "a"\nprt = 22', "unknown key 'prt', did you mean 'port'?.*known: host, port"),
        ('host = "a"\nport = "22"', "device 'pi': key 'port' must be a whole number, not '22'"),
        ('host = "a"\nport = true', "key 'port' must be a whole number"),
        ('host = "a"\nport = 70000', "device 'pi': key 'port' must be between"),
        ('host = "a b"', "key 'host'"),
        ('host = "-oProxyCommand=x"', "key 'host'"),
        ('host = "a"\nuser = ""', "key 'user'"),
        ('host = "a"\nroot = ""', "key 'root' must be a folder"),
        ('host = "a"\nroot = "/"', "key 'root' must be a folder"),
        ('host = "a"\nroot = ".."', "key 'root' must be a folder"),
        ('host = "a"\nroot = "~/farm"', "key 'root' must be a folder"),
        ('host = "a"\nroot = "a\\nb"', "key 'root' must be a folder"),
        ('host = "a"\nproxy_jump = "a,,b"', "key 'proxy_jump'"),
        ('host = "a"\ntags = "x"', "key 'tags' must be a list"),
        ('host = "a"\ntags = [1]', "key 'tags' must be a list of texts"),
        ('host = "a"\nmemory_limit = "much"', "key 'memory_limit' must be a size such as"),
        ('host = "a"\nmemory_limit = 5', "key 'memory_limit' must be a text"),
        ('host = "a"\nemulated_read_bytes_per_s = 1', "key 'emulated_read_bytes_per_s' must be between"),
        ('host = "a"\nbootstrap = 1', "key 'bootstrap' must be true or false"),
        ('host = "a"\nport = true', "key 'port' must be a whole number"),
        ('host = "a"\nidle_s = 3', "key 'idle_s' must be between 10 and 600 seconds"),
        ('host = "a"\nemulated_read_bytes_per_s = nan', "key 'emulated_read_bytes_per_s' must be between"),
    ],
)
def test_mistakes_name_file_device_and_key(tmp_path, table, message) -> None:
    with pytest.raises(InventoryError, match=message) as raised:
        load(tmp_path, f"[devices.pi]\n{table}\n")
    assert "farm.toml" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ['"../x"', '"a b"', '""', '"-x"', '".x"', '"a;b"', '"é"'])
def test_unsafe_device_names_are_refused(tmp_path, name) -> None:
    with pytest.raises(InventoryError, match="key 'name' may hold letters"):
        load(tmp_path, f'[devices.{name}]\nhost = "a"\n')


@pytest.mark.parametrize(
    ("version", "text", "message"),
    [
        ("", '[devices.pi]\nhost = "a"\n', r"version None is not known: write `version = 1`"),
        ("version = 2\n", '[devices.pi]\nhost = "a"\n', "version 2 is not known"),
        ("version = 1\n", "", "no device is declared"),
        ("version = 1\n", "devices = 3\n", "devices must be a table"),
        ("version = 1\n", "[devices]\npi = 3\n", "device 'pi' must be a table"),
        ("version = 1\n", '[device.pi]\nhost = "a"\n', "unknown key 'device', did you mean 'devices'"),
        ("version = 1\n", '[defaults]\nhost = "a"\n', "defaults: unknown key 'host'"),
        ("version = 1\n", "[devices\n", "is not TOML"),
    ],
)
def test_documents_that_are_no_inventory(tmp_path, version, text, message) -> None:
    with pytest.raises(InventoryError, match=message):
        load(tmp_path, text, version)


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(InventoryError, match=r"none\.toml is not there: copy"):
        Inventory.load(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InventoryError, match=r"latin\.toml cannot be read"):
        Inventory.load(tmp_path / "latin.toml")


def test_an_unknown_device_suggests_the_nearest(tmp_path) -> None:
    inventory = load(tmp_path, '[devices.kitchen-pi]\nhost = "a"\n')
    assert inventory["kitchen-pi"].host == "a"
    with pytest.raises(InventoryError, match=r"no device is called 'kitchen', did you mean 'kitchen-pi'\?"):
        inventory["kitchen"]


def test_another_transport_has_options_of_its_own(tmp_path) -> None:
    text = '[defaults]\nuser = "pi"\n[devices.phone]\ntransport = "adb"\nadb.serial = "R58"\nadb.port = 5037\n'
    phone = load(tmp_path, text)["phone"]
    assert (phone.transport, phone.options, phone.host) == ("adb", {"serial": "R58", "port": 5037}, "")
    assert isinstance(hash(phone), int)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('transport = "adb"\nadb = 3', "key 'adb' must be a table"),
        ('transport = "adb"\nadb.serial = [1]', "key 'adb' must be a table of texts"),
        ('transport = "adb"\nusb.serial = "x"', "unknown key 'usb'"),
        ("transport = 3", "key 'transport' must be a text"),
        ('transport = "a b"', "key 'transport' must be the name"),
        ('transport = "scripted"', "key 'scripted' and transport"),
        ('transport = "adb"\nscripted = "x"', "key 'scripted' and transport"),
    ],
)
def test_mistakes_in_a_transport_are_named(tmp_path, table, message) -> None:
    with pytest.raises(InventoryError, match=f"device 'pi': .*{message}"):
        load(tmp_path, f"[devices.pi]\n{table}\n")
