"""Calls native.c, as built by ci/build-kernels, through ctypes, after a check against numpy."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from engine.kernels.processor import NativeUnavailableError, fitting_variants
from engine.kernels.reference import Kernels
from engine.quantize import (
    BITS,
    BLOCK,
    FLOATS,
    Expert,
    Format,
    MatrixShape,
    Packed,
    RecordLayout,
    as_float32,
    group_size,
    int8_rows,
)

if TYPE_CHECKING:
    from engine.models.layers import KeyValueCache, RotaryEmbedding

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lib")

_PRECISIONS = {name: number for number, name in enumerate(("int8", "int4", "int3", "int2", "fp32", "fp16", "bf16"))}
_ROWS = {"<f4": 7, "<f2": 8, "<u2": 9}  # (rows, columns) in a float format, by numpy's dtype
_MOST_EXPERTS = 16  # in a call
_LINE = 64  # bytes of a line of the cache
_BLAS_ROWS = 16  # of x, from which on expanding the matrix for BLAS is faster
AWAKE_S = 150e-6  # that a worker looks for work: longer than the interpreter needs between two products
_LOOKS_TIMED = 2000
_AGREEMENT = 3e-4  # largest error of the self-test, relative to the largest result


class _Matrix(ctypes.Structure):
    """Mirrors `matrix` in native.c."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("precision", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("group", ctypes.c_int32),
    ]


class HeldMatrix:
    """Holds a matrix of the non-experts as native.c takes it: (rows, columns) in a float format, or packed."""

    def __init__(self, stored: Union[np.ndarray, Packed]) -> None:
        if isinstance(stored, Packed):
            self.stored: Union[np.ndarray, Packed] = stored
            self.rows, self.columns = stored.rows, stored.columns
            self.matrix = _matrix(stored)
            self.nbytes = sum(array.nbytes for array in (stored.codes, stored.scales) if array is not None)
        else:
            self.stored = stored = np.ascontiguousarray(stored)
            self.rows, self.columns = stored.shape
            precision = _ROWS[stored.dtype.str]
            self.matrix = _Matrix(stored.ctypes.data, None, None, None, precision, self.rows, self.columns, 0)
            self.nbytes = stored.nbytes
        self.address = ctypes.addressof(self.matrix)


