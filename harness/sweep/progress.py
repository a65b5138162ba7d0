"""Shows a sweep while it runs: a live table in a terminal, lines in a log, JSON lines for a program."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from engine.codec import to_json
from engine.protocol import Sample
from harness.sweep.plan import Measurement
from harness.sweep.worker import Listener
from reports.metrics import METRICS, tpot_s
from reports.records import Run, RunStatus, Verdict
from reports.text import harmless

_COLOURS = {RunStatus.OK: "green", RunStatus.SKIPPED: "yellow"}
_UNREMARKABLE = ("waiting", "connecting", "deploying", "measuring", "done")  # how the state of a healthy device begins
_OTHER_LINES = 6  # of a terminal, that a table leaves to what scrolls past above it
_FEWEST_ROWS = 10


@dataclass
class _Device:
    """Holds what the live table shows of one device."""

    total: int
    state: str = "waiting"
    cell: str = ""
    done: int = 0
    failed: int = 0
    tpot_s: float | None = None
    started_s: float | None = None

    @property
    def kind(self) -> str:
        """Returns the state in one word."""
        return self.state.replace(":", " ").split(" ", 1)[0]

    @property
    def needs_attention(self) -> bool:
        return bool(self.failed) or self.kind not in _UNREMARKABLE


class LiveTable:
    """Redraws a table, one row a device; what needs attention scrolls past above it.

    Of more devices than the terminal has lines it shows those that need attention, and counts the others.
    """

    def __init__(self, totals: dict[str, int], console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes in `totals` the number of measurements of each device."""
        self._devices = {name: _Device(total) for name, total in totals.items()}
        self._console = console
        self._clock = clock
        self._lock = threading.Lock()
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        with contextlib.suppress(Exception):
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):
            self._live.stop()

    def device_is(self, device: str, state: str) -> None:
        with self._lock:
            self._devices[device].state = harmless(state)

    def cell_started(self, measurement: Measurement) -> None:
        with self._lock:
            device = self._devices[measurement.cell.device]
            device.cell = _label(measurement)
            if device.started_s is None:
                device.started_s = self._clock()

    def engine_said(self, measurement: Measurement, event: str, content: dict[str, Any]) -> None:
        sample = content.get("sample")
        token_s = tpot_s(sample) if isinstance(sample, Sample) else None
        if token_s is not None:
            with self._lock:
                self._devices[measurement.cell.device].tpot_s = token_s

    def cell_ended(self, run: Run) -> None:
        with self._lock:
            device = self._devices[run.cell.device]
            device.done += 1
            device.failed += run.status is not RunStatus.OK
        if run.status is not RunStatus.OK or run.verdict is not Verdict.VALID:
            self._console.print(_line(run), style=_COLOURS.get(run.status, "red"), markup=False, highlight=False)

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for title in ("device", "state", "cell", "done", "TPOT", "ETA"):
            table.add_column(
                title, justify="right" if title in ("done", "TPOT", "ETA") else "left", overflow="ellipsis"
            )
        most = max(_FEWEST_ROWS, self._console.height - _OTHER_LINES)
        with self._lock:
            shown = dict(self._devices)
            if len(shown) > most:
                remarkable = {name: device for name, device in shown.items() if device.needs_attention}
                shown = dict(list(remarkable.items())[:most])
                table.caption, table.caption_justify = self._summary(len(remarkable) - len(shown)), "left"
            for name, device in shown.items():
                failed = f" [red]({device.failed} failed)[/red]" if device.failed else ""
                table.add_row(
                    escape(name),
                    escape(device.state),
                    escape(device.cell),
                    f"{device.done}/{device.total}{failed}",
                    "" if device.tpot_s is None else f"{device.tpot_s * 1e3:.1f} ms",
                    self._eta(device),
                )
        return table

    def _summary(self, hidden: int) -> Text:
        """Returns all devices in one line, and how many that need attention have no row."""
        devices = self._devices.values()
        done, failed = sum(d.done for d in devices), sum(d.failed for d in devices)
        kinds = Counter(d.kind if d.kind in _UNREMARKABLE else "in trouble" for d in devices)
        left_s = max((seconds for d in devices if (seconds := self._left_s(d)) is not None), default=None)
        parts = [f"{len(devices)} devices: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}"]
        parts.append(f"{done}/{sum(d.total for d in devices)} runs, {failed} of them not ok")
        parts += [] if left_s is None else [f"ETA {_minutes(left_s)}"]
        parts += [f"{hidden} more devices need attention"] if hidden else []
        return Text("; ".join(parts))

    def _eta(self, device: _Device) -> str:
        left_s = self._left_s(device)
        return "" if left_s is None else _minutes(left_s)

    def _left_s(self, device: _Device) -> float | None:
        if not device.done or device.started_s is None:
            return None
        return (self._clock() - device.started_s) / device.done * (device.total - device.done)


