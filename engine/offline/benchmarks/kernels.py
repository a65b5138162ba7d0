"""Compares native kernels and decoding with numpy and with a plain read of memory, in turns, on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np

from engine.container import Container
from engine.experts.profile import PathProfile
from engine.generate import Engine
from engine.kernels import Kernels, NativeKernels
from engine.kernels.processor import NativeUnavailableError
from engine.protocol import ExpertBudget, Sampling
from engine.quantize import BITS, Expert, Format, MatrixShape, Packed, RecordLayout, group_size, in_rows
from engine.strategies import strategy_named

MEMORY_BYTES = 256 << 20  # that products walk over before they come back to the first: more than any cache
FORMATS = (
    Format("int8", 32, symmetric=False), Format("int4", 32, symmetric=False), Format("int3", 32, symmetric=False),
    Format("int2", 32, symmetric=False), Format("int8"), Format("int4", 64, symmetric=False), Format("bf16"),
    Format("fp32"),
)  # fmt: skip

Progress = Callable[[int, int], None]


def available_kernels(threads: int = 1) -> list[Kernels]:
    """Returns numpy's kernels, and the native ones if they work here. They must be closed."""
    try:
        return [Kernels(threads), NativeKernels(threads)]
    except NativeUnavailableError:
        return [Kernels(threads)]