class NativeKernels(Kernels):
    """Computes in C, on `threads` threads and without the interpreter's lock. Must be closed.

    Raises NativeUnavailableError where there is none. Experts that were expanded beforehand stay with numpy: packed
    ones are faster here.
    """

    backend = "native"

    def __init__(self, threads: int = 1, folder: Optional[str] = None) -> None:
        super().__init__(threads)
        reasons = []
        for name in fitting_variants():
            path = os.path.join(FOLDER if folder is None else folder, name + ".so")
            try:
                self._library = library = _declare(ctypes.CDLL(path))
            except (OSError, AttributeError) as error:  # AttributeError: a function is missing
                reasons.append(f"{path} cannot be loaded: {error}")
                continue
            self._pool = _Pool(library, 1)
            self._memory = np.empty(0, np.uint8)
            self._calls = (_ExpertCall * _MOST_EXPERTS)()
            error_found = self._self_test()
            if error_found < _AGREEMENT:
                self.variant = name
                self._pool = _Pool(library, threads)
                return
            reasons.append(f"{name} is {error_found:.1e} off numpy's results on this processor")
        raise NativeUnavailableError("; ".join(reasons))

    def close(self) -> None:
        self._pool.close()

    def swiglu(self, expert: Dict[str, Packed], x: np.ndarray) -> np.ndarray:
        if expert["gate"].expanded:
            return super().swiglu(expert, x)
        return self._expert(_prepared(expert, ("gate", "up", "down")), x)

    def relu_ffn(self, expert: Dict[str, Packed], x: np.ndarray) -> np.ndarray:
        if expert["wi"].expanded:
            return super().relu_ffn(expert, x)
        return self._expert(_prepared(expert, ("wi", "wo")), x)

    def begin_layer(
        self, layer: DecoderLayer, token: TokenMemory, cache: KeyValueCache, rotary: RotaryEmbedding, position: int
    ) -> None:
        """token.x goes through the attention block at `position`; then `normed`, `logits`, `chosen` and `shares` are
        what the router makes of it."""
        _require(layer.hidden == token.hidden and layer.experts == token.experts and layer.top_k == token.top_k)
        _require(0 <= position < cache.positions)
        self._library.begin_layer(
            self._pool.address, layer.address, token.address, *cache.addresses, *rotary.addresses, cache.positions,
            position, self._memory_for(layer.memory_bytes(self._library, cache.positions)),
        )  # fmt: skip

    def experts_of_token(
        self,
        layer: DecoderLayer,
        token: TokenMemory,
        experts: Sequence[Dict[str, Packed]],
        places: Sequence[int],
        last: bool,
    ) -> None:
        """Writes SwiGLU experts, times their shares, to their places in token.outputs.

        With the `last` of a layer, x gains them all.
        """
        hidden = token.hidden
        _require(layer.hidden == hidden and all(0 <= place < token.top_k for place in places))
        for start in range(0, len(experts), _MOST_EXPERTS):
            part = experts[start : start + _MOST_EXPERTS]
            for call, expert, place in zip(self._calls, part, places[start:]):
                prepared = _prepared(expert, ("gate", "up", "down"))
                _require(prepared.columns == prepared.rows == hidden)
                call.matrices, call.x, call.n = prepared.address, token.normed_address, 1
                call.shares, call.y = token.shares_address + 4 * place, token.outputs_address + 4 * place * hidden
            calls = ctypes.addressof(self._calls)
            memory = self._memory_for(self._library.experts_memory(calls, len(part)))
            self._library.experts_of_token(
                self._pool.address, layer.address, token.address, calls, len(part),
                last and start + len(part) == len(experts), memory,
            )  # fmt: skip

    def _expert(self, prepared: _Prepared, x: np.ndarray) -> np.ndarray:
        x = _vectors(x, prepared.columns)
        result = np.empty((len(x), prepared.rows), np.float32)
        call = self._calls[0]
        call.matrices, call.x, call.n = prepared.address, x.ctypes.data, len(x)
        call.shares, call.y = None, result.ctypes.data
        self._run_experts(1, prepared.count)
        return result

    def _run_experts(self, count: int, matrices: int) -> None:
        calls = ctypes.addressof(self._calls)
        memory = self._memory_for(self._library.experts_memory(calls, count))
        self._library.experts(self._pool.address, calls, count, matrices, memory)

    def product(self, weight: Packed, x: np.ndarray) -> np.ndarray:
        if weight.expanded:
            return super().product(weight, x)
        return self._product(_matrix(weight), x)

    def hold(self, stored: Union[np.ndarray, Packed]) -> HeldMatrix:
        return HeldMatrix(stored)

    def rows(self, weight: HeldMatrix, numbers: np.ndarray) -> np.ndarray:
        if isinstance(weight.stored, Packed):
            return int8_rows(weight.stored, numbers)
        return as_float32(weight.stored[numbers])

    def linear(self, weight: HeldMatrix, x: np.ndarray) -> np.ndarray:
        if len(x) >= _BLAS_ROWS and not isinstance(weight.stored, Packed):
            return x @ as_float32(weight.stored).T
        return self._product(weight.matrix, x)

    def _product(self, matrix: _Matrix, x: np.ndarray) -> np.ndarray:
        x = _vectors(x, matrix.columns)
        result = np.empty((len(x), matrix.rows), np.float32)
        address = ctypes.addressof(matrix)
        memory = self._memory_for(self._library.product_memory(address, len(x)))
        self._library.product(self._pool.address, address, x.ctypes.data, result.ctypes.data, len(x), memory)
        return result

    def normed_linear(
        self, norm: np.ndarray, eps: float, weight: HeldMatrix, x: np.ndarray
    ) -> Tuple[np.ndarray, np.ndarray]:
        """Returns the RMS norm (1, hidden) of x (1, hidden), and logits (1, rows) of that."""
        _require(x.shape == (1, weight.columns) and len(norm) == weight.columns)
        _require(x.flags.c_contiguous and x.dtype == norm.dtype == np.float32)
        normed, logits = np.empty_like(x), np.empty((1, weight.rows), np.float32)
        memory = self._memory_for(self._library.product_memory(weight.address, 1))
        self._library.normed_product(
            self._pool.address, norm.ctypes.data, eps, weight.address, x.ctypes.data, normed.ctypes.data,
            logits.ctypes.data, memory,
        )  # fmt: skip
        return normed, logits

    def route(self, logits: np.ndarray, k: int) -> Tuple[np.ndarray, np.ndarray]:
        """Returns what engine.models.layers.route_top_k does, (1, k) each, for one token's logits (1, experts)."""
        _require(logits.flags.c_contiguous and logits.dtype == np.float32 and 0 < k <= logits.size == logits.shape[1])
        chosen, shares = np.empty((1, k), np.int64), np.empty((1, k), np.float32)
        self._library.route(logits.ctypes.data, logits.size, k, chosen.ctypes.data, shares.ctypes.data)
        return chosen, shares

    def read_memory(self, values: np.ndarray) -> float:
        """Returns the sum of float32 values, read once in blocks of 4 KiB: products are measured against this."""
        _require(values.dtype == np.float32 and values.flags.c_contiguous and values.size % 1024 == 0)
        sums = np.empty(values.size // 1024, np.float32)
        self._library.read_memory(self._pool.address, values.ctypes.data, len(sums), sums.ctypes.data)
        return float(sums.sum())

    def _memory_for(self, size: int) -> int:
        """Returns the address of at least so many bytes, the same ones every time."""
        if self._memory.nbytes < size + _LINE:
            self._memory = np.empty(size + _LINE, np.uint8)
            self._memory_address = self._memory.ctypes.data + -self._memory.ctypes.data % _LINE
        return self._memory_address

    def _self_test(self) -> float:
        """Returns the largest relative error against numpy: all precisions, odd sizes, both kinds of experts."""
        worst = 0.0
        for expert, x, expected in _known_results():
            ours = self.swiglu(expert, x) if "gate" in expert else self.relu_ffn(expert, x)
            error = float(np.abs(ours - expected).max() / np.abs(expected).max())
            worst = error if not error <= worst else worst  # also where it is not a number
        return worst


@functools.lru_cache(maxsize=1)
def _known_results() -> List[Tuple[Expert, np.ndarray, np.ndarray]]:
    """Returns experts, their inputs, and numpy's results; made once, because packing takes longest."""
    reference = Kernels()
    # Any numbers between -1 and 1 do, and numpy.random takes longer to import than all of this.
    numbers = np.sin(np.arange(1.0, 3 * 45 * 70 + 1) ** 2).astype(np.float32)
    x = numbers[:140].reshape(2, 70)
    known: List[Tuple[Expert, np.ndarray, np.ndarray]] = []
    shapes = [MatrixShape("gate", 45, 70), MatrixShape("up", 45, 70), MatrixShape("down", 70, 45)]
    weights = {s.name: w.reshape(s.rows, s.columns) for s, w in zip(shapes, np.split(numbers, 3))}
    for precision in (*FLOATS, *BITS):
        fmt = Format(precision) if precision in FLOATS else Format(precision, 32, symmetric=False)
        layout = RecordLayout.of(fmt, shapes)
        gated = layout.unpack(layout.pack(weights))
        plain = Expert({"wi": gated["up"], "wo": gated["down"]})
        known += [(gated, x, reference.swiglu(gated, x)), (plain, x, reference.relu_ffn(plain, x))]
    return known


class _Pool:
    """Runs the threads of the arithmetic: `pool` in pool.h, and the threads that call its `work`."""

    def __init__(self, library: Any, threads: int) -> None:
        self._library = library
        # Shared with the threads, which may outlive this object where nobody closes it.
        self._state = state = np.zeros(256 + _LINE, np.uint8)
        self.address = state.ctypes.data + -state.ctypes.data % _LINE
        fields = state[-state.ctypes.data % _LINE :][:24].view(np.uint32)
        fields[4], fields[5] = threads, _looks(library) if threads > 1 else 0

        def work(address: int = self.address) -> None:
            library.work(address)
            state.size  # noqa: B018 - the thread holds on to this memory for as long as it works in it

        self._threads = [threading.Thread(target=work, name=f"arithmetic-{n}", daemon=True) for n in range(1, threads)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._library.release(self.address)
        for thread in self._threads:
            thread.join()
        self._threads = []


@functools.lru_cache(maxsize=1)
def _looks(library: Any) -> int:
    """Returns how often a worker looks for work before it sleeps: as often as fits into AWAKE_S."""
    start = time.perf_counter()
    library.look_around(_LOOKS_TIMED)
    return max(1, int(AWAKE_S * _LOOKS_TIMED / (time.perf_counter() - start)))


class _DecoderLayer(ctypes.Structure):
    """Mirrors `decoder_layer` in native.c."""

    _fields_ = [
        ("norm", ctypes.c_void_p),
        ("moe_norm", ctypes.c_void_p),
        ("matrices", ctypes.c_void_p),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("eps", ctypes.c_float),
    ]


class DecoderLayer:
    """Holds a layer without its experts for `begin_layer`: q, k, v, o and the router as they are held."""

    def __init__(
        self,
        norm: np.ndarray,
        moe_norm: np.ndarray,
        held: Sequence[HeldMatrix],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: Optional[int],
        top_k: int,
        eps: float,
    ) -> None:
        self._views = (norm, moe_norm, *held)  # the memory that the addresses point to
        self.hidden, self.experts, self.top_k = len(norm), held[4].rows, top_k
        queries, keys, hidden = heads * head_dim, kv_heads * head_dim, self.hidden
        expected = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries), (self.experts, hidden)]
        for weight in (norm, moe_norm):
            _require(weight.shape == (hidden,) and weight.dtype == np.float32 and weight.flags.c_contiguous)
        _require([(m.rows, m.columns) for m in held] == expected)
        _require(heads % kv_heads == 0 and 0 < top_k <= self.experts)
        self._matrices = (_Matrix * 5)(*(m.matrix for m in held))
        self._layer = _DecoderLayer(
            norm.ctypes.data, moe_norm.ctypes.data, ctypes.addressof(self._matrices), heads, kv_heads, head_dim,
            window or 0, top_k, eps,
        )  # fmt: skip
        self.address = ctypes.addressof(self._layer)
        self._memory = (0, 0)  # for so many positions so many bytes

    def memory_bytes(self, library: Any, positions: int) -> int:
        if self._memory[0] != positions:
            self._memory = (positions, library.layer_memory(self.address, positions))
        return self._memory[1]


