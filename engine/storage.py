"""Finds how experts are read best here: a probe of two seconds at most, kept beside the container.

Every reader with one lane and with two takes turns at reading blocks of a record's size, at random places of the
container that are not in the page cache, and leaves nothing there. The simplest of those that nothing beats beyond the
noise is chosen. What was measured holds for this file on this storage with this engine and for some time: until then
it costs nothing to ask again.
"""

from __future__ import annotations

import json
import os
import random
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from engine import __version__
from engine.codec import from_json, loads, to_json
from engine.container import Container
from engine.device import meters
from engine.errors import ProtocolError, StorageError
from engine.experts.lanes import ReadingLanes, new_slab
from engine.files import replacing
from engine.protocol import ReadingRate, RunRequest, StorageRates

# From the simplest on: one thread before two, past the page cache before through it.
WAYS = (("direct", 1), ("pread", 1), ("mmap", 1), ("direct", 2), ("pread", 2), ("mmap", 2))
AS_GOOD = 0.97  # of the fastest's rate: less is no reason for what is less simple
ROUNDS = 5
TURN_S = 0.05
MOST_S = 2.0  # after which no turn begins, once every way has had one
MOST_BLOCK_BYTES = 4 << 20  # a tenth of a second on an SD card; what is larger goes as fast
MOST_AGE_S = 7 * 86400.0  # flash fills up and wears, cards are copied
# Of the file beside the container. History: 1 first.
VERSION = 1
MAX_BYTES = 64 << 10


def choose_reading(
    container: Container, request: RunRequest, *, clock: Callable[[], float] = time.perf_counter
) -> Tuple[str, int, Optional[StorageRates]]:
    """Returns reader and lanes for a run, and how they were chosen; nothing if the request says the reader.

    Raises StorageError.
    """
    if request.reader != "auto":
        return request.reader, request.lanes or 1, None
    if request.emulated_read_bytes_per_s is not None:
        why = "the storage's rate is emulated: there is nothing to choose by"
        return _unprobed(request, why)
    if request.page_cache == "warm":
        # Experts are copied from memory, by pread with no fault a page; a second thread would take a core for that.
        return _unprobed(request, "the page cache is warm: experts do not come from the storage")
    rates = choose(storage_rates(container, clock=clock), request.lanes)
    return rates.reader, rates.lanes, rates


def storage_rates(
    container: Container,
    *,
    again: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    now: Callable[[], float] = time.time,
) -> StorageRates:
    """Returns a recent measurement of this container here, else (or with `again`) a new one. StorageError."""
    path = f"{container.path}.storage.json"
    key = _key(container)
    kept = None if again else _kept(path, key, now())
    if kept is not None:
        return kept
    rates = measure_storage(container, clock=clock)
    content = {"version": VERSION, "key": key, "measured_unix_s": now(), "rates": to_json(rates)}
    try:
        with replacing(path) as file:
            file.write(json.dumps(content, allow_nan=False).encode())
    except OSError:
        pass  # a folder that nobody may write into, or a full disk: the next run measures again
    return rates


def measure_storage(container: Container, *, clock: Callable[[], float] = time.perf_counter) -> StorageRates:
    """Reads for two seconds, less if the container is small. Leaves nothing in the page cache. StorageError."""
    block_bytes = min(container.largest_slot_bytes, MOST_BLOCK_BYTES)
    offsets = [
        record.offset + start
        for record in container.records
        for start in range(0, record.slot_bytes - block_bytes + 1, block_bytes)
    ]
    slab = new_slab(block_bytes)
    found: Dict[Tuple[str, int], List[float]] = {}
    order = random.Random(0)  # noqa: S311 - no secret depends on it
    refused: Optional[str] = None
    with ExitStack() as opened:
        ways: Dict[Tuple[str, int], ReadingLanes] = {}
        try:
            for reader, lanes in WAYS:
                if reader == "direct" and refused is not None:
                    continue
                way = ReadingLanes(container.path, reader=reader, lanes=lanes, keep_cached=False)
                opened.callback(way.close)
                refused = way.direct_refused or refused
                if way.reader == reader:
                    ways[reader, lanes] = way
            meters.evict_from_page_cache(container.path)
            start = clock()
            for _ in range(ROUNDS):
                for name in order.sample(list(ways), len(ways)):
                    if clock() - start > MOST_S and len(found) == len(ways):
                        break
                    found.setdefault(name, []).append(_turn(ways[name], slab.data, offsets, order, clock))
            meters.evict_from_page_cache(container.path)  # and what the kernel read ahead
        except (OSError, ValueError) as error:
            raise StorageError(f"{container.path}: the storage cannot be probed: {error}; check the storage") from None
    rates = tuple(ReadingRate(*name, float(np.median(turns)), min(turns), max(turns)) for name, turns in found.items())
    return choose(StorageRates("pread", 1, "", block_bytes, rates, refused))


