"""What a person, a log and a program see of a sweep."""

from __future__ import annotations

import io
import json

from rich.console import Console

from harness.device.session import Outcome
from harness.sweep.progress import JsonLines, LiveTable, LogLines
from reports.records import RunEstimate, RunStatus
from tests.harness.conftest import ok

HOSTILE = "died \x1b[31mred\x1b[0m [bold]x[/bold]\nand on"


def measure(bench, listener) -> None:
    failure = Outcome(RunStatus.FAILED, (HOSTILE,))
    bench.farm.answer = lambda request: failure if request.strategy == "naive-swap" else ok(request)
    bench.witness = listener
    bench.estimate = lambda session, measurement, request: RunEstimate(0.4, 0.3, 0.5, 1.0, 1, "told")
    bench.measure(bench.plan())


def test_log_lines_are_one_a_run(bench) -> None:
    stream = io.StringIO()
    measure(bench, LogLines({"pi": 8}, stream))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "pi: connecting"
    assert lines[-1] == "pi: done"
    runs = lines[1:-1]
    assert [line.split()[1] for line in runs] == [f"[{i}/8]" for i in range(1, 9)]
    assert sum("ok 500.0 ms a token (estimated 400.0)" in line for line in runs) == 6
    assert sum("failed (died " in line for line in runs) == 2
    assert "\x1b" not in stream.getvalue()


def test_json_lines_are_json_and_complete(bench) -> None:
    stream = io.StringIO()
    measure(bench, JsonLines(stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    ended = [e for e in events if e["event"] == "cell_ended"]
    assert [e["status"] for e in ended].count("ok") == 6
    assert {e["tpot_s"] for e in ended} == {0.5, None}
    assert {e["estimated_tpot_s"] for e in ended} == {0.4}
    assert [e["reasons"] for e in ended if e["status"] == "failed"] == [[HOSTILE]] * 2
    assert ended[0]["cell"]["device"] == "pi"
    assert sum(e["event"] == "cell_started" for e in events) == 8


def test_the_live_table_shows_each_device_and_nothing_of_a_devices_own_markup(bench) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160)
    seconds = iter(range(1000))
    with LiveTable({"pi": 8, "orin": 2}, console, clock=lambda: float(next(seconds))) as table:
        measure(bench, table)
        screen = io.StringIO()
        Console(file=screen, width=160, color_system=None).print(table.table())
    shown = screen.getvalue()
    assert "8/8 (2 failed)" in shown
    assert "500.0 ms" in shown
    assert "0:00" in shown
    assert "0/2" in shown
    assert "[bold]x[/bold]" in stream.getvalue()
    assert "\x1b[31mred" not in stream.getvalue()


def test_waiting_is_told_once_however_its_figures_change() -> None:
    stream = io.StringIO()
    lines = LogLines({"pi": 8}, stream)
    for state in ("measuring", "waiting: 70 °C", "waiting: 65 °C", "measuring", "waiting: 61 °C"):
        lines.device_is("pi", state)
    assert stream.getvalue().splitlines() == ["pi: waiting: 70 °C", "pi: waiting: 61 °C"]


def test_hundreds_of_devices_are_counted_and_those_in_trouble_shown(bench) -> None:
    console = Console(file=io.StringIO(), width=160, height=24, color_system=None)
    table = LiveTable({f"d{n:03}": 8 for n in range(199)} | {"pi": 8}, console, clock=lambda: 0.0)
    for n in range(150):
        table.device_is(f"d{n:03}", "measuring")
    table.device_is("d150", "no connection to h: is it switched on?")
    measure(bench, table)
    screen = io.StringIO()
    Console(file=screen, width=160, color_system=None).print(table.table())
    lines = screen.getvalue().splitlines()
    assert len(lines) == 4, "titles, the two in trouble, and the summary"
    assert "d150" in lines[1]
    assert "is it switched on?" in lines[1]
    assert "8/8 (2 failed)" in lines[2]
    assert lines[3].startswith("200 devices: 150 measuring, 1 in trouble, 48 waiting, 1 done; 8/1600 runs, 2 of them")
    for n in range(100):
        table.device_is(f"d{n:03}", "host key has changed")
    Console(file=screen, width=160, color_system=None).print(table.table())
    assert len(screen.getvalue().splitlines()) - len(lines) <= 24
    assert "more devices need attention" in screen.getvalue()
