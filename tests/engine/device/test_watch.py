"""Watching a device: on a board on paper and by a clock of the test's own, and as the supervisor's child."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.codec import from_json, to_json
from engine.device.sensors import Sensors
from engine.device.watch import MOST_OF_A_CORE, MOST_POINTS, PERIOD_S, Watcher, watch
from engine.protocol import MOST_SERIES_POINTS, Course, Settle, Watched, decode_event
from tests.engine.boards.boards import Board

TEMPERATURE = "/sys/class/thermal/thermal_zone0/temp"


class Scene:
    """A board whose state follows a script: at each pause the next step is done, and the clock goes on."""

    def __init__(self, board: Board, *steps: Callable[[], object], until_s: float | None = None) -> None:
        self.board = board
        self.now = self.cpu = 0.0
        self.reading_costs_s = 0.0
        self.said: list[tuple[float, list[str]]] = []
        self.ready_at: float | None = None
        self.resident: list[int | None] = []  # what the engine takes, one reading after another
        self._steps = list(steps)
        self._until_s = until_s

    def pause(self, seconds: float) -> bool:
        self.now += seconds
        self.cpu += self.reading_costs_s
        if self._steps:
            self._steps.pop(0)()
            return False
        return self._until_s is None or self.now >= self._until_s

    def watch(self, settle: Settle | None = None) -> Watched:
        def ready() -> None:
            self.ready_at = self.now

        def cpu_clock() -> float:
            self.cpu += self.reading_costs_s
            return self.cpu

        return watch(
            settle or Settle(), Sensors(self.board.sources()), pause=self.pause, ready=ready, clock=lambda: self.now,
            say=lambda waited_s, reasons: self.said.append((waited_s, reasons)), cpu_clock=cpu_clock,
            resident_bytes=lambda: self.resident.pop(0) if self.resident else None,
        )  # fmt: skip


@pytest.fixture
def pi(tmp_path: Path) -> Board:
    return Board("pi4", tmp_path)


def heat(board: Board, celsius: float) -> Callable[[], None]:
    return lambda: board.write(TEMPERATURE, f"{celsius * 1000:.0f}\n")


def throttle(board: Board, word: int) -> Callable[[], None]:
    def say() -> None:
        board.commands["vcgencmd get_throttled"] = f"throttled=0x{word:x}\n"

    return say


def test_before_after_and_the_extremes_between_are_kept(pi) -> None:
    seen = Scene(pi, heat(pi, 60), heat(pi, 40), heat(pi, 50)).watch()
    assert seen.temperature_c == Course(before=48.199, after=50.0, lowest=40.0, highest=60.0)
    assert seen.readings == 5  # before, three meanwhile, after
    assert seen.period_s == PERIOD_S
    assert seen.watched_s == 4 * PERIOD_S
    assert (seen.governor, seen.governor_after, seen.load.before) == ("ondemand", "ondemand", 0.08)


def test_memory_over_time_is_thinned_out_and_keeps_its_peaks(pi) -> None:
    scene = Scene(pi, *[lambda: None] * 500)
    assert scene.watch().resident is None  # no engine
    scene = Scene(pi, *[lambda: None] * 500)
    scene.resident = [None, *range(498), None]
    scene.resident[301] = 999
    series = scene.watch().resident
    assert series is not None
    assert 100 <= len(series.values) == len(set(series.time_s)) <= MOST_POINTS == MOST_SERIES_POINTS
    assert list(series.time_s) == sorted(series.time_s)
    assert series.time_s[series.values.index(999)] == 302 * PERIOD_S
    assert series.values[0] == 3 and series.values[-1] == 497  # the largest of each four


def test_what_a_device_has_no_sensor_for_is_absent_and_not_unknown(pi, tmp_path: Path) -> None:
    seen = Scene(pi).watch()
    assert set(seen.absent) == {"memory pressure", "battery", "energy"}
    assert seen.unknown == ()
    phone = Scene(Board("phone", tmp_path / "phone")).watch()
    assert set(phone.absent) == {"temperature", "throttled", "load", "memory pressure", "energy"}


def test_a_sensor_that_is_lost_meanwhile_is_unknown(tmp_path: Path) -> None:
    laptop = Board("laptop", tmp_path)
    seen = Scene(laptop, (tmp_path / "sys/class/thermal/thermal_zone1/temp").unlink).watch()
    assert seen.temperature_c.after is None
    assert [text.split(":")[0] for text in seen.unknown] == ["temperature"]
    assert "temperature" not in seen.absent


@pytest.mark.parametrize(
    ("words", "throttled", "under_voltage", "causes"),
    [
        ([0x0, 0x0], False, False, ()),
        ([0x50000, 0x50000], False, False, ()),  # long ago
        ([0x0, 0x40000], True, False, ("throttled",)),  # between two looks
        ([0x50000, 0x50005, 0x50000], True, True, ("under-voltage", "throttled")),
        ([0x0, 0x80008, 0x80000], True, False, ("soft temperature limit",)),
        ([0x40000, 0x50000], True, True, ("under-voltage",)),
    ],
)
def test_a_sticky_bit_counts_where_it_is_new(pi, words, throttled, under_voltage, causes) -> None:
    first, *rest = (throttle(pi, word) for word in words)
    first()
    seen = Scene(pi, *rest).watch()
    assert (seen.throttled, seen.under_voltage, seen.throttle_causes) == (throttled, under_voltage, causes)


def test_counters_of_throttling_count_where_they_rose(tmp_path: Path) -> None:
    laptop = Board("laptop", tmp_path)
    count = "/sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count"
    assert Scene(laptop).watch().throttled is False
    seen = Scene(laptop, lambda: laptop.write(count, "6\n")).watch()
    assert (seen.throttled, seen.throttle_causes) == (True, ("core_throttle_count",))
    assert seen.under_voltage is None


def test_energy_is_power_over_time(tmp_path: Path) -> None:
    jetson = Board("orin", tmp_path)
    amperes = "/sys/class/hwmon/hwmon1/curr1_input"
    jetson.write(amperes, "1000\n")
    seen = Scene(jetson, lambda: None, lambda: jetson.write(amperes, "3000\n")).watch()
    # 5.024 W for half a second, from there to 15.072 W in another, and that for a third.
    assert seen.energy_j == pytest.approx(0.5 * (5.024 + 10.048 + 15.072))
    assert (seen.energy_sensor, seen.power_w.highest) == ("ina VDD_IN", pytest.approx(15.072))


def test_watching_that_is_dear_is_done_less_often(pi) -> None:
    scene = Scene(pi, until_s=100.0)
    scene.reading_costs_s = 0.02
    seen = scene.watch()
    assert seen.period_s == pytest.approx(0.02 / MOST_OF_A_CORE)
    assert seen.readings < 100 / seen.period_s + 3
    assert seen.cpu_s > 0


# --- settling -------------------------------------------------------------------------------------------------------


def test_a_device_that_is_as_it_should_be_is_not_waited_for(pi) -> None:
    scene = Scene(pi)
    seen = scene.watch(Settle(max_wait_s=60, temperature_c=50, max_load=0.5, max_memory_pressure=0.1))
    assert (scene.ready_at, scene.said, seen.waited_s, seen.unsettled) == (0.0, [], 0.0, ())


def test_a_hot_device_is_waited_for_and_says_so(pi) -> None:
    heat(pi, 70)()
    scene = Scene(pi, heat(pi, 65), heat(pi, 60), heat(pi, 52), heat(pi, 49.9))
    seen = scene.watch(Settle(max_wait_s=60, temperature_c=50))
    assert (scene.ready_at, seen.waited_s, seen.unsettled) == (4.0, 4.0, ())
    assert [waited_s for waited_s, _ in scene.said] == [0.0, 2.0]
    assert scene.said[0][1] == ["the processor is at 70.0 °C, over 50.0 °C"]
    assert seen.temperature_c.before == 49.9


def test_the_wait_has_an_end(pi) -> None:
    heat(pi, 70)()
    scene = Scene(pi, *[lambda: None] * 4)
    seen = scene.watch(Settle(max_wait_s=2.5, temperature_c=50))
    assert seen.waited_s == 2.5
    assert seen.unsettled == ("the processor is at 70.0 °C, over 50.0 °C",)


def test_nobody_waits_for_what_will_not_come(pi) -> None:
    scene = Scene(pi)
    seen = scene.watch(Settle(max_wait_s=60, governor="performance"))
    assert (scene.ready_at, seen.unsettled) == (0.0, ("the governor is ondemand, not performance",))
    (pi.root / "proc/loadavg").unlink()
    seen = Scene(pi).watch(Settle(max_wait_s=60, max_load=0.5))
    assert "does not tell how many tasks" in seen.unsettled[0]


def test_other_tasks_are_waited_for(pi) -> None:
    """Their number now, not the mean of the last minute, in which the run before still is."""
    pi.write("/proc/loadavg", "0.90 0.80 0.60 3/1200 99121\n")
    idle = lambda: pi.write("/proc/loadavg", "0.90 0.80 0.60 1/1200 99121\n")  # noqa: E731
    scene = Scene(pi, *[lambda: None] * 19, idle)
    seen = scene.watch(Settle(max_wait_s=60, max_load=0.5))
    assert scene.said[0][1] == ["2.0 other tasks want a processor, over 0.5"]
    assert seen.unsettled == ()


def test_memory_pressure_is_that_of_the_last_second(tmp_path: Path) -> None:
    pi5 = Board("pi5", tmp_path)
    pressure = "some avg10={} avg60=0.00 avg300=0.00 total={}\n"
    pi5.write("/proc/pressure/memory", pressure.format("80.00", 5_000_000))
    scene = Scene(pi5, lambda: pi5.write("/proc/pressure/memory", pressure.format("75.00", 5_010_000)))
    seen = scene.watch(Settle(max_wait_s=60, max_memory_pressure=0.2))
    assert scene.said[0][1] == ["tasks wait for memory 80% of the time, over 20%"]
    assert (seen.waited_s, seen.unsettled) == (1.0, ())


def test_a_thermometer_that_gave_the_baseline_and_is_gone_is_unknown(pi) -> None:
    (pi.root / TEMPERATURE.lstrip("/")).unlink()
    pi.commands.pop("vcgencmd measure_temp")
    pi.commands["vcgencmd measure_temp"] = "no temperature"
    seen = Scene(pi).watch(Settle(max_wait_s=1, temperature_c=50))
    assert "baseline is gone" in seen.unknown[0]


# --- as a child -----------------------------------------------------------------------------------------------------


def result_of(path: Path) -> Watched:
    return from_json(Watched, json.loads(path.read_text()))


def test_the_child_watches_until_its_pipe_is_closed(tmp_path: Path) -> None:
    watcher = Watcher(to_json(Settle()), str(tmp_path / "watched.json"))
    assert watcher.wait_until_ready(lambda line: None) is None
    watcher.follow(os.getpid())
    watcher.stop()
    seen = result_of(tmp_path / "watched.json")
    assert seen.readings >= 3
    assert seen.resident is not None and seen.resident.values[-1] > 10 << 20
    assert 0 < seen.cpu_s < 5
    assert seen.memory_available_bytes.before is not None
    with pytest.raises(ChildProcessError):
        os.waitpid(watcher.pid, 0)


def test_the_child_says_what_it_waits_for(tmp_path: Path) -> None:
    lines: list[bytes] = []
    watcher = Watcher(to_json(Settle(max_wait_s=0.01, governor="none such")), str(tmp_path / "watched.json"))
    assert watcher.wait_until_ready(lines.append) is None
    watcher.stop()
    assert result_of(tmp_path / "watched.json").unsettled[0].startswith("the governor is")
    assert lines == []
    watcher = Watcher(to_json(Settle(max_wait_s=1.5, max_load=-1.0)), str(tmp_path / "watched.json"))
    assert watcher.wait_until_ready(lines.append) is None
    watcher.stop()
    assert [decode_event(line.strip())[0] for line in lines] == ["settling"]


def test_a_child_that_fails_says_why_and_one_that_is_ended_stops_the_run(tmp_path: Path) -> None:
    broken = Watcher({"max_wait_s": 1.0}, str(tmp_path / "watched.json"))
    assert "AttributeError" in (broken.wait_until_ready(lambda line: None) or "")
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # what the supervisor does is not for its child
    try:
        ended = Watcher(to_json(Settle(max_wait_s=600, max_load=-1.0)), str(tmp_path / "watched.json"))
        os.kill(ended.pid, signal.SIGTERM)
        with pytest.raises(InterruptedError):
            ended.wait_until_ready(lambda line: None)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_child_that_fails_when_nobody_listens_is_no_second_supervisor(tmp_path: Path) -> None:
    """Such as on a full disk: what goes on after the fork starts an engine."""
    (tmp_path / "run").mkdir()
    script = f"""if True:
        import os, shutil, sys
        from engine.device.watch import Watcher
        try:
            watcher = Watcher({to_json(Settle())!r}, {str(tmp_path / "run/watched.json")!r})
        except OSError:
            pass  # as the supervisor does
        os.write(1, b"started\\n")
        if watcher.wait_until_ready(lambda line: None) is None:
            shutil.rmtree({str(tmp_path / "run")!r})
            watcher.stop()
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "started\n", done.stderr


def test_a_watch_survives_json() -> None:
    seen = replace(Watched(), temperature_c=Course(1.0, 2.0, 1.0, 2.0), throttle_causes=("a",), energy_j=2.5)
    assert from_json(Watched, json.loads(json.dumps(to_json(seen)))) == seen