class _Token(ctypes.Structure):
    """Mirrors `token` in native.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "normed", "logits", "chosen", "shares", "outputs")]


class TokenMemory:
    """Holds what a layer reads and writes of one token, at fixed addresses: looking one up takes a microsecond."""

    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        self.hidden, self.experts, self.top_k = hidden, experts, top_k
        self.x = np.zeros((1, hidden), np.float32)  # the residual stream, into the layer and out of it
        self.normed = np.zeros((1, hidden), np.float32)  # what the experts are given
        self.logits = np.zeros((1, experts), np.float32)  # of the router
        self.chosen = np.zeros((1, top_k), np.int64)
        self.shares = np.zeros((1, top_k), np.float32)
        self.outputs = np.zeros((top_k, hidden), np.float32)  # of the experts, weighed
        arrays = (self.x, self.normed, self.logits, self.chosen, self.shares, self.outputs)
        addresses = [array.ctypes.data for array in arrays]
        _, self.normed_address, _, _, self.shares_address, self.outputs_address = addresses
        self._token = _Token(*addresses)
        self.address = ctypes.addressof(self._token)


class _ExpertCall(ctypes.Structure):
    """Mirrors `expert_call` in native.c."""

    _fields_ = [
        ("matrices", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("shares", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("n", ctypes.c_int64),
    ]


class _Prepared:
    """Holds matrices as native.c takes them: made once for an expert in a slab."""

    __slots__ = ("_matrices", "_views", "address", "columns", "count", "rows")

    def __init__(self, views: List[Packed]) -> None:
        self._views = views  # the memory that the addresses point to
        for view in views[1:]:  # gate, up, down or wi, wo: in like the first, out of its width
            _require(view.columns == (views[0].rows if view is views[-1] else views[0].columns))
            _require(view is views[-1] or view.rows == views[0].rows)
        self._matrices = (_Matrix * len(views))(*(_matrix(view) for view in views))
        self.address = ctypes.addressof(self._matrices)
        self.count, self.columns, self.rows = len(views), views[0].columns, views[-1].rows


def _prepared(expert: Dict[str, Packed], names: Tuple[str, ...]) -> _Prepared:
    """Returns the prepared matrices, kept with the expert if it can: addresses cost more than a small product."""
    if not isinstance(expert, Expert):
        return _Prepared([expert[name] for name in names])
    if expert.prepared is None:
        expert.prepared = _Prepared([expert[name] for name in names])
    prepared: _Prepared = expert.prepared
    return prepared


def _matrix(view: Packed) -> _Matrix:
    arrays = [view.codes, view.high, view.scales, view.offsets]
    addresses = [None if array is None else array.ctypes.data for array in arrays]
    shapes = _shapes(view.format, view.rows, view.columns)
    for name, array in zip(("codes", "high", "scales", "offsets"), arrays):
        _require((None if array is None else array.shape) == shapes.get(name))
        _require(array is None or array.flags.c_contiguous)
    group = 0 if view.scales is None else group_size(view.format, view.columns) // BLOCK
    return _Matrix(*addresses, _PRECISIONS[view.format.precision], view.rows, view.columns, group)


@functools.lru_cache(maxsize=64)
def _shapes(fmt: Format, rows: int, columns: int) -> Dict[str, Tuple[int, ...]]:
    """Returns the shapes of the arrays of a packed matrix, by the field of Packed."""
    return {part.name: part.shape for part in RecordLayout.of(fmt, [MatrixShape("", rows, columns)]).parts[0]}


def _require(condition: bool) -> None:
    """Checks what C cannot check: a bug here must not become a write somewhere in memory."""
    if not condition:
        raise ValueError("an array is not of the shape, type or order that native kernels take")


def _vectors(x: np.ndarray, columns: int) -> np.ndarray:
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"x has shape {x.shape} where (n, {columns}) is expected")
    return np.ascontiguousarray(x, np.float32)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares what native.c exports. Raises AttributeError for a library that lacks a function."""
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for name, arguments in (
        ("product_memory", [pointer, number]),
        ("product", [pointer] * 4 + [number, pointer]),
        ("experts_memory", [pointer, number]),
        ("experts", [pointer, pointer, number, number, pointer]),
        ("normed_product", [pointer, pointer, real] + [pointer] * 5),
        ("route", [pointer, number, number, pointer, pointer]),
        ("layer_memory", [pointer, number]),
        ("begin_layer", [pointer] * 7 + [number, number, pointer]),
        ("experts_of_token", [pointer] * 4 + [number, number, pointer]),
        ("read_memory", [pointer, pointer, number, pointer]),
        ("work", [pointer]),
        ("release", [pointer]),
        ("look_around", [number]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = number if name.endswith("_memory") else None, arguments
    return library