def bench_kernels(
    rows: int,
    columns: int,
    batch: int,
    formats: Sequence[Format] = FORMATS,
    rounds: int = 9,
    threads: int = 1,
    progress: Progress = lambda done, of: None,
) -> list[dict[str, Any]]:
    """Times products of a (rows, columns) matrix with `batch` vectors; returns a row per format and backend.

    In each round every kernel computes once, on a copy of the matrix that is in no cache, and memory is read once.
    """
    kernels = available_kernels(threads)
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    x = random.standard_normal((batch, columns)).astype(np.float32)
    memory = np.ones(MEMORY_BYTES // 4, np.float32)
    results = []
    for done, fmt in enumerate(formats):
        progress(done, len(formats))
        layout = RecordLayout.of(fmt, [MatrixShape("w", rows, columns)])
        record = layout.pack({"w": weight})
        copies = [layout.unpack(record.copy()) for _ in range(max(2, min(64, -(-MEMORY_BYTES // record.nbytes))))]
        times: dict[str, list[float]] = {k.backend: [] for k in kernels}
        reads = []
        for nth in range(-1, rounds):
            reads.append(_timed(lambda: _read(kernels[-1], memory)))
            for kernel in kernels:
                copy = copies[nth % len(copies)]
                times[kernel.backend].append(_timed(lambda k=kernel, c=copy: k.product(_only(c), x)))  # type: ignore[misc]
        read_bytes_per_s = memory.nbytes / median(reads[1:])
        for kernel in kernels:
            seconds = median(times[kernel.backend][1:])
            results.append(
                {
                    "precision": fmt.precision,
                    "group": fmt.group,
                    "rows": rows,
                    "columns": columns,
                    "batch": batch,
                    "threads": threads,
                    "backend": kernel.backend,
                    "variant": kernel.variant,
                    "ms_median": seconds * 1e3,
                    "ms_least": min(times[kernel.backend][1:]) * 1e3,
                    "ms_most": max(times[kernel.backend][1:]) * 1e3,
                    "numpy_ratio": median(times["numpy"][1:]) / seconds,
                    "bytes_per_s": record.nbytes / seconds,
                    "dram_bytes_per_s": read_bytes_per_s,
                    "dram_fraction": record.nbytes / seconds / read_bytes_per_s,
                    "relative_error": relative_error(kernel, fmt, columns),
                }
            )
    progress(len(formats), len(formats))
    for kernel in kernels:
        kernel.close()
    return results


def relative_error(kernel: Kernels, fmt: Format, columns: int) -> float:
    """Returns a product's largest error relative to the largest result, with the packed weights in float64."""
    random = np.random.default_rng(1)
    layout = RecordLayout.of(fmt, [MatrixShape("w", 64, columns)])
    packed = layout.unpack(layout.pack({"w": random.standard_normal((64, columns)).astype(np.float32)}))["w"]
    exact = decoded(packed)
    x = random.standard_normal((1, columns)).astype(np.float32)
    expected = x.astype(np.float64) @ exact.T
    return float(np.abs(kernel.product(packed, x) - expected).max() / np.abs(expected).max())


def decoded(packed: Packed) -> np.ndarray:
    """Returns the weights that a packed matrix stands for, (rows, columns) float64."""
    codes = Kernels().expand(packed).astype(np.float64)  # (groups, size, padded rows)
    if packed.scales is not None:
        bits = BITS[packed.format.precision]
        size = group_size(packed.format, packed.columns)
        codes -= 0 if bits == 8 else 1 << (bits - 1)
        codes = codes.reshape(-1, size, codes.shape[-1])
        codes *= in_rows(packed.scales.astype(np.float64))[:, None]
        if packed.offsets is not None:
            codes += in_rows(packed.offsets.astype(np.float64))[:, None]
    flat = codes.reshape(-1, codes.shape[-1])
    return flat[: packed.columns, : packed.rows].T


def bench_decode(
    path: str,
    strategy: str,
    prompt: Sequence[int],
    *,
    budget: ExpertBudget | None = None,
    profile: PathProfile | None = None,
    rounds: int = 3,
    new_tokens: int = 32,
    threads: int = 1,
    progress: Progress = lambda done, of: None,
) -> dict[str, Any]:
    """Returns each backend's tokens a second, in turns, and where a token's time goes. Prompts are not counted.

    numpy's BLAS has as many threads as its environment says.
    """
    container = Container.open(path)
    backends = []
    for kernels in available_kernels():
        backends.append(kernels.backend)
        kernels.close()
    chosen = strategy_named(strategy)
    rates: dict[str, list[float]] = {backend: [] for backend in backends}
    stalls: dict[str, list[float]] = {backend: [] for backend in backends}
    with ExitStack() as stack:
        engines = {}
        for backend in backends:
            engines[backend] = Engine(
                container,
                chosen,
                expert_budget=budget if chosen.has_budget else None,
                profile=profile,
                backend=backend,
                threads=threads,
            )
            stack.callback(engines[backend].close)
        for nth in range(rounds + 1):
            for turn, backend in enumerate(backends[nth % len(backends) :] + backends[: nth % len(backends)]):
                progress(nth * len(backends) + turn, (rounds + 1) * len(backends))
                _, steps = engines[backend].generate(tuple(prompt), new_tokens, Sampling())
                if nth:  # the first round fills buffers
                    decoded_s = sum(steps.time_s[1:])
                    rates[backend].append((len(steps.time_s) - 1) / decoded_s)
                    stalls[backend].append(sum(steps.stall_s[1:]) / (len(steps.time_s) - 1))
        variants = {backend: engine.load_report(0.0, None).variant for backend, engine in engines.items()}
    per_token = {backend: 1 / median(found) for backend, found in rates.items()}
    return {
        "container": path,
        "strategy": strategy,
        "threads": threads,
        "backends": {
            backend: {
                "variant": variants[backend],
                "tokens_per_s": median(rates[backend]),
                "tokens_per_s_rounds": rates[backend],
                "stacked_s": {
                    "stall": median(stalls[backend]),
                    "arithmetic_and_interpreter": per_token[backend] - median(stalls[backend]),
                },
            }
            for backend in backends
        },
        "ratio": per_token["numpy"] / per_token[backends[-1]],
        "cores": os.cpu_count(),
    }


def _only(expert: Expert) -> Packed:
    (packed,) = expert.values()
    return packed


def _read(kernels: Kernels, memory: np.ndarray) -> None:
    if isinstance(kernels, NativeKernels):
        kernels.read_memory(memory)
    else:
        memory.sum()


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
