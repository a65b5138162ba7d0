"""Emulated storage against the device that it stands for, on a clock whose threads wake up late."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from engine.container import Container
from engine.experts.lanes import EmulatedStorage, ReadingLanes, new_slab
from engine.experts.profile import PathProfile
from engine.experts.store import ExpertStore
from engine.generate import Engine
from engine.protocol import Sampling
from engine.strategies import STRATEGIES

BLOCK = 1 << 18
READS = 200


class LateClock:
    """Passes as threads sleep, each of which wakes up late by up to `late_s`."""

    def __init__(self, late_s: float, seed: int) -> None:
        self.now = 0.0
        self._late_s, self._chooser, self._lock = late_s, random.Random(seed), threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds + self._chooser.uniform(0, self._late_s)


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(bytes(BLOCK))
    return tmp_path / "f"


@pytest.mark.parametrize("rate", [43e6, 200e6, 800e6])
@pytest.mark.parametrize("late_s", [0.0, 60e-6, 0.5e-3, 2e-3])
@pytest.mark.parametrize("gap_s", [0.0, 0.15e-3, 0.9e-3, 1.1e-3, 10e-3])
@pytest.mark.parametrize("lanes", [1, 2])
def test_reads_take_as_long_as_on_a_device_that_serves_one_at_a_time(
    blocks: Path, lanes: int, gap_s: float, late_s: float, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.experts.lanes.time.perf_counter", lambda: 0.0)  # real reads take none of this time
    clock = LateClock(late_s, seed=lanes)
    reading = ReadingLanes(str(blocks), reader="pread", lanes=lanes, bytes_per_s=rate, clock=clock, sleep=clock.sleep)
    slab = new_slab(BLOCK)
    try:
        for _ in range(READS):
            reading.read(slab.data, 0)
            clock.now += gap_s  # what is computed between two reads
        assert reading.emulated is not None
        achieved = reading.emulated.achieved_bytes_per_s
    finally:
        reading.close()
    expected = READS * (BLOCK / rate + gap_s)
    # What comes after a late thread makes up for it as far as it waits at all.
    assert expected * (1 - 1e-9) <= clock.now <= expected * 1.01 + 2 * late_s
    assert achieved == pytest.approx(rate)


def test_a_thread_that_was_late_for_nobody_has_not_asked_earlier() -> None:
    now = [0.0]
    storage = EmulatedStorage(1e6, clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s + 0.5))
    storage.take_time(1_000_000, storage.asked(), 0.0)
    storage.answered()
    assert (now[0], storage.asked()) == (1.5, 1.0)
    storage.forgive()
    assert storage.asked() == 1.5


def test_emulated_storage_is_never_faster_than_the_real_one_and_owns_up_to_it() -> None:
    now = [0.0]
    storage = EmulatedStorage(1e6, clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    for _ in range(3):
        asked = storage.asked()
        now[0] += 2.0  # the real read, of what the device would serve in 1 s
        storage.take_time(1_000_000, asked, 2.0)
        storage.answered()
    assert now[0] == 6.0
    assert storage.achieved_bytes_per_s == pytest.approx(0.5e6)
    asked = storage.asked()
    storage.take_time(1_000_000, asked, 0.0)
    assert now[0] == 7.0, "what the real storage was slower by is not made up for"


@pytest.mark.parametrize("strategy", ["naive-swap", "edgemoe"])
def test_who_was_not_waited_for_is_told_to_the_storage(
    container: Container, profile: PathProfile, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A naive swap waits for every read, and the reads of a preloader are waited for by nobody."""
    told: list[bool] = []
    monkeypatch.setattr(ExpertStore, "nobody_waited", lambda self: told.append(True))
    engine = Engine(container, STRATEGIES[strategy], profile=profile)
    try:
        engine.generate((1, 17, 5), 16, Sampling())
    finally:
        engine.close()
    assert (len(told) > 1) == (strategy == "edgemoe")


def test_a_real_naive_swap_takes_bytes_over_rate_and_its_arithmetic(container: Container) -> None:
    """At a rate at which the bytes take far longer than all else; within a tenth, for a machine that is busy."""
    engine = Engine(container, STRATEGIES["naive-swap"], emulated_read_bytes_per_s=2e6)
    try:
        began = time.perf_counter()
        _, steps = engine.generate((1, 17, 5), 4, Sampling())
        took_s = time.perf_counter() - began
        assert took_s >= sum(steps.read_bytes) / 2e6 * 0.999
        assert engine.achieved_bytes_per_s is not None
        assert engine.achieved_bytes_per_s <= 2e6 * 1.001
    finally:
        engine.close()
