"""Reads a device's sensors, each from the source that its kind of device has. Standard library only.

Raspberry Pi: the firmware's throttle word (sysfs or `vcgencmd get_throttled`) and, on a Pi 5, `vcgencmd pmic_read_adc`.
Jetson: INA power monitors in hwmon, over-current counters, `tegrastats` where those are not to be read. Android:
`termux-battery-status`. Any Linux: thermal zones, hwmon, cpufreq, power supplies, pressure stall information.
"""

from __future__ import annotations

import json
import os
import re
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple, TypeVar

from engine.device.sources import SilentError, Sources

T = TypeVar("T")

THERMAL, HWMON, CPUS, SUPPLIES = (
    "/sys/class/thermal", "/sys/class/hwmon", "/sys/devices/system/cpu", "/sys/class/power_supply",
)  # fmt: skip
FIRMWARE_THROTTLED = "/sys/devices/platform/soc/soc:firmware/get_throttled"
# Bits of the firmware's throttle word: now, and since it started. The latter stay set until the next start.
THROTTLE_BITS = (
    (0, 16, "under-voltage"), (1, 17, "frequency capped"), (2, 18, "throttled"), (3, 19, "soft temperature limit"),
)  # fmt: skip
UNDER_VOLTAGE = "under-voltage"
_CPU_ZONE = re.compile(
    r"cpu|soc[-_\d]|pkg|^tj|bcm2835|^(big|mid|little)", re.IGNORECASE
)  # `soc` alone is a battery's charge
_CPU_HWMON = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
_COOLING_BY_SLOWING = re.compile(r"^(thermal-)?cpufreq|^Processor$")
_POWER_MONITOR = re.compile(r"^ina\d")
_WHOLE_BOARD = ("VDD_IN", "POM_5V_IN", "VIN")  # rails through which all others are fed
_MAY_ASK_FIRMWARE = "add the user to the group `video`"
_TEGRASTATS_DEADLINE_S = 1.0


def board(sources: Sources) -> Optional[str]:
    """Returns the kind of board whose own sources exist: raspberry-pi, jetson, android; None for any other Linux."""
    if "com.termux" in sources.environment.get("PREFIX", "") or sources.real("/system/bin/app_process64") is not None:
        return "android"
    if "Raspberry Pi" in (sources.text("/proc/device-tree/model") or ""):
        return "raspberry-pi"
    if "nvidia,tegra" in (sources.text("/proc/device-tree/compatible") or "") or sources.text("/etc/nv_tegra_release"):
        return "jetson"
    return None


class Reading(NamedTuple):
    """What a device's sensors say at one moment. None where it has no such sensor, or where `unknown` names it.

    No dataclass, whose making takes longer than a reading: see DECISIONS.md, 42.
    """

    temperature_c: Optional[float]  # of the processor: the hottest of its zones
    frequency_hz: Optional[float]  # of the fastest core now
    governor: Optional[str]
    throttled: Optional[bool]  # now
    under_voltage: Optional[bool]  # now
    throttle_causes: Tuple[str, ...]  # now, in words
    throttle_events: Dict[str, int]  # since it started; what only tells whether counts 1
    load: Optional[float]  # mean number of tasks that wanted a processor, over the last minute
    memory_pressure: Optional[float]  # share of the last ten seconds in which a task waited for memory
    memory_available_bytes: Optional[int]
    power: Optional[str]  # mains or battery
    battery: Optional[float]  # share of its charge
    power_w: Optional[float]  # that the board draws, by `power_sensor`
    power_sensor: Optional[str]
    unknown: Tuple[str, ...]  # "temperature: why": sensors that are there, or should be, and did not answer


def _answered(ask: Callable[[str], Optional[T]], paths: Iterable[str]) -> Tuple[List[T], Optional[SilentError]]:
    """Returns what the parts of one kind answered, and a failure of one, if any failed.

    A part that is switched off fails, as a core does that a power mode leaves out. The others' answers count.
    """
    found: List[T] = []
    failure: Optional[SilentError] = None
    for path in paths:
        try:
            value = ask(path)
        except SilentError as error:
            failure = error
            continue
        if value is not None:
            found.append(value)
    return found, failure


