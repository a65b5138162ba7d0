"""Watches a device beside an engine's run: it lets it settle, then reads its sensors at most twice a second.

That is done by a process of its own, a child of the engine's supervisor, so that no sensor which hangs and no reading
disturbs what is timed. Its own cost is measured and recorded. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple

from engine.device.sensors import UNDER_VOLTAGE, Reading, Sensors

if TYPE_CHECKING:
    from engine.protocol import Course, Series, Settle, Watched

PERIOD_S = 0.5
MOST_OF_A_CORE = 0.01  # that watching may take: where a reading costs more, it is done less often
SETTLE_PERIOD_S, SAY_PERIOD_S = 1.0, 2.0
LOOKS, LOOK_PERIOD_S = 20, 0.01  # at the tasks that wait, where the first look finds any
READY_GRACE_S = 30.0  # for the first reading, over the longest wait
MOST_POINTS = 200  # of a series: as engine.protocol allows
STOP_DEADLINE_S = 10.0  # for the last reading: every command in it has a deadline of its own

Pause = Callable[[float], bool]  # waits so many seconds, or until told to stop, and says whether it was
Say = Callable[[float, List[str]], None]  # waited so long, for these reasons


def watch(
    settle: Settle,
    sensors: Sensors,
    *,
    pause: Pause,
    say: Say = lambda waited_s, reasons: None,
    ready: Callable[[], None] = lambda: None,
    resident_bytes: Callable[[], Optional[int]] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    cpu_clock: Optional[Callable[[], float]] = None,
) -> Watched:
    """Waits until the device has settled, says `ready`, and reads its sensors until `pause` is told to stop.

    `resident_bytes`: what the engine's process takes now, None while there is none.
    """
    cpu_clock = cpu_clock or _cpu_s
    began, cpu_began = clock(), cpu_clock()
    unsettled = _settle(settle, sensors, pause, say, clock)
    waited_s = clock() - began
    before = sensors.read()
    ready()

    seen, resident, period_s = _Seen(before, clock()), _Series(clock()), PERIOD_S
    while not pause(period_s):
        cost_began = cpu_clock()
        resident.add(clock(), resident_bytes())
        seen.add(sensors.read(slow=False), clock())
        period_s = max(PERIOD_S, (cpu_clock() - cost_began) / MOST_OF_A_CORE)
    seen.add(sensors.read(), clock())
    lost: Tuple[str, ...] = ()
    if settle.temperature_c is not None and before.temperature_c is None and not _names(before, "temperature"):
        lost = ("temperature: the sensor that gave the sweep's baseline is gone",)
    return seen.watched(
        lost, period_s=period_s, cpu_s=cpu_clock() - cpu_began, waited_s=waited_s, unsettled=tuple(unsettled),
        resident=resident.series(),
    )  # fmt: skip


# --- settling -------------------------------------------------------------------------------------------------------


def _settle(settle: Settle, sensors: Sensors, pause: Pause, say: Say, clock: Callable[[], float]) -> List[str]:
    """Waits for the device to settle; returns in words what still does not hold at the end."""
    began = clock()
    said = began - SAY_PERIOD_S
    stalled: Optional[Tuple[float, float]] = None  # when, and for how long until then
    while True:
        reading, now_stalled = sensors.read(slow=False), sensors.stalled_s()
        pressure = reading.memory_pressure
        if stalled is not None and now_stalled is not None:  # fresher than the mean of ten seconds
            pressure = (now_stalled - stalled[1]) / max(1e-3, clock() - stalled[0])
        stalled = None if now_stalled is None else (clock(), now_stalled)
        passing, lasting = _unsettled(settle, reading, pressure, sensors, pause)
        waited_s = clock() - began
        if not passing or waited_s >= settle.max_wait_s:
            return passing + lasting
        if clock() - said >= SAY_PERIOD_S:
            say(waited_s, passing)
            said = clock()
        if pause(min(SETTLE_PERIOD_S, settle.max_wait_s - waited_s)):
            return passing + lasting


def _unsettled(
    settle: Settle, reading: Reading, pressure: Optional[float], sensors: Sensors, pause: Pause
) -> Tuple[List[str], List[str]]:
    """Returns what may pass if one waits, and what will not."""
    passing, lasting = [], []
    celsius = reading.temperature_c
    if settle.temperature_c is not None and celsius is not None and celsius > settle.temperature_c:
        passing.append(f"the processor is at {celsius:.1f} °C, over {settle.temperature_c:.1f} °C")
    if settle.max_memory_pressure is not None and pressure is not None and pressure > settle.max_memory_pressure:
        passing.append(f"tasks wait for memory {pressure:.0%} of the time, over {settle.max_memory_pressure:.0%}")
    if settle.max_load is not None:
        load = _waiting_tasks(sensors, pause)
        if load is None:
            lasting.append("this system does not tell how many tasks wait for a processor")
        elif load > settle.max_load:
            passing.append(f"{load:.1f} other tasks want a processor, over {settle.max_load:g}")
    if settle.governor is not None and reading.governor != settle.governor:
        lasting.append(f"the governor is {reading.governor or 'unknown'}, not {settle.governor}")
    return passing, lasting


def _waiting_tasks(sensors: Sensors, pause: Pause) -> Optional[float]:
    """Returns the waiting tasks, averaged over 0.2 s; the mean of a minute would include the run before."""
    first = sensors.waiting_tasks()
    if not first:
        return first
    looks = [first]
    while len(looks) < LOOKS and not pause(LOOK_PERIOD_S):
        looks.append(sensors.waiting_tasks() or 0)
    return sum(looks) / len(looks)


# --- what was seen --------------------------------------------------------------------------------------------------

_COURSES = {
    "temperature_c": "temperature", "frequency_hz": "frequency", "load": "load", "memory_pressure": "memory pressure",
    "memory_available_bytes": "memory", "battery": "battery", "power_w": "energy",
}  # fmt: skip
_STATES = {"governor": "governor", "throttled": "throttled", "power": "battery"}


class _Seen:
    """Reduces readings as they come: hours take no more memory than seconds."""

    def __init__(self, before: Reading, at: float) -> None:
        self._before = self._last = before
        self._began = self._at = at
        self._readings = 0
        self._extremes: Dict[str, Tuple[float, float]] = {}
        self._causes: Dict[str, None] = {}
        self._energy_j: Optional[float] = None
        self.add(before, at)

    def add(self, reading: Reading, at: float) -> None:
        self._readings += 1
        for name in _COURSES:
            value = getattr(reading, name)
            if value is not None:
                low, high = self._extremes.get(name, (value, value))
                self._extremes[name] = (min(low, value), max(high, value))
        self._causes.update(dict.fromkeys(reading.throttle_causes))
        if reading.power_w is not None and self._last.power_w is not None and at > self._at:
            joules = (reading.power_w + self._last.power_w) / 2 * (at - self._at)
            self._energy_j = (self._energy_j or 0.0) + joules
        self._last, self._at = reading, at

    def watched(self, unknown: Tuple[str, ...] = (), **others: Any) -> Watched:
        """Returns the message. `unknown`: what else is unknown; `others`: fields that no reading has."""
        from engine.protocol import Watched

        before, after = self._before, self._last
        events = [n for n, count in after.throttle_events.items() if count > before.throttle_events.get(n, count)]
        causes = (*self._causes, *(name for name in events if name not in self._causes))
        silent = list(dict.fromkeys(before.unknown + after.unknown + unknown))
        absent = []
        for name, words in {**_COURSES, **_STATES}.items():
            first, last = getattr(before, name), getattr(after, name)
            if first is not None and last is None and not _names(after, words):
                silent.append(f"{words}: it was told before the run, and not after it")
            elif first is None and last is None and not (_names(before, words) or _names(after, words)):
                absent.append(words)
        courses: Dict[str, Any] = {name: self._course(name) for name in _COURSES}
        return Watched(
            readings=self._readings,
            watched_s=self._at - self._began,
            governor=before.governor,
            governor_after=after.governor,
            throttled=None if before.throttled is None and after.throttled is None else bool(causes),
            under_voltage=None if before.under_voltage is None else UNDER_VOLTAGE in causes,
            throttle_causes=causes,
            power=before.power,
            power_after=after.power,
            energy_j=self._energy_j,
            energy_sensor=before.power_sensor,
            absent=tuple(dict.fromkeys(absent)),
            unknown=tuple(silent),
            **courses,
            **others,
        )

    def _course(self, name: str) -> Course:
        from engine.protocol import Course

        before, after = getattr(self._before, name), getattr(self._last, name)
        return Course(before, after, *self._extremes.get(name, (None, None)))


class _Series:
    """Reduces points as they come: if there are too many, the larger of each two stays."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._points: List[Tuple[float, int]] = []
        self._of_each, self._waiting = 1, 0  # readings that become one point; those since the last whole one

    def add(self, at: float, value: Optional[int]) -> None:
        if value is None:
            return
        point = (at - self._began, value)
        if self._waiting:
            self._points[-1] = max(self._points[-1], point, key=_value)
        else:
            if len(self._points) == MOST_POINTS:
                pairs = zip(self._points[::2], self._points[1::2])
                self._points = [max(pair, key=_value) for pair in pairs]
                self._of_each *= 2
            self._points.append(point)
        self._waiting = (self._waiting + 1) % self._of_each

    def series(self) -> Optional[Series]:
        """Returns the series; None if nothing could be read."""
        from engine.protocol import Series

        if not self._points:
            return None
        return Series(time_s=tuple(time_s for time_s, _ in self._points), values=tuple(map(_value, self._points)))


