"""A device may send anything: it costs its own run, and no escape code of it reaches a terminal."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from engine.codec import from_json, loads, to_json
from engine.errors import ProtocolError
from engine.protocol import (
    ArithmeticTimes,
    DeviceFacts,
    Load,
    Recall,
    RunRequest,
    Sample,
    Steps,
    Totals,
    encode_event,
)
from harness.device.collect import Collector, Ending, classify, log_tail
from harness.device.probe import Python, find_python, read_facts
from harness.device.remote import RemoteSession
from harness.errors import DeviceError
from harness.sweep.progress import JsonLines, LiveTable, LogLines
from harness.transport import Completed
from harness.transport.shell import ShellTransport
from reports.judging.groups import compare
from reports.records import Cell, Run, RunStatus, Sweep, Verdict, run_from_json, run_to_json
from reports.results.export import export
from tests.reports.seen import pages_of
from tests.security.hostile import damaged, long_texts, nested, texts

REQUEST = RunRequest("r", "c", "s", prompts=((1,),), max_new_tokens=2, repetitions=2)
TEXT = json.dumps(to_json(REQUEST))
FACTS = DeviceFacts("h", "m", "k", None, "model", None, 1, None, 4096, None, "3.11", "2", None, "1")
LOAD = Load(0.1, 1, 1, None, 10, 1, 0.0, {"residency": "x"}, "pread", "numpy", warnings=("w",))
STEPS = Steps(
    time_s=(0.1, 0.2), stall_s=(0.0, 0.1), hits=(1, 1), late=(0, 1), misses=(1, 1), read_bytes=(9, 9),
    prefetched_bytes=(1, 1), wasted_bytes=(0, 0),
)  # fmt: skip
SAMPLES = [Sample(0, i, False, (7, 8), STEPS, 1, 1, Recall(1, 1, 1, 1)) for i in (0, 1)]
EVENTS = [
    json.loads(line)
    for line in (
        encode_event("started", facts=FACTS, request_sha256=hashlib.sha256(TEXT.encode()).hexdigest()),
        encode_event("loaded", load=LOAD),
        *(encode_event("sample", sample=sample) for sample in SAMPLES),
        encode_event("finished", totals=Totals(1.0, 1, 1, 1, 0.5, (2.0,))),
    )
]
ENDING = {"state": "exited", "status": 0, "timed_out": False, "oom_kills": 0, "rebooted": False, "log_tail": "x"}
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def is_harmless(text: str) -> bool:
    return not RAW.search(text)


events = st.tuples(*(damaged(event) for event in EVENTS)).map(list)
streams = st.one_of(
    events.map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"),
    st.tuples(events, st.binary(max_size=40), st.integers(0, 4)).map(
        lambda parts: b"\n".join(
            [
                *(line.encode() for line in parts[0][: parts[2]]),
                parts[1],
                *(line.encode() for line in parts[0][parts[2] :]),
            ]
        )
    ),
    st.binary(max_size=300),
)


def collected(stream: bytes, piece_bytes: int = 1 << 16) -> Collector:
    collector = Collector(REQUEST, TEXT)
    for at in range(0, len(stream), piece_bytes):
        collector.feed(stream[at : at + piece_bytes])
    return collector


# --- what it raises -------------------------------------------------------------------------------------------------


@given(streams, st.sampled_from((1 << 16, 61)))
def test_events_are_taken_or_refused(stream: bytes, piece_bytes: int) -> None:
    try:
        collected(stream, piece_bytes)
    except ProtocolError as error:
        assert len(str(error)) < 2000


@given(damaged(ENDING) | long_texts)
def test_an_ending_is_taken_or_refused(text: str) -> None:
    try:
        ending = from_json(Ending, loads(text.encode("utf-8", "surrogatepass")))
    except ProtocolError as error:
        assert len(str(error)) < 2000
        return
    for stream in (b"", "\n".join(map(json.dumps, EVENTS)).encode() + b"\n"):
        _, _, reasons = classify(collected(stream), ending, 60)
        assert is_harmless(" ".join(reasons))
        assert len(" ".join(reasons)) < 2000


@pytest.mark.parametrize("cls", [DeviceFacts, ArithmeticTimes, Load, Sample, Totals, Ending])
@pytest.mark.parametrize("depth", [10, 300, 480, *range(880, 1000, 6), 5000])
def test_deep_json_is_refused_wherever_it_stands(cls: type, depth: int) -> None:
    """What a parser can read, a message about it need not be able to write."""
    for name in [field.name for field in fields(cls)][:3]:
        with pytest.raises(ProtocolError):
            from_json(cls, loads(f'{{"{name}": {nested(depth)}}}'))
    for text in (f'{{"v": {nested(depth)}}}', f'{{"v": 1, "event": {nested(depth)}}}'):
        with pytest.raises(ProtocolError):
            collected(text.encode() + b"\n")


# --- how much it takes ----------------------------------------------------------------------------------------------


def test_what_a_device_sends_takes_no_more_memory_than_what_was_asked_for() -> None:
    """Two samples of two tokens were asked for: arrays of millions are broken off before they are parsed."""
    sample = json.dumps(EVENTS[2]).replace('"tokens": [7, 8]', f'"tokens": [{"7," * 6_000_000}8]')
    facts = json.dumps(EVENTS[0]).replace('"h"', f'"{"h" * 12_000_000}"')
    endless = b'{"v":1,"event":"' + b"x" * (15 << 20)
    start = "\n".join(map(json.dumps, EVENTS[:2])).encode() + b"\n"
    for stream in (start + sample.encode() + b"\n", facts.encode() + b"\n", endless):
        pieces = [stream[at : at + 65536] for at in range(0, len(stream), 65536)]
        collector = Collector(REQUEST, TEXT)
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolError, match="longer than"):
                for piece in pieces:
                    collector.feed(piece)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8 << 20


# --- a whole session ------------------------------------------------------------------------------------------------


class Liar:
    """A transport to a device that answers what a test says, by the command."""

    name = "liar"
    bytes_sent = 0

    def __init__(self, answers: Mapping[str, tuple[int, bytes, bytes]]) -> None:
        self.answers = dict(answers)

    def run(
        self, arguments: Sequence[str], *, deadline_s: float, check: bool = True,
        on_stdout: Callable[[bytes], None] | None = None, **_: Any,
    ) -> Completed:  # fmt: skip
        line = " ".join(arguments)
        kind = next((kind for kind in self.answers if kind in line), "")
        status, stdout, stderr = self.answers.get(kind, (0, b"", b""))
        if on_stdout:
            on_stdout(stdout)
        return Completed(status, b"" if on_stdout else stdout, stderr)

    def upload(self, *_: Any, **__: Any) -> int:
        return 0

    def close(self) -> None: ...


PYTHON = {"path": "/usr/bin/python3", "version": [3, 11, 2], "numpy": "2.0", "reason": ""}
HONEST = {
    "command -v": (0, json.dumps(PYTHON).encode() + b"\n", b""),
    "mkdir -p": (0, b"/home/pi/farm\n", b""),
    "-m engine probe": (0, json.dumps(to_json(FACTS)).encode() + b"\n", b""),
    " attend ": (0, "\n".join(map(json.dumps, EVENTS)).encode() + b"\n", json.dumps(ENDING).encode()),
}
outputs = st.binary(max_size=100) | long_texts.map(lambda text: text.encode("utf-8", "surrogatepass"))


@given(
    st.sampled_from(list(HONEST)), outputs | damaged(PYTHON).map(str.encode) | damaged(to_json(FACTS)).map(str.encode)
)
def test_a_session_with_a_liar_is_a_device_error(tmp_path_factory: Any, kind: str, output: bytes) -> None:
    cache = tmp_path_factory.getbasetemp() / "cache"
    liar = Liar({**HONEST, kind: (0, output, output)})
    try:
        session = RemoteSession(lambda: liar, root="farm", cache_dir=cache, reconnect_s=0)
    except DeviceError as error:
        assert is_harmless(str(error))
        assert len(str(error)) < 4000
        return
    outcome = session.execute(REQUEST)
    assert is_harmless(" ".join(outcome.reasons) + outcome.log_tail)
    assert is_harmless(session._place.root)
    assert session._place.root.startswith("/")


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("command -v", b'{"path": "python3", "version": [1e999], "numpy": "2", "reason": ""}'),
        ("mkdir -p", b"relative/folder\n"),
        ("mkdir -p", b"/home/pi\x1b[2J/farm\n"),
        ("mkdir -p", b"/home/\xff/farm\n"),
        ("mkdir -p", b"/home/pi\n/farm\n"),
        ("mkdir -p", b"/" + b"x" * 5000),
        ("-m engine probe", json.dumps({**to_json(FACTS), "hostname": "h" * 5000}).encode()),
        (" attend ", b'{"v": 1, "event": []}\n'),
        (" attend ", b'{"v": 1, "event": {}}\n'),
        (" attend ", "\n".join(map(json.dumps, EVENTS)).replace("0.1", HUGE).encode() + b"\n"),
        (" attend ", "\n".join(map(json.dumps, EVENTS)).replace("0.2", "1e308").encode() + b"\n"),
        (" attend ", "\n".join(map(json.dumps, EVENTS)).replace("[9, 9]", "[9, -9]").encode() + b"\n"),
    ],
)
def test_a_lie_costs_the_liar_and_nobody_else(tmp_path: Path, kind: str, output: bytes) -> None:
    liar = Liar({**HONEST, kind: (0, output, json.dumps(ENDING).encode())})
    try:
        outcome = RemoteSession(lambda: liar, root="farm", cache_dir=tmp_path, reconnect_s=0).execute(REQUEST)
    except DeviceError:
        return
    assert outcome.status is RunStatus.FAILED
    assert outcome.reasons[0].startswith("the device sent damaged output: ")


def test_a_disk_that_claims_a_negative_file(tmp_path: Path) -> None:
    class Disk(ShellTransport):
        def close(self) -> None: ...

        def _execute(self, line: str, stdin: Any, out: Any, err: Any, **_: Any) -> int:
            mark = line.split("'")[9].encode()
            out(b"begin-" + mark + b"-5\n999999999\nend-" + mark)
            return 0

    (tmp_path / "model").write_bytes(b"weights")
    with pytest.raises(DeviceError, match="no sensible answer"):
        Disk("liar").upload(tmp_path / "model", "blobs/model")


@given(damaged(PYTHON), texts)
def test_a_python_that_answers_nonsense(answer: str, system: str) -> None:
    liar = Liar({"command -v": (0, f"{system}\n{answer}\n".encode("utf-8", "surrogatepass"), b"")})
    try:
        python = find_python(liar)
    except DeviceError as error:
        assert is_harmless(str(error))
        return
    assert is_harmless(python.path + python.version + python.numpy)


@given(damaged(to_json(FACTS)) | long_texts)
def test_facts_are_taken_or_refused(answer: str) -> None:
    liar = Liar({"-m engine": (0, answer.encode("utf-8", "surrogatepass"), b"")})
    try:
        facts = read_facts(liar, Python("python3", "3.11", "2"), "engine")
    except DeviceError as error:
        assert is_harmless(str(error))
        assert len(str(error)) < 2000
        return
    assert len(json.dumps(to_json(facts))) < 100_000


# --- where a person meets it ----------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """A record with whatever a device may put into one."""
    parts: dict[str, Any] = {
        "facts": FACTS,
        "load": LOAD,
        "totals": Totals(1.0, 1, 1, 1, 0.5),
        "samples": tuple(SAMPLES),
    }
    if draw(st.booleans()):
        decoded = {"facts": DeviceFacts, "load": Load, "totals": Totals}
        for name, cls in decoded.items():
            try:
                parts[name] = from_json(cls, loads(draw(damaged(to_json(parts[name])))))
            except ProtocolError:
                continue
        with suppress(ProtocolError):
            parts["samples"] = tuple(from_json(Sample, loads(draw(damaged(to_json(s))))) for s in SAMPLES)
        if any(s.prompt for s in parts["samples"]) or len({(s.repetition, s.warmup) for s in parts["samples"]}) < 2:
            parts["samples"] = tuple(SAMPLES)
    is_ok = draw(st.booleans()) and any(not s.warmup for s in parts["samples"])
    return Run(
        id="r", sweep_id="20260101-000000-abcd", cell=Cell("pi", "c", "c" * 64, "s", "default", "w", "d" * 64, "cold"),
        block=0, status=RunStatus.OK if is_ok else RunStatus.FAILED, verdict=Verdict.SUSPECT,
        reasons=(draw(long_texts),), request=REQUEST, started_at="2026-01-01T00:00:00+00:00",
        ended_at="2026-01-01T00:00:01+00:00", command=draw(texts), log_tail=draw(long_texts), **parts,
    )  # fmt: skip


@given(runs(), texts)
def test_no_escape_code_reaches_a_terminal_a_log_or_a_page(run: Run, state: str) -> None:
    run = run_from_json(loads(json.dumps(run_to_json(run), allow_nan=False)))
    log, lines, terminal = io.StringIO(), io.StringIO(), Terminal()
    console = Console(file=terminal, force_terminal=True, color_system=None, width=100)
    table = LiveTable({"pi": 1}, console)
    for listener in (LogLines({"pi": 1}, log), JsonLines(lines), table):
        listener.device_is("pi", state)
        listener.cell_ended(run)
    console.print(table.table())
    assert is_harmless(log.getvalue()) and len(log.getvalue().splitlines()) <= 2
    for line in lines.getvalue().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert is_harmless(re.sub("\x1b\\[0?m", "", terminal.getvalue()))
    sweep = Sweep(run.sweep_id, "m", "", "s", ((run.cell.key, 0),), run.started_at, "0.1.0")
    for page in pages_of(sweep, [run]).values():
        assert is_harmless(page)
        assert page.count("<script") == 1 and "<img" not in page
    compare(sweep, [run])
    for kind in ("jsonl", "csv", "parquet"):
        export([run], kind, io.BytesIO())


@given(long_texts)
def test_log_tails_are_harmless(text: str) -> None:
    assert is_harmless(log_tail(text))
