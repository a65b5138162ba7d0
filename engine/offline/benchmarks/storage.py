"""Times ways of reading expert-sized blocks from a file, cold, against the storage's sequential rate."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from engine.device import meters
from engine.errors import RequestError, StorageError
from engine.experts.lanes import ReadingLanes, new_slab
from engine.storage import WAYS

SEQUENTIAL_BLOCK_BYTES = 8 << 20
_PAGE_BYTES = 4096

Progress = Callable[[int, int], None]


def bench_storage(
    path: str,
    block_bytes: int,
    *,
    rounds: int = 3,
    seconds: float = 1.0,
    progress: Progress = lambda done, of: None,
) -> list[dict[str, Any]]:
    """Returns bytes a second of each way in which the engine reads experts, blocks in random order; a row each.

    In each round every method reads for `seconds` at most, after the file has left the page cache, and a sequential one
    past the cache comes first: what the others are divided by. Raises StorageError for a file that is too small or
    cannot be read past the cache.
    """
    if block_bytes < _PAGE_BYTES or block_bytes % _PAGE_BYTES:
        raise RequestError(f"a block of {block_bytes} bytes cannot be read directly: give a multiple of {_PAGE_BYTES}")
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}") from None
    offsets = list(range(0, size - block_bytes + 1, block_bytes))
    if len(offsets) < 8 or size < SEQUENTIAL_BLOCK_BYTES:
        raise RequestError(f"{path}: {size} bytes are too few; give a file of at least 8 blocks and 8 MiB")
    rates: dict[tuple[str, int], list[float]] = {method: [] for method in WAYS}
    sequential = []
    order = random.Random(0)  # noqa: S311 - the same blocks every time
    for nth in range(rounds):
        whole = list(range(0, size - SEQUENTIAL_BLOCK_BYTES + 1, SEQUENTIAL_BLOCK_BYTES))
        sequential.append(_rate(path, "direct", 1, SEQUENTIAL_BLOCK_BYTES, whole, seconds))
        for turn, (method, lanes) in enumerate(WAYS):
            progress(nth * len(WAYS) + turn, rounds * len(WAYS))
            shuffled = order.sample(offsets, len(offsets))
            rates[method, lanes].append(_rate(path, method, lanes, block_bytes, shuffled, seconds))
    reference = median(sequential)
    return [
        {
            "method": method,
            "block_bytes": block_bytes,
            "lanes": lanes,
            "bytes_per_s": median(found),
            "bytes_per_s_rounds": found,
            "sequential_direct_bytes_per_s": reference,
            "fraction_of_sequential_direct": median(found) / reference,
        }
        for (method, lanes), found in rates.items()
    ]


def _rate(path: str, method: str, lanes: int, block_bytes: int, offsets: list[int], seconds: float) -> float:
    """Returns bytes a second, cold, by the engine's own lanes."""
    meters.evict_from_page_cache(path)
    try:
        reading = ReadingLanes(path, reader=method, lanes=lanes, keep_cached=False)
        try:
            if reading.reader != method:
                raise OSError(None, f"O_DIRECT is refused ({reading.direct_refused})")
            slab = new_slab(block_bytes)
            done, start = 0, time.perf_counter()
            for offset in offsets:
                done += reading.read(slab.data, offset)
                if time.perf_counter() - start >= seconds:
                    break
            return done / (time.perf_counter() - start)
        finally:
            reading.close()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read by {method}: {error.strerror or error}") from None