class Sensors:
    """Reads the sensors of one device."""

    def __init__(self, sources: Optional[Sources] = None) -> None:
        self._sources = sources or Sources()
        self._board = board(self._sources)
        self._unknown: List[str] = []
        self._zones = self._cpu_zones()
        self._monitors = self._power_monitors()

    def read(self, *, slow: bool = True) -> Reading:
        """Reads all sensors. With `slow` also those that take a second or start an app, and change slowly."""
        self._unknown = []
        causes, events = self._ask("throttled", self._throttling) or ((), None)
        power, battery, battery_w = self._ask("battery", lambda: self._supplies(slow)) or (None, None, None)
        tegra = self._tegrastats() if slow and self._board == "jetson" and not self._monitors else {}
        drawn = self._ask("energy", lambda: self._power(battery_w, tegra)) or (None, None)
        return Reading(
            temperature_c=self._ask("temperature", lambda: self._temperature(tegra)),
            frequency_hz=self._ask("frequency", self._frequency),
            governor=self._ask("governor", self._governor),
            throttled=None if events is None else bool(causes),
            under_voltage=UNDER_VOLTAGE in causes if UNDER_VOLTAGE in (events or {}) else None,
            throttle_causes=tuple(causes),
            throttle_events=events or {},
            load=self._load(),
            memory_pressure=self._ask("memory pressure", self._memory_pressure),
            memory_available_bytes=kilobytes(self._sources.text("/proc/meminfo"), "MemAvailable"),
            power=power,
            battery=battery,
            power_w=drawn[0],
            power_sensor=drawn[1],
            unknown=tuple(self._unknown),
        )

    def waiting_tasks(self) -> Optional[int]:
        """Returns how many other tasks want a processor now; None if the system does not say."""
        match = re.match(r"(?:\S+ ){3}(\d+)/", self._sources.text("/proc/loadavg") or "")
        return max(0, int(match.group(1)) - 1) if match else None

    def stalled_s(self) -> Optional[float]:
        """Returns how long tasks have waited for memory since the device started."""
        match = re.search(r"^some .*total=(\d+)", self._sources.text("/proc/pressure/memory") or "", re.MULTILINE)
        return int(match.group(1)) / 1e6 if match else None

    def _ask(self, name: str, source: Callable[[], Optional[T]]) -> Optional[T]:
        try:
            return source()
        except SilentError as error:
            self._unknown.append(f"{name}: {error}")
            return None

    # --- temperature, frequency, governor, load -----------------------------------------------------------------------

    def _cpu_zones(self) -> List[str]:
        """Returns the files with the processor's temperature: its thermal zones, else its hwmon, else any zone."""
        s = self._sources
        zones = [f"{THERMAL}/{name}" for name in s.names(THERMAL) if name.startswith("thermal_zone")]
        kinds = {zone: s.text(f"{zone}/type") or "" for zone in zones}
        chosen = [f"{zone}/temp" for zone in zones if _CPU_ZONE.search(kinds[zone])]
        for name in s.names(HWMON) if not chosen else ():
            if s.text(f"{HWMON}/{name}/name") in _CPU_HWMON:
                inputs = [n for n in s.names(f"{HWMON}/{name}") if re.match(r"temp\d+_input$", n)]
                chosen += [f"{HWMON}/{name}/{n}" for n in inputs]
        return chosen or [f"{zone}/temp" for zone in zones if not re.search("batt|soc", kinds[zone], re.IGNORECASE)]

    def _temperature(self, tegra: Dict[str, float]) -> Optional[float]:
        zones, failure = _answered(self._sources.number, self._zones)
        found = [value / 1000 if abs(value) >= 1000 else value for value in zones]
        sensible = [celsius for celsius in found if -40 < celsius < 150]
        if sensible:
            return max(sensible)
        if "temperature_c" in tegra:
            return tegra["temperature_c"]
        if self._board == "raspberry-pi":
            match = re.search(r"temp=([\d.]+)", self._vcgencmd("measure_temp") or "")
            if match:
                return float(match.group(1))
        if failure is not None:
            raise failure
        return None

    def _policies(self) -> List[str]:
        return [f"{CPUS}/cpufreq/{n}" for n in self._sources.names(f"{CPUS}/cpufreq") if n.startswith("policy")]

    def _frequency(self) -> Optional[float]:
        found, failure = _answered(self._sources.number, [f"{p}/scaling_cur_freq" for p in self._policies()])
        if failure is not None and not found:
            raise failure
        hertz = [kilohertz * 1e3 for kilohertz in found]
        told = re.findall(r"^cpu MHz\s*: ([\d.]+)", self._sources.text("/proc/cpuinfo") or "", re.MULTILINE)
        return max(hertz or [float(megahertz) * 1e6 for megahertz in told], default=None)

    def _governor(self) -> Optional[str]:
        found, failure = _answered(self._sources.sensor, [f"{p}/scaling_governor" for p in self._policies()])
        if failure is not None and not found:
            raise failure
        return ", ".join(dict.fromkeys(name.strip() for name in found if name)) or None

    def _load(self) -> Optional[float]:
        match = re.match(r"([\d.]+) ", self._sources.text("/proc/loadavg") or "")
        if match:
            return float(match.group(1))
        try:
            return os.getloadavg()[0] if self._sources.root == "/" else None  # Android hides the file, not the call
        except OSError:
            return None

    def _memory_pressure(self) -> Optional[float]:
        match = re.search(r"^some avg10=([\d.]+)", self._sources.sensor("/proc/pressure/memory") or "", re.MULTILINE)
        return float(match.group(1)) / 100 if match else None

    # --- throttling ---------------------------------------------------------------------------------------------------

    def _throttling(self) -> Optional[Tuple[List[str], Dict[str, int]]]:
        """Returns what slows the device now, and how often each cause has since it started; None if nothing tells."""
        causes: List[str] = []
        events: Dict[str, int] = {}
        s = self._sources
        if self._board == "raspberry-pi":
            word = self._throttle_word()
            causes = [name for now, _, name in THROTTLE_BITS if word >> now & 1]
            events = {name: word >> since & 1 for _, since, name in THROTTLE_BITS}
        for name in s.names(THERMAL):
            kind = (s.text(f"{THERMAL}/{name}/type") or "") if name.startswith("cooling_device") else ""
            if _COOLING_BY_SLOWING.search(kind):
                state = s.number(f"{THERMAL}/{name}/cur_state") or 0
                causes += [f"slowed by {kind}"] if state > 0 else []
                events.setdefault("slowed", 0)
        cores = [name for name in s.names(CPUS) if re.match(r"cpu\d", name)]
        for counter in ("core_throttle_count", "package_throttle_count"):
            counts, failure = _answered(s.number, [f"{CPUS}/{name}/thermal_throttle/{counter}" for name in cores])
            if failure is not None and not counts:
                raise failure
            if counts:
                events[counter] = int(sum(counts))
        for name in s.names(HWMON) if self._board == "jetson" else ():
            for counter in s.names(f"{HWMON}/{name}"):
                if re.match(r"oc\d+_event_cnt$", counter):
                    events[counter] = int(s.number(f"{HWMON}/{name}/{counter}") or 0)
        return (causes, events) if events else None

    def _throttle_word(self) -> int:
        """Reads the throttle word of a Raspberry Pi's firmware. If it cannot be read, an answer is missing."""
        text = self._sources.text(FIRMWARE_THROTTLED)
        if text is None:
            text = self._vcgencmd("get_throttled")
        if text is None:
            raise SilentError(f"vcgencmd is not there: install it, and {_MAY_ASK_FIRMWARE}")
        match = re.match(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})\s*$", text)
        if match is None:
            raise SilentError(f"{text!r:.40} is no throttle word")
        return int(match.group(1), 16)

    def _vcgencmd(self, what: str) -> Optional[str]:
        try:
            return self._sources.command("vcgencmd", what)
        except SilentError as error:
            raise SilentError(f"{error}: {_MAY_ASK_FIRMWARE}") from None

    # --- power --------------------------------------------------------------------------------------------------------

    def _supplies(self, slow: bool) -> Optional[Tuple[Optional[str], Optional[float], Optional[float]]]:
        """Returns mains or battery, the battery's charge, and the watts it gives while it discharges."""
        s = self._sources
        online = False
        for name in s.names(SUPPLIES):
            folder = f"{SUPPLIES}/{name}"
            if s.text(f"{folder}/type") != "Battery":
                online = online or s.text(f"{folder}/online") == "1"
            elif s.text(f"{folder}/scope") != "Device" and s.text(f"{folder}/capacity") is not None:
                charge = (s.number(f"{folder}/capacity") or 0) / 100
                if s.text(f"{folder}/status") != "Discharging":
                    return "mains", charge, None
                microvolts, microamperes = (s.number(f"{folder}/{n}_now") for n in ("voltage", "current"))
                if microvolts is None or microamperes is None:
                    return "battery", charge, None
                return "battery", charge, abs(microvolts * microamperes) / 1e12
        if slow and self._board == "android":
            return self._termux_battery()
        return ("mains", None, None) if online else None

    def _termux_battery(self) -> Optional[Tuple[Optional[str], Optional[float], Optional[float]]]:
        try:
            answer = self._sources.command("termux-battery-status")
        except SilentError as error:
            raise SilentError(f"{error}: install the Termux:API app, or remove the package termux-api") from None
        if answer is None:
            return None
        try:
            told = json.loads(answer)
            plugged, charge = str(told["plugged"]), float(told["percentage"]) / 100
        except (ValueError, TypeError, KeyError, RecursionError):
            raise SilentError(f"termux-battery-status gave no sensible answer: {answer!r:.60}") from None
        return ("battery" if plugged == "UNPLUGGED" else "mains"), charge, None

    def _power_monitors(self) -> List[Tuple[str, str, str]]:
        """Returns (rail, folder, channel) of INA monitors: the rail that feeds all others, else all rails."""
        s = self._sources
        found = []
        for name in s.names(HWMON):
            folder = f"{HWMON}/{name}"
            chip = s.text(f"{folder}/name") or ""
            files = s.names(folder) if _POWER_MONITOR.search(chip) else []
            for channel in sorted({n[4:-6] for n in files if re.match(r"curr\d+_input$", n)}):
                rail = s.text(f"{folder}/in{channel}_label") or chip
                if rail != "NC":  # not connected
                    found.append((rail, folder, channel))
        whole = [monitor for monitor in found if monitor[0] in _WHOLE_BOARD]
        return whole[:1] or found

    def _power(self, battery_w: Optional[float], tegra: Dict[str, float]) -> Optional[Tuple[float, str]]:
        """Returns the watts that the board draws, and the sensor."""
        s = self._sources
        if self._monitors:
            watts = 0.0
            for _, folder, channel in self._monitors:
                microwatts = s.number(f"{folder}/power{channel}_input")
                if microwatts is None:
                    millivolts, milliamperes = (s.number(f"{folder}/{n}{channel}_input") for n in ("in", "curr"))
                    if millivolts is None or milliamperes is None:
                        return None
                    microwatts = millivolts * milliamperes
                watts += microwatts / 1e6
            return watts, "ina " + " + ".join(rail for rail, _, _ in self._monitors)
        if "power_w" in tegra:
            return tegra["power_w"], "tegrastats"
        if self._has_pmic():
            return self._pmic()
        return None if battery_w is None else (battery_w, "battery")

    def _has_pmic(self) -> bool:
        model = self._sources.text("/proc/device-tree/model") or ""
        return re.search(r"Raspberry Pi (5|500|Compute Module 5)\b", model) is not None

    def _pmic(self) -> Optional[Tuple[float, str]]:
        """Returns the sum over the rails of a Pi 5's power chip. Its 5 V devices are not included."""
        answer = self._vcgencmd("pmic_read_adc")
        if answer is None:
            return None
        amperes, volts = (
            {name: float(value) for name, value in re.findall(pattern, answer)}
            for pattern in (r"(\w+)_A current\(\d+\)=([\d.]+)A", r"(\w+)_V volt\(\d+\)=([\d.]+)V")
        )
        rails = amperes.keys() & volts.keys()
        if not rails:
            raise SilentError(f"vcgencmd pmic_read_adc gave no rails: {answer!r:.60}")
        return sum(amperes[rail] * volts[rail] for rail in sorted(rails)), "pmic_read_adc"

    def _tegrastats(self) -> Dict[str, float]:
        """Returns temperature and power from tegrastats, for use when the files cannot be read."""
        try:
            answer = self._sources.command("tegrastats", "--interval", "200", deadline_s=_TEGRASTATS_DEADLINE_S) or ""
        except SilentError:
            return {}
        line = (answer.splitlines() or [""])[-1]
        zones = re.findall(r"(\w+)@(-?[\d.]+)C", line)
        celsius = [float(value) for name, value in zones if name.lower() in ("cpu", "tj")]
        found = {"temperature_c": max(celsius)} if celsius else {}
        watts = {rail: float(milliwatts) / 1e3 for rail, milliwatts in re.findall(r"(\w+) (\d+)mW/", line)}
        whole = next((watts[rail] for rail in _WHOLE_BOARD if rail in watts), None)
        if watts:
            found["power_w"] = sum(watts.values()) if whole is None else whole
        return found


def kilobytes(text: Optional[str], key: str) -> Optional[int]:
    """Returns the bytes of a line of /proc such as `MemTotal:   123 kB`."""
    match = re.search(rf"^{key}:\s+(\d+) kB$", text or "", re.MULTILINE)
    return int(match.group(1)) << 10 if match else None