class LogLines:
    """Writes a line for each thing that happened: for logs, pipes and CI."""

    def __init__(self, totals: dict[str, int], stream: TextIO) -> None:
        self._totals = totals
        self._done = dict.fromkeys(totals, 0)
        self._states: dict[str, str] = {}
        self._stream = stream
        self._lock = threading.Lock()

    def device_is(self, device: str, state: str) -> None:
        with self._lock:
            # One line when it connects, waits and ends: what happens for every cell stands in the cell's line.
            kind = state.partition(":")[0] if state.startswith("waiting:") else state  # which tells new figures
            if self._states.get(device) != kind and kind != "measuring" and not kind.startswith("deploying"):
                self._write(f"{device}: {state}")
            self._states[device] = kind

    def cell_started(self, measurement: Measurement) -> None:
        pass

    def engine_said(self, measurement: Measurement, event: str, content: dict[str, Any]) -> None:
        pass

    def cell_ended(self, run: Run) -> None:
        name = run.cell.device
        with self._lock:
            self._done[name] += 1
            self._write(f"{name} [{self._done[name]}/{self._totals[name]}] {_line(run)}")

    def _write(self, line: str) -> None:
        self._stream.write(harmless(line) + "\n")
        self._stream.flush()


class JsonLines:
    """Writes one JSON object a line: {"event": "device" | "cell_started" | "cell_ended" | "summary", ...}."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def device_is(self, device: str, state: str) -> None:
        self.say("device", device=device, state=state)

    def cell_started(self, measurement: Measurement) -> None:
        self.say("cell_started", cell=measurement.cell, block=measurement.block)

    def engine_said(self, measurement: Measurement, event: str, content: dict[str, Any]) -> None:
        pass

    def cell_ended(self, run: Run) -> None:
        self.say(
            "cell_ended",
            run=run.id,
            cell=run.cell,
            block=run.block,
            status=run.status.value,
            verdict=run.verdict.value,
            reasons=run.reasons,
            fault=run.fault,
            tpot_s=METRICS["tpot_s"].of(run),
            estimated_tpot_s=run.estimate.token_s if run.estimate else None,
        )

    def say(self, event: str, **content: Any) -> None:
        line = json.dumps({"event": event, **to_json(content)}, allow_nan=False)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


class Unfailing:
    """Passes on to a listener what happens, and drops what it fails of: a display that fails ends no sweep."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def device_is(self, device: str, state: str) -> None:
        with contextlib.suppress(Exception):
            self._listener.device_is(device, state)

    def cell_started(self, measurement: Measurement) -> None:
        with contextlib.suppress(Exception):
            self._listener.cell_started(measurement)

    def engine_said(self, measurement: Measurement, event: str, content: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):
            self._listener.engine_said(measurement, event, content)

    def cell_ended(self, run: Run) -> None:
        with contextlib.suppress(Exception):
            self._listener.cell_ended(run)


def _minutes(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"


def _label(measurement: Measurement) -> str:
    cell = measurement.cell
    return f"{cell.container} {cell.strategy} {cell.expert_budget} {cell.workload} #{measurement.block}"


def _line(run: Run) -> str:
    cell = run.cell
    token_s = METRICS["tpot_s"].of(run)
    parts = [f"{cell.container} {cell.strategy} {cell.expert_budget} {cell.workload} {cell.page_cache} #{run.block}:"]
    parts.append(run.status.value)
    if token_s is not None:
        estimated = "" if run.estimate is None else f" (estimated {run.estimate.token_s * 1e3:.1f})"
        parts.append(f"{token_s * 1e3:.1f} ms a token{estimated}")
    if run.status is RunStatus.OK and run.verdict is not Verdict.VALID:
        parts.append(run.verdict.value)
    if run.reasons:
        parts.append(f"({'; '.join(run.reasons)})")
    return harmless(" ".join(parts))