def choose(measured: StorageRates, lanes: int = 0) -> StorageRates:
    """Returns the simplest way that nothing beats beyond the noise, of those with so many lanes (0: any)."""
    rates = {(rate.reader, rate.lanes): rate for rate in measured.rates if lanes in (0, rate.lanes)}
    fastest = max(rates.values(), key=lambda rate: rate.bytes_per_s)
    chosen = next(rates[way] for way in WAYS if way in rates and _as_good(rates[way], fastest))
    why = f"the fastest, {fastest.bytes_per_s / 1e6:.0f} MB/s"
    if chosen is not fastest:
        why = (
            f"{chosen.bytes_per_s / 1e6:.0f} MB/s: {fastest.reader}, lanes {fastest.lanes}, "
            f"{fastest.bytes_per_s / 1e6:.0f}, is no faster beyond the noise"
        )
    if measured.direct_refused is not None:
        why += f"; the storage refuses O_DIRECT ({measured.direct_refused})"
    return replace(measured, reader=chosen.reader, lanes=chosen.lanes, why=why)


def _as_good(rate: ReadingRate, fastest: ReadingRate) -> bool:
    return rate.bytes_per_s >= min(AS_GOOD * fastest.bytes_per_s, fastest.least_bytes_per_s)


def _turn(
    way: ReadingLanes, view: memoryview, offsets: List[int], order: random.Random, clock: Callable[[], float]
) -> float:
    """Returns bytes a second of blocks that no page cache holds: it is emptied before the time starts."""
    done, spent_s = 0, 0.0
    for _ in offsets:
        offset = order.choice(offsets)
        way.forget(offset, len(view))
        start = clock()
        done += way.read(view, offset)
        spent_s += clock() - start
        if spent_s >= TURN_S:
            break
    return done / max(spent_s, 1e-9)


def _unprobed(request: RunRequest, why: str) -> Tuple[str, int, StorageRates]:
    chosen = StorageRates("pread", request.lanes or 1, why)
    return chosen.reader, chosen.lanes, chosen


def _key(container: Container) -> Dict[str, Any]:
    """Returns what must be the same for a measurement to hold."""
    device = os.stat(container.path).st_dev
    return {"device": device, "bytes": container.file_bytes, "kernel": os.uname().release, "engine": __version__}


def _kept(path: str, key: Dict[str, Any], now_s: float) -> Optional[StorageRates]:
    """Returns the kept measurement; None for a file that is missing, damaged, of something else, or too old."""
    try:
        with open(path, "rb") as file:
            content = loads(file.read(MAX_BYTES))
        age_s = now_s - float(content["measured_unix_s"])
        if content["version"] != VERSION or content["key"] != key or not 0 <= age_s <= MOST_AGE_S:
            return None
        kept = from_json(StorageRates, content["rates"])
        known = {(rate.reader, rate.lanes) for rate in kept.rates}
        if known != {way for way in WAYS if kept.direct_refused is None or way[0] != "direct"}:
            return None
        return choose(replace(kept, age_s=age_s))
    except (OSError, ProtocolError, KeyError, TypeError, ValueError):
        return None
