"""Ways of reading expert-sized blocks from a file, cold, against the storage's sequential rate."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from engine import meters
from engine.errors import RequestError, StorageError
from engine.experts.store import new_slab

SEQUENTIAL_BLOCK_BYTES = 8 << 20
METHODS = (("direct", 1), ("direct", 2), ("pread", 1), ("pread", 2), ("mmap", 1), ("mmap", 2))
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
    """Bytes a second of each method and number of lanes (threads), blocks in random order; a row each.

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
    rates: dict[tuple[str, int], list[float]] = {method: [] for method in METHODS}
    sequential = []
    order = random.Random(0)  # noqa: S311 - the same blocks every time
    for nth in range(rounds):
        whole = list(range(0, size - SEQUENTIAL_BLOCK_BYTES + 1, SEQUENTIAL_BLOCK_BYTES))
        sequential.append(_rate(path, "direct", 1, SEQUENTIAL_BLOCK_BYTES, whole, seconds))
        for turn, (method, lanes) in enumerate(METHODS):
            progress(nth * len(METHODS) + turn, rounds * len(METHODS))
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
    """Bytes a second, cold. Each lane takes the next block that nobody has taken."""
    meters.evict_from_page_cache(path)
    waiting, done, lock = iter(offsets), [0] * lanes, threading.Lock()
    failures: list[OSError] = []

    def lane(number: int) -> None:
        try:
            with _reader(path, method) as read:
                slab = new_slab(block_bytes)
                while time.perf_counter() < end:
                    with lock:
                        offset = next(waiting, None)
                    if offset is None:
                        return
                    read(slab.data, offset)
                    done[number] += block_bytes
        except OSError as error:
            failures.append(error)

    start = time.perf_counter()
    end = start + seconds
    threads = [threading.Thread(target=lane, args=(number,)) for number in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise StorageError(f"{path}: cannot be read by {method}: {failures[0].strerror or failures[0]}")
    return sum(done) / (time.perf_counter() - start)


@contextlib.contextmanager
def _reader(path: str, method: str) -> Iterator[Callable[[memoryview, int], None]]:
    """read(into, offset) by one of the engine's readers."""
    file = os.open(path, os.O_RDONLY | (os.O_DIRECT if method == "direct" else 0))
    try:
        if method == "mmap":
            with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as mapped:

                def copy(into: memoryview, offset: int) -> None:
                    into[:] = mapped[offset : offset + len(into)]

                yield copy
            return

        def positioned(into: memoryview, offset: int) -> None:
            got = 0
            while got < len(into):
                more = os.preadv(file, [into[got:]], offset + got)
                if more <= 0:
                    raise OSError(None, "the file became shorter while it was read")
                got += more

        yield positioned
    finally:
        os.close(file)
