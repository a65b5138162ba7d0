"""Reading in one lane and in two, and the probe that chooses: by what is read and recorded, never by how fast."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import storage
from engine.container import Container
from engine.experts.lanes import ReadingLanes, new_slab
from engine.experts.profile import PathProfile
from engine.generate import Engine, run
from engine.protocol import READERS, ExpertBudget, Load, ReadingRate, RunRequest, Sampling, StorageRates
from engine.storage import WAYS, choose, choose_reading, measure_storage, storage_rates
from engine.strategies import STRATEGIES

PROMPT = (1, 17, 5, 80, 33)


@pytest.fixture
def short_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the records of a small model, too, are read by two threads."""
    monkeypatch.setattr("engine.experts.lanes.LEAST_LANE_BYTES", 4096)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("keep_cached", [True, False])
def test_every_way_reads_the_same(tmp_path: Path, reader: str, lanes: int, keep_cached: bool) -> None:
    content = np.frombuffer(random.Random(0).randbytes(1 << 20), np.uint8)
    (tmp_path / "f").write_bytes(content.tobytes())
    reading = ReadingLanes(str(tmp_path / "f"), reader=reader, lanes=lanes, keep_cached=keep_cached)
    try:
        for offset, size in ((0, 1 << 20), (16384, 16384), (65536, 9 * 16384), (0, 2 * 65536)):
            slab = new_slab(size)
            assert reading.read(slab.data, offset) == size
            assert np.array_equal(slab, content[offset : offset + size])
    finally:
        reading.close()


