from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from engine.codec import from_json
from engine.errors import ProtocolError
from engine.protocol import Course, DeviceFacts, Load, RunRequest, Sample, Steps, Totals, Watched, encode_event
from engine.spans import MOST_SPANS, ComputeSpans, LoadSpans, Timeline
from harness.device.collect import Collector, Ending, LimitHeld, classify, conditions, log_tail
from harness.device.lease import Owner
from reports.records import Fault, RunStatus

REQUEST = RunRequest("r", "c", "s", prompts=((1,),), max_new_tokens=1, repetitions=2)
TEXT = '{"some": "text"}'
FACTS = DeviceFacts("h", "m", "k", None, None, None, 1, None, 4096, None, "3.11", "2", None, "1")
LOAD = Load(0.1, 1, 1, None, 10, 1, None, {}, "pread", "numpy")
STEPS = Steps(**{**dict.fromkeys(Steps.__dataclass_fields__, (0,)), "time_s": (0.1,), "stall_s": (0.0,)})
SAMPLE = Sample(0, 0, False, (7,), STEPS, None, None)
STARTED = encode_event("started", facts=FACTS, request_sha256=hashlib.sha256(TEXT.encode()).hexdigest())
LOADED, SAMPLED = encode_event("loaded", load=LOAD), encode_event("sample", sample=SAMPLE)
FINISHED = encode_event("finished", totals=Totals(1.0, None, None, None, None))
BEN = Owner("ben@box", "s2", 1, "")
GOOD = [STARTED, LOADED, SAMPLED, SAMPLED, FINISHED]


def collect(*lines, piece_bytes=1 << 20):
    collected = Collector(REQUEST, TEXT)
    content = "".join(f"{line}\n" for line in lines).encode()
    for at in range(0, len(content), piece_bytes):
        collected.feed(content[at : at + piece_bytes])
    assert collected.offset == len(content)
    return collected


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 1 << 20])
def test_events_in_any_pieces(piece_bytes) -> None:
    collected = collect(*GOOD, piece_bytes=piece_bytes)
    assert collected.samples == [SAMPLE, SAMPLE]
    assert classify(collected, Ending("exited", 0), 60) == (RunStatus.OK, None, ())


def test_a_timeline_as_long_as_one_can_be_comes_in_one_sample_more() -> None:
    n, us = MOST_SPANS, 10**9
    timeline = Timeline(
        1, (0,) * 4, (us,) * 4, ComputeSpans((2,) * n, (99,) * n, (us,) * n, (us,) * n),
        LoadSpans((1,) * n, (99,) * n, (255,) * n, (us,) * n, (us,) * n, (1 << 24,) * n), {},
    )  # fmt: skip
    line = encode_event("sample", sample=replace(SAMPLE, warmup=True, timeline=timeline))
    collected = Collector(replace(REQUEST, timeline_steps=4), TEXT)
    collected.feed("".join(f"{each}\n" for each in (*GOOD[:-1], line, FINISHED)).encode())
    assert collected.samples[-1].timeline == timeline
    with pytest.raises(ProtocolError, match="more than the 2 samples"):
        collect(*GOOD[:-1], line, FINISHED)


def test_a_device_may_settle_before_the_engine_starts() -> None:
    said = []
    collected = Collector(REQUEST, TEXT, lambda event, content: said.append((event, content)))
    settling = encode_event("settling", waited_s=2.0, reasons=["\x1b[31m70 °C"])
    collected.feed(f"{settling}\n{STARTED}\n".encode())
    assert said[0] == ("settling", {"waited_s": 2.0, "reasons": ("70 °C",)})
    assert said[1][0] == "started"
    with pytest.raises(ProtocolError, match="'settling' where 'loaded'"):
        collected.feed(f"{settling}\n".encode())


def test_the_conditions_are_what_was_watched_and_what_limited() -> None:
    request = replace(REQUEST, memory_limit_bytes=1 << 29)
    watched = Watched(readings=9, temperature_c=Course(40.0, 50.0, 40.0, 51.0), governor="ondemand", throttled=False)
    ending = Ending("exited", 0, watched=watched, limit=LimitHeld("cgroup-v1", 1 << 28, "memory.max_usage_in_bytes"))
    found = conditions(
        request,
        collect(STARTED, encode_event("loaded", load=replace(LOAD, page_cache_resident_fraction=0.002))),
        ending,
    )
    assert (found.temperature_c, found.governor, found.throttled) == (watched.temperature_c, "ondemand", False)
    assert (found.memory_limit_bytes, found.memory_limit_method, found.memory_peak_bytes) == (
        1 << 29,
        "cgroup-v1",
        1 << 28,
    )
    assert found.page_cache_resident_fraction == 0.002


def test_a_device_that_was_not_watched_is_unknown() -> None:
    found = conditions(REQUEST, collect(STARTED), Ending("died"))
    assert found.memory_limit_method == "none"
    assert "was not watched" in found.unknown[0]


def test_the_answer_of_a_run_that_does_not_fit_its_limit() -> None:
    ending = Ending("exited", -9, oom_kills=1, limit=LimitHeld("cgroup-v1", 1 << 28, "memory.max_usage_in_bytes"))
    status, _, reasons = classify(collect(STARTED), ending, 60)
    assert status is RunStatus.OUT_OF_MEMORY
    assert "was limited (cgroup-v1)" in reasons[-1]
    assert len(classify(collect(STARTED), replace(ending, limit=LimitHeld("none")), 60)[2]) == 1
    with pytest.raises(ProtocolError, match="unknown method 'magic'"):
        from_json(Ending, {"state": "exited", "limit": {"method": "magic"}})


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
def test_what_does_not_fit_the_protocol_is_refused(lines, message) -> None:
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
            GOOD,
            Ending("fenced", fenced_by=BEN),
            RunStatus.UNREACHABLE,
            Fault.LEASE_LOST,
            "ben@box for sweep s2 has taken the device",
        ),
        (GOOD[:2], Ending("fenced"), RunStatus.UNREACHABLE, Fault.LEASE_LOST, "removed by `devices unlock`"),
        ([], Ending("occupied"), RunStatus.FAILED, Fault.STALLED, "does not end"),
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
def test_endings(lines, ending, status, fault, reason) -> None:
    found, whose, reasons = classify(collect(*lines), ending, 60)
    assert (found, whose) == (status, fault)
    assert (reason is None and reasons == ()) or reason in reasons[0]


def test_an_ending_of_an_unknown_state_is_refused() -> None:
    with pytest.raises(ProtocolError, match="unknown state"):
        Ending("happy")


def test_log_tails_are_harmless() -> None:
    text = "a\x1b[31mred\x1b[0m \x1b]0;title\x07b\u202ec\x00\r\td\ne"
    assert log_tail(text) == "ared bc\td\ne"
    assert len(log_tail("x" * 100_000)) == 8000