def _value(point: Tuple[float, int]) -> int:
    return point[1]


def _resident_bytes(pid: int) -> Optional[int]:
    """Returns the resident bytes of a process; None if it no longer exists."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return None


def _names(reading: Reading, words: str) -> bool:
    """Tells whether a reading says that this sensor did not answer."""
    return any(text.startswith(f"{words}:") for text in reading.unknown)


def _cpu_s() -> float:
    """Returns the processor time of this process and of the commands that it ran."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


# --- as a child of the supervisor -----------------------------------------------------------------------------------


class Watcher:
    """The process, and its supervisor's end of two pipes: one says what it waits for; the other says which process is
    the engine, and ends it when it is closed."""

    def __init__(self, settle: Dict[str, Any], result: str, *, not_for_it: Sequence[int] = ()) -> None:
        """Starts the watching process. It writes a Watched to the file `result` at its end.

        `not_for_it`: handles that it must not hold.
        """
        self._deadline_s = settle["max_wait_s"] + READY_GRACE_S
        self._said, say = os.pipe()
        stop, self._stop = os.pipe()
        # Held back until it means the child's end there, whatever it means to whoever forks: else it could be lost.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                for handle in (self._said, self._stop, *not_for_it):
                    os.close(handle)
                os.setsid()
                _serve(SimpleNamespace(**settle), result, say, stop)
                os._exit(0)
            except BaseException as error:  # noqa: BLE001 - whatever it is, this is no supervisor
                os.write(say, f"{type(error).__name__}: {error}".encode())  # fails once nobody listens any more
            finally:
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(say)
        os.close(stop)

    def wait_until_ready(self, relay: Callable[[bytes], None]) -> Optional[str]:
        """Passes on its events, line by line. Returns why it will not watch, or None if it will.

        Raises InterruptedError where somebody ended it meanwhile: the run is not wanted any more.
        """
        end, rest = time.monotonic() + self._deadline_s, b""
        while select.select([self._said], [], [], max(0.0, end - time.monotonic()))[0]:
            piece = os.read(self._said, 1 << 16)
            if piece:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    relay(line + b"\n")
                continue
            os.close(self._said)
            if rest == _READY:
                return None
            status = os.waitpid(self.pid, 0)[1]
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM:
                raise InterruptedError
            return rest.decode("utf-8", "replace")[:400] or "the process that watches the device has died"
        self._kill()
        return f"no sensor answered within {self._deadline_s:g} s"

    def follow(self, engine: int) -> None:
        """Tells the watcher that the engine runs, as this process."""
        with contextlib.suppress(BrokenPipeError):  # it has died: `stop` will find that out
            os.write(self._stop, b"%d\n" % engine)

    def stop(self) -> None:
        """Returns when it has written its result, or was killed because it did not in time."""
        os.close(self._stop)
        end = time.monotonic() + STOP_DEADLINE_S
        while time.monotonic() < end:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                return
            time.sleep(0.005)
        self._kill()

    def _kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


_READY = b"ready"


def _serve(settle: Any, result: str, say: int, stop: int) -> None:
    def tell(waited_s: float, reasons: List[str]) -> None:
        from engine.protocol import encode_event

        line = encode_event("settling", waited_s=waited_s, reasons=reasons)
        os.write(say, line.encode() + b"\n")  # shorter than a pipe's buffer: whole or not at all

    def ready() -> None:
        os.write(say, _READY)
        os.close(say)

    engine: List[int] = []

    def pause(seconds: float) -> bool:
        if not select.select([stop], [], [], max(0.0, seconds))[0]:
            return False
        said = os.read(stop, 64)
        engine.extend(map(int, said.split()))  # it has just started: look at it
        return not said

    watched = watch(
        settle,
        Sensors(),
        pause=pause,
        say=tell,
        ready=ready,
        resident_bytes=lambda: _resident_bytes(engine[-1]) if engine else None,
    )
    from engine.codec import to_json

    with open(result + ".part", "w") as file:
        json.dump(to_json(watched), file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.rename(result + ".part", result)