@pytest.mark.usefixtures("short_lanes")
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("strategy", ["naive-swap", "edgemoe", "edgemoe-dequantised", "sti"])
def test_random_timing_of_each_lane_changes_no_token(
    container: Container, profile: PathProfile, strategy: str, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(container, profile, "full-load", None, 1)
    chunk, chooser, readers = ReadingLanes._chunk, random.Random(lanes), set()

    def unsteady(self: ReadingLanes, *arguments: Any) -> int:
        readers.add(threading.current_thread().name)
        if chooser.random() < 0.2:
            time.sleep(chooser.random() * 1e-3)
        return chunk(self, *arguments)

    monkeypatch.setattr(ReadingLanes, "_chunk", unsteady)
    monkeypatch.setattr("engine.experts.lanes.MOST_CHUNK_BYTES", 2048)  # speculative reads are broken off in between
    for budget in (2, 5, 9) if STRATEGIES[strategy].has_budget else (None,):
        assert generate(container, profile, strategy, budget, lanes) == expected
    assert ("experts-2" in readers) == (lanes == 2)
    assert "experts-2" not in {thread.name for thread in threading.enumerate()}


def generate(
    container: Container, profile: PathProfile, strategy: str, budget: int | None, lanes: int
) -> tuple[int, ...]:
    engine = Engine(
        container, STRATEGIES[strategy], profile=profile, lanes=lanes,
        expert_budget=None if budget is None else ExpertBudget(experts=budget),
    )  # fmt: skip
    try:
        tokens, _ = engine.generate(PROMPT, 12, Sampling())
        buffer = engine.supply.buffer
        assert buffer.budget_bytes is None or buffer.held_bytes <= buffer.budget_bytes
        return tokens
    finally:
        engine.close()


@pytest.mark.parametrize("failing", ["experts-2", "MainThread"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "injected"), ValueError("injected")], ids=["storage", "bug"])
def test_a_failure_in_either_lane_is_told_when_both_have_ended(
    tmp_path: Path, failing: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    chunk, ended = ReadingLanes._chunk, []

    def fail(self: ReadingLanes, *arguments: Any) -> int:
        if threading.current_thread().name == failing:
            raise error
        time.sleep(0.01)
        ended.append(chunk(self, *arguments))
        return ended[-1]

    reading = ReadingLanes(str(tmp_path / "f"), reader="pread", lanes=2)
    monkeypatch.setattr(ReadingLanes, "_chunk", fail)
    try:
        for _ in range(2):  # the next block does not get the answer to this one
            ended.clear()
            with pytest.raises((OSError, ValueError), match="injected"):
                reading.read(new_slab(1 << 20).data, 0)
            assert ended == [1 << 19]
        monkeypatch.setattr(ReadingLanes, "_chunk", chunk)
        assert reading.read(new_slab(1 << 20).data, 0) == 1 << 20
    finally:
        reading.close()


@pytest.mark.parametrize("lanes", [1, 2])
def test_emulated_storage_is_one_however_many_lanes_ask(tmp_path: Path, lanes: int) -> None:
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    slept: list[float] = []
    reading = ReadingLanes(
        str(tmp_path / "f"), reader="pread", lanes=lanes, bytes_per_s=1e6, clock=lambda: 0.0, sleep=slept.append
    )
    try:
        for _ in range(3):
            reading.read(new_slab(1 << 20).data, 0)
    finally:
        reading.close()
    # The clock stands still: whoever asked last waits for all that was ever asked of the storage.
    assert max(slept) == pytest.approx(3 * (1 << 20) / 1e6)
    assert len(slept) == 3 * lanes


@pytest.mark.parametrize("when", ["open", "read"])
def test_where_o_direct_is_refused_the_probe_does_without_and_says_so(
    container: Container, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(monkeypatch, when)
    rates = measure_storage(container)
    assert {(rate.reader, rate.lanes) for rate in rates.rates} == {way for way in WAYS if way[0] != "direct"}
    assert rates.direct_refused == "Invalid argument"
    assert "refuses O_DIRECT (Invalid argument)" in rates.why
    assert rates.reader != "direct"
    engine = Engine(container, STRATEGIES["naive-swap"], reader="direct")
    try:
        assert engine.reader == "pread"
        assert "Invalid argument" in engine.load_report(0.0, None).warnings[-1]
    finally:
        engine.close()


def refuse_direct(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    opened, read, direct = os.open, os.preadv, set()

    def open_(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & os.O_DIRECT and when == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        file = opened(path, flags & ~os.O_DIRECT, *arguments, **named)
        (direct.add if flags & os.O_DIRECT else direct.discard)(file)
        return file

    def preadv(file: int, *arguments: Any) -> int:
        if file in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(file, *arguments)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)


def mount(*command: str) -> int:
    return subprocess.run(command, check=False, capture_output=True).returncode


@pytest.fixture
def file_system_without_o_direct(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "ramfs"
    folder.mkdir()
    if os.geteuid() != 0 or mount("mount", "-t", "ramfs", "ramfs", str(folder)):
        pytest.skip("needs root, to mount a file system that refuses O_DIRECT")
    yield folder
    mount("umount", str(folder))


def test_a_file_system_that_refuses_o_direct_for_real(container: Container, file_system_without_o_direct: Path) -> None:
    copy = file_system_without_o_direct / "m.emoe"
    copy.write_bytes(Path(container.path).read_bytes())
    rates = measure_storage(Container.open(str(copy)))
    assert rates.direct_refused
    assert rates.reader in ("pread", "mmap")


def rates_of(**of: tuple[float, float, float]) -> StorageRates:
    """direct_1=(least, median, most) and so on."""
    rates = []
    for name, (least, middle, most) in of.items():
        reader, lanes = name.split("_")
        rates.append(ReadingRate(reader, int(lanes), middle, least, most))
    return StorageRates("pread", 1, "", 1, tuple(rates))


@pytest.mark.parametrize(
    ("measured", "lanes", "expected"),
    [
        ({"direct_1": (9, 10, 11), "pread_1": (4, 5, 6), "direct_2": (9, 10.2, 11)}, 0, ("direct", 1)),  # a tie
        ({"direct_1": (9, 10, 11), "direct_2": (14, 15, 16)}, 0, ("direct", 2)),
        ({"direct_1": (9, 10, 11), "direct_2": (14, 15, 16)}, 1, ("direct", 1)),  # one lane was asked for
        ({"direct_1": (9, 10, 11), "direct_2": (8, 15, 16)}, 0, ("direct", 1)),  # faster, but within the noise
        ({"direct_1": (9, 10, 11), "pread_1": (10, 10.2, 11), "mmap_2": (1, 2, 3)}, 0, ("direct", 1)),
        ({"direct_1": (4, 5, 6), "mmap_1": (8, 9, 10), "pread_2": (8, 9, 10)}, 0, ("mmap", 1)),
    ],
)
def test_the_simplest_is_chosen_that_nothing_beats_beyond_the_noise(
    measured: dict[str, tuple[float, float, float]], lanes: int, expected: tuple[str, int]
) -> None:
    chosen = choose(rates_of(**measured), lanes)
    assert (chosen.reader, chosen.lanes) == expected
    assert chosen.bytes_per_s == measured["{}_{}".format(*expected)][1]
    assert chosen.why


def test_a_probe_ends_after_two_seconds_once_every_way_has_had_a_turn(container: Container) -> None:
    now = iter(range(10**6))
    rates = measure_storage(container, clock=lambda: float(next(now)))  # a second at each look at the clock
    assert {(rate.reader, rate.lanes) for rate in rates.rates} == set(WAYS)
    assert all(rate.least_bytes_per_s == rate.most_bytes_per_s for rate in rates.rates)


def test_what_was_measured_is_kept_for_this_file_and_some_time(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Path(f"{container.path}.storage.json")
    kept.unlink(missing_ok=True)
    measured: list[Container] = []
    measure = storage.measure_storage

    def count(container: Container, **options: Any) -> StorageRates:
        measured.append(container)
        return measure(container, **options)

    monkeypatch.setattr(storage, "measure_storage", count)
    first = storage_rates(container, now=lambda: 1e9)
    assert storage_rates(container, now=lambda: 1e9 + 60) == dataclasses.replace(first, age_s=60.0)
    assert len(measured) == 1
    later: list[Callable[[], Any]] = [
        lambda: storage_rates(container, now=lambda: 1e9 + 30 * 86400),
        lambda: storage_rates(container, now=lambda: 1e9 - 60),  # a clock that was wrong
        lambda: storage_rates(container, again=True),
        lambda: storage_rates(dataclasses.replace(container, file_bytes=1)),
    ]
    for number, ask in enumerate(later):
        ask()
        assert len(measured) == 2 + number
    content = json.loads(kept.read_text())
    for damage in (b"", b"\xff\x00", b"[]", json.dumps({**content, "rates": {}}).encode(), b"{" * 5000):
        kept.write_bytes(damage)
        before = len(measured)
        storage_rates(container)
        assert len(measured) == before + 1
    assert not list(kept.parent.glob(f".{kept.name}*"))


def request_for(container: Container, **changes: Any) -> RunRequest:
    return dataclasses.replace(RunRequest("r", container.path, "naive-swap", (PROMPT,), 3), **changes)


def test_a_run_records_how_its_reader_was_chosen(container: Container) -> None:
    loads: list[Load] = []
    run(request_for(container), lambda event, **content: loads.append(content["load"]) if event == "loaded" else None)
    (load,) = loads
    assert load.storage is not None
    assert (load.storage.reader, load.storage.lanes) == (load.reader, load.lanes)
    assert len(load.storage.rates) >= 4
    assert load.warnings == () or "O_DIRECT" not in "".join(load.warnings)
    assert load.page_cache_resident_fraction == 0.0  # the probe leaves nothing there


def test_nothing_is_probed_where_the_storage_is_not_read_or_the_reader_was_said(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "storage_rates", None)
    assert choose_reading(container, request_for(container, reader="mmap", lanes=2)) == ("mmap", 2, None)
    assert choose_reading(container, request_for(container, reader="direct")) == ("direct", 1, None)
    for changes, why in (({"page_cache": "warm"}, "warm"), ({"emulated_read_bytes_per_s": 1e6}, "emulated")):
        reader, lanes, chosen = choose_reading(container, request_for(container, **changes))
        assert (reader, lanes) == ("pread", 1)
        assert chosen is not None
        assert why in chosen.why
