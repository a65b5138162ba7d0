from __future__ import annotations

import hashlib
import json

import pytest

from engine.errors import ProtocolError
from engine.protocol import DeviceFacts, Load, RunRequest, Sample, Steps, Totals, encode_event
from harness.collect import Collector, Ending, judge, printable
from reports.records import Fault, RunStatus

REQUEST = RunRequest("r", "c", "s", prompts=((1,),), max_new_tokens=1, repetitions=2)
TEXT = '{"some": "text"}'
FACTS = DeviceFacts("h", "m", "k", None, None, None, 1, None, 4096, None, "3.11", "2", None, "1")
LOAD = Load(0.1, 1, 1, None, 10, 1, None, {}, "pread", "numpy")
SAMPLE = Sample(0, 0, False, (7,), Steps((0.1,), (0.0,), (0,), (0,), (0,), (0,), (0,), (0,)), None, None)
STARTED = encode_event("started", facts=FACTS, request_sha256=hashlib.sha256(TEXT.encode()).hexdigest())
LOADED, SAMPLED = encode_event("loaded", load=LOAD), encode_event("sample", sample=SAMPLE)
FINISHED = encode_event("finished", totals=Totals(1.0, None, None, None, None))
GOOD = [STARTED, LOADED, SAMPLED, SAMPLED, FINISHED]


def collect(*lines, piece_bytes=1 << 20):
    collected = Collector(REQUEST, TEXT)
    content = "".join(f"{line}\n" for line in lines).encode()
    for at in range(0, len(content), piece_bytes):
        collected.feed(content[at : at + piece_bytes])
    assert collected.offset == len(content)
    return collected


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 1 << 20])
def test_events_in_any_pieces(piece_bytes):
    collected = collect(*GOOD, piece_bytes=piece_bytes)
    assert collected.samples == [SAMPLE, SAMPLE]
    assert judge(collected, Ending("exited", 0), 60) == (RunStatus.OK, None, ())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([LOADED], "'loaded' where 'started'"),
        ([STARTED, STARTED], "'started' where 'loaded'"),
        ([STARTED, SAMPLED], "'sample' where 'loaded'"),
        ([STARTED, LOADED, FINISHED], "finished with 0 of 2 samples"),
        ([*GOOD[:4], SAMPLED], "more than the 2 samples"),
        ([*GOOD, SAMPLED], "after the last one"),
        ([STARTED.replace('"request_sha256":"', '"request_sha256":"x')], "another request"),
        (["[" * 100_000], "not JSON"),
        (["\x1b[31m"], "not JSON"),
        (['{"v":1,"event":"surprise"}'], "unknown event"),
        ([json.dumps({**json.loads(LOADED), "v": 99})], "version 99"),
    ],
)
def test_what_does_not_fit_the_protocol_is_refused(lines, message):
    with pytest.raises(ProtocolError, match=message):
        collect(*lines)


@pytest.mark.parametrize(
    ("lines", "ending", "status", "fault", "reason"),
    [
        (
            GOOD,
            Ending("exited", -11),
            RunStatus.FAILED,
            Fault.ENGINE,
            "finished, and then was killed by signal 11 (SIGSEGV)",
        ),
        (GOOD, Ending("died"), RunStatus.OK, None, None),
        (GOOD[:3], Ending("exited", 0), RunStatus.FAILED, Fault.ENGINE, "ended without its last event"),
        (
            GOOD[:3],
            Ending("exited", 1, log_tail="a\nValueError: b\n"),
            RunStatus.FAILED,
            Fault.ENGINE,
            "status 1: ValueError: b",
        ),
        (GOOD[:2], Ending("exited", -15, timed_out=True), RunStatus.TIMED_OUT, Fault.TIMED_OUT, "no end within 60 s"),
        (
            GOOD[:2],
            Ending("exited", -9, oom_kills=1),
            RunStatus.OUT_OF_MEMORY,
            Fault.OUT_OF_MEMORY,
            "counted 1 out-of-memory kill(s)",
        ),
        (
            GOOD[:2],
            Ending("exited", -9, oom_kills=0),
            RunStatus.FAILED,
            Fault.KILLED,
            "no out-of-memory kill was counted",
        ),
        (GOOD[:2], Ending("exited", -9), RunStatus.OUT_OF_MEMORY, Fault.OUT_OF_MEMORY, "is suspected"),
        (
            GOOD[:2],
            Ending("died", oom_kills=2),
            RunStatus.OUT_OF_MEMORY,
            Fault.OUT_OF_MEMORY,
            "engine and its supervisor",
        ),
        (GOOD[:2], Ending("died", rebooted=True), RunStatus.UNREACHABLE, Fault.REBOOTED, "the device restarted"),
        (GOOD[:2], Ending("absent"), RunStatus.FAILED, Fault.STORAGE, "has vanished"),
        (
            [],
            Ending("exited", 127, log_tail="cannot start"),
            RunStatus.FAILED,
            Fault.ENGINE,
            "status 127: cannot start",
        ),
        (
            [encode_event("failed", kind="memory", message="does not fit")],
            Ending("exited", 4),
            RunStatus.OUT_OF_MEMORY,
            Fault.OUT_OF_MEMORY,
            "does not fit",
        ),
        (
            [encode_event("failed", kind="deadline", message="late")],
            Ending("exited", 6),
            RunStatus.TIMED_OUT,
            Fault.TIMED_OUT,
            "late",
        ),
        (
            [encode_event("failed", kind="container", message="bad")],
            Ending("exited", 3),
            RunStatus.FAILED,
            Fault.ENGINE,
            "bad",
        ),
        (GOOD[:3], Ending("exited", 1, free_bytes=0), RunStatus.FAILED, Fault.DISK_FULL, "disk is full (0 bytes"),
        (GOOD[:3], Ending("died", oom_kills=0, free_bytes=0), RunStatus.FAILED, Fault.DISK_FULL, "disk is full"),
        (
            GOOD[:3],
            Ending("died", oom_kills=1, free_bytes=0),
            RunStatus.OUT_OF_MEMORY,
            Fault.OUT_OF_MEMORY,
            "counted 1",
        ),
        (
            [encode_event("failed", kind="storage", message="c.emoe: Input/output error")],
            Ending("exited", 5),
            RunStatus.FAILED,
            Fault.STORAGE,
            "Input/output error",
        ),
        (
            [encode_event("failed", kind="storage", message="[Errno 28] No space left on device")],
            Ending("exited", 5),
            RunStatus.FAILED,
            Fault.DISK_FULL,
            "No space left",
        ),
    ],
)
def test_endings(lines, ending, status, fault, reason):
    found, whose, reasons = judge(collect(*lines), ending, 60)
    assert (found, whose) == (status, fault)
    assert (reason is None and reasons == ()) or reason in reasons[0]


def test_an_ending_of_an_unknown_state_is_refused():
    with pytest.raises(ProtocolError, match="unknown state"):
        Ending("happy")


def test_log_tails_are_harmless():
    text = "a\x1b[31mred\x1b[0m \x1b]0;title\x07b\u202ec\x00\r\td\ne"
    assert printable(text) == "ared bc\td\ne"
    assert len(printable("x" * 100_000)) == 8000
