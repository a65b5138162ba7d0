"""The farm under real conditions: limits that hold, caches that are cold, on a device that is this machine."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.container import Container
from engine.device.limits import MemoryLimit, best_method
from engine.offline.importing.importer import import_checkpoint
from engine.protocol import RunRequest, Settle
from engine.quantize import Format
from harness.device.remote import RemoteSession
from harness.device.session import Outcome
from harness.sweep.verify import COLD_RESIDENT_FRACTION, judge
from harness.transport.local import LocalTransport
from reports.records import RunStatus, Verdict
from tests.golden.checkpoints import SHIPPED

MIB = 1 << 20
PROMPT = (5, 6, 7, 8, 9, 10, 11, 12)

Measure = Callable[..., tuple[RunRequest, Outcome]]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Container:
    """96 MiB of experts in FP32."""
    return import_checkpoint(SHIPPED, tmp_path_factory.mktemp("wide") / "mix16.emoe", [Format("fp32")])


@pytest.fixture
def measure(tmp_path: Path, wide: Container):
    session = RemoteSession(
        lambda: LocalTransport("pi", tmp_path / "pi"), root=str(tmp_path / "pi" / "root"),
        cache_dir=tmp_path / "cache", python=sys.executable,
    )  # fmt: skip
    container, numbers = session.put(Path(wide.path)), itertools.count()

    def run(strategy: str = "naive-swap", **changes: object) -> tuple[RunRequest, Outcome]:
        usual: dict[str, object] = {"prompts": (PROMPT,), "max_new_tokens": 12, "deadline_s": 200.0, "settle": Settle()}
        request = RunRequest(f"run-{next(numbers)}", container, strategy, **{**usual, **changes})
        return request, session.execute(request)

    yield run
    session.close()


@pytest.fixture
def group_limit() -> None:
    if not best_method().startswith("cgroup"):
        pytest.skip("no memory control group can be made here: it needs root, or delegation by systemd")


def test_a_cold_run_is_cold_and_its_conditions_are_told(measure: Measure) -> None:
    request, outcome = measure()
    seen = outcome.conditions
    assert outcome.status is RunStatus.OK
    assert seen is not None and outcome.load is not None
    assert seen.page_cache_resident_fraction is not None
    assert seen.page_cache_resident_fraction < COLD_RESIDENT_FRACTION
    assert (seen.memory_limit_bytes, seen.memory_limit_method) == (None, "none")
    assert seen.readings >= 2
    assert seen.memory_available_bytes.before is not None
    assert 0 < seen.cpu_s < 0.05 * seen.watched_s + 0.1
    assert judge(request, outcome.load, seen)[0] is Verdict.VALID


def test_a_limit_holds_and_what_it_does_not_hold_is_read_again(measure: Measure, group_limit: None) -> None:
    """A warm run of a container that does not fit: the page cache counts, so it is not warm, and is found out."""
    limit = 90 * MIB
    request, outcome = measure(page_cache="warm", reader="mmap", memory_limit_bytes=limit)
    free_request, free = measure(page_cache="warm", reader="mmap")
    for ended in (outcome, free):
        assert ended.status is RunStatus.OK, ended.reasons
        assert ended.conditions is not None and ended.load is not None and ended.totals is not None
    assert outcome.conditions.memory_limit_method.startswith("cgroup")
    assert outcome.conditions.memory_peak_source in ("memory.peak", "memory.max_usage_in_bytes")
    assert limit // 2 < outcome.conditions.memory_peak_bytes <= limit
    assert outcome.samples[0].tokens == free.samples[0].tokens
    assert outcome.conditions.page_cache_resident_fraction < 0.9
    verdict, reasons = judge(request, outcome.load, outcome.conditions)
    assert verdict is Verdict.SUSPECT
    assert "only" in reasons[0] and "resident" in reasons[0]
    assert judge(free_request, free.load, free.conditions) == (Verdict.VALID, ())
    if free.totals.storage_read_bytes:  # what lies in memory anyway is read by nobody
        read_again = outcome.totals.storage_read_bytes - outcome.load.container_bytes
        assert read_again > 8 * MIB


def test_what_does_not_fit_is_out_of_memory_by_its_own_count(measure: Measure, group_limit: None) -> None:
    _, outcome = measure(strategy="full-load", memory_limit_bytes=80 * MIB)
    assert outcome.status is RunStatus.OUT_OF_MEMORY
    assert "that it does not fit is an answer" in outcome.reasons[-1]
    assert outcome.conditions is not None
    assert outcome.conditions.memory_peak_bytes == pytest.approx(80 * MIB, rel=0.1)
    _, small = measure(strategy="naive-swap", memory_limit_bytes=80 * MIB)
    assert small.status is RunStatus.OK, small.reasons


def test_no_group_is_left_behind(measure: Measure, group_limit: None) -> None:
    measure(memory_limit_bytes=200 * MIB)
    left = subprocess.run(["find", "/sys/fs/cgroup", "-name", "edgemoe-farm-run-*"], capture_output=True, text=True)
    assert left.stdout == ""


def test_where_there_are_no_groups_the_process_is_limited(wide: Container, tmp_path: Path) -> None:
    """By RLIMIT_DATA, which the engine answers as a lack of memory, and not by dying of it."""
    for strategy, limit_bytes, status in (("full-load", 100 * MIB, 4), ("naive-swap", 160 * MIB, 0)):
        limit = MemoryLimit(limit_bytes, "none", root=str(tmp_path))
        assert limit.method == "rlimit-data"
        arguments = ["generate", wide.path, "--tokens", "5,6,7", "--max-new", "3", "--strategy", strategy]
        ended = subprocess.run(
            [sys.executable, "-m", "engine", *arguments, "--threads", "1"], preexec_fn=limit.enter,
            capture_output=True, text=True, timeout=200, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ended.returncode == status, ended.stderr
        if status == 0:
            assert json.loads(ended.stdout)["load"]["page_cache_resident_fraction"] is not None
        assert (limit.peak()[0] or 0) > 10 * MIB
