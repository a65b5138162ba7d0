"""What the boards on paper say of themselves and of their state."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.device.facts import device_facts
from engine.device.sensors import FIRMWARE_THROTTLED, Reading, Sensors
from engine.device.sources import SilentError, Sources, run_command
from engine.device.watch import watch
from engine.protocol import CoreKind, Settle
from tests.engine.boards.boards import NAMES, Board

HOMES = {
    "pi4": "/home/pi", "pi5": "/home/pi", "orin": "/mnt/ssd", "phone": "/data/data/com.termux/files/home",
    "laptop": "/home/me",
}  # fmt: skip


@pytest.fixture
def board(tmp_path: Path):
    numbers = itertools.count()
    return lambda name: Board(name, tmp_path / f"{name}-{next(numbers)}")


def facts(board: Board, name: str, **options):
    return device_facts(board.sources(), folder=f"{HOMES[name]}/edgemoe-farm/engines/1/engine", **options)


def read(board: Board, **options) -> Reading:
    return Sensors(board.sources()).read(**options)


@pytest.mark.parametrize(
    ("name", "kind", "model", "cores", "storage"),
    [
        ("pi4", "raspberry-pi", "Raspberry Pi 4 Model B Rev 1.4", [CoreKind(4, "Cortex-A72", 1.8e9)],
         ("sd-card", "SC32G", 128 << 10)),
        ("pi5", "raspberry-pi", "Raspberry Pi 5 Model B Rev 1.0", [CoreKind(4, "Cortex-A76", 2.4e9)],
         ("nvme", "Samsung SSD 980 500GB", 128 << 10)),
        ("orin", "jetson", "NVIDIA Jetson Orin Nano Developer Kit", [CoreKind(6, "Cortex-A78AE", 1.5104e9)],
         ("nvme", "KINGSTON SNV2S500G", 128 << 10)),
        ("phone", "android", "Xiaomi M2102K1G",
         [CoreKind(1, "Cortex-X1", 2.8416e9), CoreKind(3, "Cortex-A78", 2.4192e9), CoreKind(4, "Cortex-A55", 1.8048e9)],
         ("ufs", None, None)),
        ("laptop", None, "ThinkPad T480", [CoreKind(2, "Intel(R) Core(TM) i5-8350U CPU @ 1.70GHz", None)],
         ("sata", "Samsung SSD 860", 128 << 10)),
    ],
)  # fmt: skip
def test_a_board_is_known_by_its_own_sources(board, name, kind, model, cores, storage) -> None:
    found = facts(board(name), name)
    assert (found.board, found.model, list(found.core_kinds)) == (kind, model, cores)
    assert (found.storage, found.storage_model, found.read_ahead_bytes) == storage


def test_facts_of_each_kind(board) -> None:
    pi = facts(board("pi4"), "pi4")
    assert (pi.memory_bytes, pi.swap_bytes) == (3882828 << 10, 102396 << 10)
    assert (pi.os, pi.boot_id) == ("Debian GNU/Linux 12 (bookworm)", "5b0c5e0a-2f0b-4d0e-8a3c-d9d3a4f7c001")
    assert facts(board("orin"), "orin").power_mode == "15W"
    assert facts(board("phone"), "phone").os == "Android 13"
    assert facts(board("phone"), "phone").cpu == "Qualcomm Technologies, Inc SM8350"


@pytest.mark.parametrize(
    ("folder", "storage"),
    [("/home/me", "sata"), ("/srv/nas share/models", "network"), ("/srv/nas", "sata")],
)
def test_the_storage_is_that_of_the_folder(board, folder, storage) -> None:
    assert device_facts(board("laptop").sources(), folder=folder).storage == storage


def test_the_sd_card_of_a_jetson_is_not_its_ssd(board) -> None:
    assert device_facts(board("orin").sources(), folder="/home/nvidia").storage == "sd-card"
    jetson = board("orin")
    jetson.write("/sys/devices/platform/bus@0/3400000.mmc/mmc_host/mmc1/mmc1:0001/type", "MMC\n")
    assert device_facts(jetson.sources(), folder="/home/nvidia").storage == "emmc"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pi4", {"temperature_c": 48.199, "frequency_hz": 1.5e9, "governor": "ondemand", "throttled": False,
                 "under_voltage": False, "load": 0.08, "memory_pressure": None, "power": None, "power_w": None}),
        ("pi5", {"temperature_c": 52.35, "frequency_hz": 2.4e9, "governor": "performance", "throttled": False,
                 "memory_pressure": 0.0, "power_sensor": "pmic_read_adc"}),
        ("orin", {"temperature_c": 49.031, "frequency_hz": 1.5104e9, "governor": "schedutil", "throttled": False,
                  "under_voltage": None, "power_w": pytest.approx(5.024 * 0.984), "power_sensor": "ina VDD_IN"}),
        ("phone", {"temperature_c": None, "frequency_hz": 844.8e6, "throttled": None, "load": None,
                   "power": "battery", "battery": 0.83, "memory_available_bytes": 2965120 << 10}),
        ("laptop", {"temperature_c": 61.0, "frequency_hz": 3.4e9, "governor": "powersave", "throttled": False,
                    "memory_pressure": 0.025, "power": "battery", "battery": 0.64,
                    "power_w": pytest.approx(9.2), "power_sensor": "battery"}),
    ],
)  # fmt: skip
def test_a_reading_of_each_board(board, name, expected) -> None:
    reading = read(board(name))
    assert {key: getattr(reading, key) for key in expected} == expected
    assert reading.unknown == ()


def test_the_rails_of_a_pi_5_are_added_up(board) -> None:
    """3V7_WL_SW, 3V3_SYS, 1V8_SYS ... each its current times its voltage; EXT5V has no current."""
    watts = read(board("pi5")).power_w
    assert watts == pytest.approx(2.5165, abs=1e-3)


@pytest.mark.parametrize("source", [FIRMWARE_THROTTLED, "vcgencmd"])
@pytest.mark.parametrize(
    ("word", "now", "ever"),
    [
        (0x0, [], []),
        (0x50000, [], ["under-voltage", "throttled"]),
        (0x50005, ["under-voltage", "throttled"], ["under-voltage", "throttled"]),
        (0x80008, ["soft temperature limit"], ["soft temperature limit"]),
    ],
)
def test_the_throttle_word_tells_now_from_ever(board, source, word, now, ever) -> None:
    pi = board("pi4")
    if source == "vcgencmd":
        pi.commands["vcgencmd get_throttled"] = f"throttled=0x{word:x}\n"
    else:
        pi.write(source, f"{word:x}\n")
    reading = read(pi)
    assert list(reading.throttle_causes) == now
    assert [name for name, count in reading.throttle_events.items() if count] == ever
    assert (reading.throttled, reading.under_voltage) == (bool(now), "under-voltage" in now)


@pytest.mark.parametrize("answer", [None, "VCHI initialization failed\n"])
def test_a_pi_whose_firmware_is_silent_is_unknown_and_says_what_helps(board, answer) -> None:
    pi = board("pi4")
    pi.commands["vcgencmd get_throttled"] = answer
    reading = read(pi)
    assert reading.throttled is None
    assert [text.split(":")[0] for text in reading.unknown] == ["throttled"]
    if answer is None:
        assert "group `video`" in reading.unknown[0]
    del pi.commands["vcgencmd get_throttled"], pi.commands["vcgencmd measure_temp"]
    assert "vcgencmd is not there" in read(pi).unknown[0]


def test_a_core_that_is_slowed_is_throttled(board) -> None:
    jetson = board("orin")
    jetson.write("/sys/class/thermal/cooling_device1/cur_state", "3\n")
    assert read(jetson).throttle_causes == ("slowed by cpufreq-cpu4",)
    assert read(jetson).throttled is True
    assert read(jetson).throttle_events["oc3_event_cnt"] == 7
    assert read(board("laptop")).throttle_events == {"core_throttle_count": 17, "package_throttle_count": 80}


def test_zones_of_parts_that_are_switched_off_do_not_hide_the_others(board) -> None:
    jetson = board("orin")
    jetson.fail("/sys/class/thermal/thermal_zone8/temp")
    assert read(jetson).temperature_c == 48.5
    for zone in (0, 5):
        jetson.fail(f"/sys/class/thermal/thermal_zone{zone}/temp")
    jetson.commands.clear()
    reading = read(jetson)
    assert reading.temperature_c is None
    assert reading.unknown[0].startswith("temperature: ")


def test_tegrastats_stands_in_for_power_monitors_that_are_not_to_be_read(board) -> None:
    jetson = board("orin")
    for path in (jetson.root / "sys/class/hwmon/hwmon1").iterdir():
        path.unlink()
    assert (read(jetson).power_w, read(jetson).power_sensor) == (4.94, "tegrastats")
    assert read(jetson, slow=False).power_w is None


def test_rails_without_one_that_feeds_them_all_are_added_up(board) -> None:
    jetson = board("orin")
    jetson.write("/sys/class/hwmon/hwmon1/in1_label", "VDD_GPU_SOC\n")
    reading = read(jetson)
    assert reading.power_w == pytest.approx(5.024 * (0.984 + 0.104 + 0.280))
    assert reading.power_sensor == "ina VDD_GPU_SOC + VDD_CPU_GPU_CV + VDD_SOC"


def test_a_battery_that_hangs_is_unknown_and_asked_once(board) -> None:
    phone = board("phone")
    phone.commands["termux-battery-status"] = None
    sensors = Sensors(phone.sources())
    for _ in range(2):
        reading = sensors.read()
        assert reading.power is None
        assert (
            "battery: termux-battery-status did not answer within 3 s: install the Termux:API app" in reading.unknown[0]
        )
    assert phone.asked.count("termux-battery-status") == 1
    del phone.commands["termux-battery-status"]
    assert read(phone).unknown == ()  # there is no such sensor: nothing is unknown


@pytest.mark.parametrize("answer", ["", "{}", "[1]", '{"percentage": "x", "plugged": 1}', "\x1b[31m" * 100])
def test_a_battery_that_talks_nonsense_is_unknown(board, answer) -> None:
    phone = board("phone")
    phone.commands["termux-battery-status"] = answer
    assert "no sensible answer" in read(phone).unknown[0]


def test_fast_readings_start_no_app(board) -> None:
    phone = board("phone")
    assert read(phone, slow=False).battery is None
    assert phone.asked == []


def test_what_a_power_mode_switched_off_does_not_hide_what_runs(board) -> None:
    """The kernel keeps the policy of cores that are off, and reading it fails."""
    orin, all_off = board("orin"), board("pi4")
    for file in ("scaling_cur_freq", "scaling_governor"):
        orin.fail(f"/sys/devices/system/cpu/cpufreq/policy4/{file}")
        all_off.fail(f"/sys/devices/system/cpu/cpufreq/policy0/{file}")
    seen = watch(Settle(), Sensors(orin.sources()), pause=lambda s: True)
    assert (seen.unknown, seen.governor, seen.frequency_hz.before) == ((), "schedutil", 1.5104e9)
    unknown = watch(Settle(), Sensors(all_off.sources()), pause=lambda s: True).unknown
    assert {what.partition(":")[0] for what in unknown} >= {"frequency", "governor"}


def test_the_kernel_is_the_kernel_where_python_tells_of_android(monkeypatch) -> None:
    names = platform.uname()
    told = platform.uname_result("Android", names.node, "14", names.version, names.machine)
    monkeypatch.setattr(platform, "uname", lambda: told)
    assert device_facts().kernel == f"{os.uname().sysname} {os.uname().release}"


@pytest.mark.parametrize("name", NAMES)
def test_a_board_of_which_nothing_can_be_read_has_a_reading_of_nothing(board, name) -> None:
    """Whatever is damaged, nothing is raised and nothing is made up."""
    damaged = board(name)
    for path in [p for p in damaged.root.rglob("*") if p.is_file() and not p.is_symlink()]:
        path.write_bytes(b"\xff\x00 nonsense -> = \n" * 3)
    damaged.commands = dict.fromkeys(damaged.commands, "nonsense")
    reading = read(damaged)
    assert (reading.temperature_c, reading.frequency_hz, reading.power_w, reading.battery) == (None,) * 4
    facts(damaged, name)


def test_the_tasks_that_wait_are_counted_without_the_one_that_asks(board) -> None:
    assert Sensors(board("laptop").sources()).waiting_tasks() == 2
    assert Sensors(board("pi4").sources()).waiting_tasks() == 0
    assert Sensors(board("phone").sources()).waiting_tasks() is None
    assert Sensors(board("laptop").sources()).stalled_s() == pytest.approx(0.0042)


# --- commands -------------------------------------------------------------------------------------------------------


def script(folder: Path, text: str) -> list[str]:
    path = folder / "termux-battery-status"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return [str(path)]


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    hang = script(
        tmp_path,
        "import subprocess, time\np = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid))\ntime.sleep(600)\n",
    )
    with pytest.raises(SilentError, match="did not answer within"):
        run_command(hang, 1.5)
    stat = Path(f"/proc/{child.read_text()}/stat")
    end = time.monotonic() + 10
    while stat.exists() and "Z" not in stat.read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_command_that_never_ends_has_said_something(tmp_path: Path) -> None:
    assert (
        run_command(script(tmp_path, "import time\nprint('VDD_IN', flush=True)\ntime.sleep(600)\n"), 1.5) == "VDD_IN\n"
    )


def test_a_command_that_fails_or_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SilentError, match="status 3"):
        run_command(script(tmp_path, "raise SystemExit(3)"), 10)
    with pytest.raises(FileNotFoundError):
        run_command([str(tmp_path / "none")], 10)
    (tmp_path / "termux-battery-status").write_text("not for any system")
    with pytest.raises(SilentError, match="cannot be run"):
        run_command([str(tmp_path / "termux-battery-status")], 10)


def test_what_is_not_there_is_told_from_what_fails(tmp_path: Path) -> None:
    sources = Sources(str(tmp_path))
    (tmp_path / "folder").mkdir()
    assert sources.sensor("/none") is None
    assert sources.text("/folder") is None
    with pytest.raises(SilentError):
        sources.sensor("/folder")
    (tmp_path / "word").write_text("high\n")
    with pytest.raises(SilentError, match="is no number"):
        sources.number("/word")


def test_this_machine_has_a_reading() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "engine", "watch", "--seconds", "0"], capture_output=True, text=True, check=True
    )
    assert '"readings": 2' in answer.stdout
