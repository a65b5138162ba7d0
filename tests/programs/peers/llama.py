"""llama.cpp in a process of its own: decodes as it is asked on standard input, and prints what each token cost.

echo '{"model": "model.gguf", "prompt": [5, 6, 7], "new": 16, "threads": 1}' | python -m tests.programs.peers.llama
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import json
import os
import resource
import sys
import time
import types
from typing import Any

import numpy as np

LOAD_MODES = {"mmap": 1, "read": 0}  # enum llama_load_mode


@functools.cache
def library() -> Any:
    """llama.cpp's C interface; the package around it is not imported, which would cost memory that is under a limit."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise SystemExit("llama-cpp-python is not installed here: run this through ci/peers")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["llama_cpp"] = package
    llama = importlib.import_module("llama_cpp.llama_cpp")
    llama.silence = llama.llama_log_callback(lambda *_: None)  # kept, since C holds no reference
    llama.llama_log_set(llama.silence, None)
    return llama


class Session:
    """A model and a context for one sequence."""

    def __init__(self, path: str, *, threads: int, positions: int, batch: int, load_mode: str, repack: bool) -> None:
        self._llama = llama = library()
        llama.llama_backend_init()
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mode = LOAD_MODES[load_mode]
        parameters.use_extra_bufts = repack
        self._model = llama.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        context = llama.llama_context_default_params()
        context.n_ctx = positions
        context.n_batch = context.n_ubatch = batch
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        self._context = llama.llama_init_from_model(self._model, context)
        if not self._context:
            raise SystemExit(f"{path}: llama.cpp cannot make a context of {positions} positions")
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(vocab,) after these tokens, which follow what was given before; valid until the next call."""
        llama = self._llama
        ids = (ctypes.c_int32 * len(tokens))(*tokens)  # which the batch points to
        status = llama.llama_decode(self._context, llama.llama_batch_get_one(ids, len(tokens)))
        if status:
            raise SystemExit(f"llama.cpp cannot decode: status {status}")
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, -1), (self._vocab,))

    def restart(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and their times, and -ln of the probability of a passage's continuation where one is given."""
    base_bytes = _resident_bytes()
    passage = request.get("passage")
    prompt, new = request["prompt"], request["new"]
    start = time.perf_counter()
    session = Session(
        request["model"],
        threads=request["threads"],
        positions=max(256, len(prompt) + new, 0 if passage is None else sum(map(len, passage))),
        batch=max(len(prompt), 64, 0 if passage is None else len(passage[0])),
        load_mode=request.get("load_mode", "mmap"),
        repack=request.get("repack", True),
    )
    load_s = time.perf_counter() - start
    tokens: list[int] = []
    times: list[float] = []
    fed = prompt
    for _ in range(new):
        start = time.perf_counter()
        token = int(session.logits(fed).argmax())
        times.append(time.perf_counter() - start)
        tokens.append(token)
        fed = [token]
    nats = None
    if passage is not None:
        session.restart()
        nats, fed = 0.0, passage[0]
        for token in passage[1]:
            row = session.logits(fed).astype(np.float64)
            nats -= float(row[token] - row.max() - np.log(np.exp(row - row.max()).sum()))
            fed = [token]
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens": tokens, "time_s": times, "load_s": load_s, "base_bytes": base_bytes, "peak_bytes": peak_bytes,
            "nats": nats}  # fmt: skip


def _resident_bytes() -> int:
    library()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
