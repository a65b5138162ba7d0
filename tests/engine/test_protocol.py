from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.codec import MAX_LINE_BYTES, from_json, loads, to_json, to_sparse_json
from engine.errors import ProtocolError
from engine.protocol import (
    BACKENDS,
    PAGE_CACHES,
    READERS,
    DeviceFacts,
    ExpertBudget,
    RunRequest,
    Sample,
    Sampling,
    Steps,
    decode_event,
    encode_event,
)

budgets = st.one_of(
    st.none(),
    st.builds(ExpertBudget, bytes=st.integers(1, 1 << 40)),
    st.builds(ExpertBudget, experts=st.integers(1, 1 << 20)),
)
requests = st.builds(
    RunRequest,
    run_id=st.text(min_size=1),
    container=st.text(min_size=1),
    strategy=st.text(),
    prompts=st.lists(st.lists(st.integers(0, 1 << 30), min_size=1).map(tuple), min_size=1, max_size=3).map(tuple),
    max_new_tokens=st.integers(1, 1 << 20),
    expert_budget=budgets,
    profile=st.none() | st.text(),
    sampling=st.builds(
        Sampling, temperature=st.floats(0, 100), top_p=st.floats(0.01, 1), seed=st.integers(0, (1 << 63) - 1)
    ),
    stop_at_eos=st.booleans(),
    warmups=st.integers(0, 1000),
    repetitions=st.integers(1, 10000),
    reader=st.sampled_from(("auto", *READERS)),
    lanes=st.integers(0, 2),
    page_cache=st.sampled_from(PAGE_CACHES),
    emulated_read_bytes_per_s=st.none() | st.floats(1e3, 1e12),
    threads=st.integers(1, 1024),
    backend=st.sampled_from(BACKENDS),
    deadline_s=st.floats(0.1, 1e6),
)


@given(requests)
@settings(max_examples=150, deadline=None)
def test_a_request_survives_the_wire(request: RunRequest) -> None:
    assert from_json(RunRequest, loads(json.dumps(to_json(request)))) == request


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(requests, st.sampled_from(list(RunRequest.__dataclass_fields__)), json_values)
@settings(max_examples=300, deadline=None)
def test_a_wrong_value_is_an_error_or_a_valid_request(request: RunRequest, key: str, value: Any) -> None:
    try:
        made = from_json(RunRequest, {**to_json(request), key: value})
    except ProtocolError:
        return
    assert from_json(RunRequest, to_json(made)) == made


@given(st.binary(max_size=200) | st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_noise_is_an_error(line: bytes | str) -> None:
    with pytest.raises(ProtocolError):
        decode_event(line)


STEPS = Steps(
    time_s=(0.5, 0.1), stall_s=(0.0, 0.05), hits=(1, 2), late=(0, 0), misses=(3, 0), read_bytes=(7, 0),
    prefetched_bytes=(0, 0), wasted_bytes=(0, 0),
)  # fmt: skip
SAMPLE = Sample(0, 1, False, (5, 6), STEPS, 3, None)


def test_events_survive_the_wire() -> None:
    assert decode_event(encode_event("sample", sample=SAMPLE)) == ("sample", {"sample": SAMPLE})
    failed = {"kind": "storage", "message": "x\ny"}
    line = encode_event("failed", **failed)
    assert "\n" not in line
    assert decode_event(line) == ("failed", failed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.__setitem__("v", 2), "version"),
        (lambda m: m.pop("v"), "version"),
        (lambda m: m.__setitem__("event", "sampled"), "unknown event"),
        (lambda m: m.pop("sample"), "'sample' is missing"),
        (lambda m: m.__setitem__("more", 1), "unknown key 'more'"),
        (lambda m: m["sample"].__setitem__("tokens", [1]), "one step a generated token"),
        (lambda m: m["sample"]["steps"].__setitem__("hits", [1]), "differ in length"),
        (lambda m: m["sample"]["steps"].__setitem__("time_s", [1, "2"]), r"time_s\[1\]: expected float"),
        (lambda m: m["sample"]["steps"].__setitem__("time_s", [1, -2]), "negative"),
        (lambda m: m["sample"]["steps"].__setitem__("hits", [1, 2.5]), r"hits\[1\]: expected int"),
        (lambda m: m["sample"].__setitem__("prompt", True), "expected int"),
    ],
)
def test_a_damaged_event_names_the_place(change: Any, message: str) -> None:
    content = json.loads(encode_event("sample", sample=SAMPLE))
    change(content)
    with pytest.raises(ProtocolError, match=message):
        decode_event(json.dumps(content))


def test_limits_of_a_message() -> None:
    for text in ("x" * (MAX_LINE_BYTES + 1), "[" * 200000, '{"v": NaN', "[1]"):
        with pytest.raises(ProtocolError):
            loads(text)
    with pytest.raises(ProtocolError, match="expected float"):
        from_json(Sampling, {"temperature": float("inf")})
    with pytest.raises(ProtocolError, match=r"DeviceFacts: 'blas' is missing"):
        from_json(DeviceFacts, {})


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("8-experts", ExpertBudget(experts=8)),
        ("1-expert", ExpertBudget(experts=1)),
        ("10 experts", ExpertBudget(experts=10)),
        ("16777216", ExpertBudget(bytes=1 << 24)),
        ("64MiB", ExpertBudget(bytes=64 << 20)),
        ("1.5 GB", ExpertBudget(bytes=1_500_000_000)),
    ],
)
def test_expert_budgets_as_people_write_them(text: str, budget: ExpertBudget) -> None:
    assert ExpertBudget.parse(text) == budget
    assert ExpertBudget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "0-experts", "eight", "1e99", "nan", "inf", "8-expertises", "-experts"]
)
def test_expert_budgets_that_say_nothing(text: str) -> None:
    with pytest.raises(ProtocolError):
        ExpertBudget.parse(text)


def test_a_request_says_only_what_an_older_engine_may_have_to_know() -> None:
    request = RunRequest("r", "c", "edgemoe", ((1,),), 2, sampling=Sampling(temperature=1.0))
    sparse = to_sparse_json(request)
    assert sparse == {
        "run_id": "r", "container": "c", "strategy": "edgemoe", "prompts": [[1]], "max_new_tokens": 2,
        "sampling": {"temperature": 1.0},
    }  # fmt: skip
    assert from_json(RunRequest, sparse) == request
