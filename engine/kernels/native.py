"""Native kernels: native.c as built by ci/build-kernels, loaded with ctypes and checked against numpy."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import struct
from typing import TYPE_CHECKING, Any, Dict, FrozenSet, List, Optional, Sequence, Tuple

import numpy as np

from engine.kernels.reference import Kernels
from engine.quantize import BITS, FLOATS, Expert, Format, MatrixShape, Packed, RecordLayout, as_float32, group_size

if TYPE_CHECKING:
    from engine.models.layers import KeyValueCache, RotaryEmbedding

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lib")

# All that the compiler may use, whether or not it does: what it uses unlisted ends the process.
_X86_64_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
# By machine, the best first: the library, and what /proc/cpuinfo must list for it.
VARIANTS: Dict[str, Tuple[Tuple[str, Tuple[str, ...]], ...]] = {
    "x86_64": (
        ("x86_64-avx512vnni", (*_X86_64_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")),
        ("x86_64-avx2", _X86_64_V3),
    ),
    "aarch64": (("aarch64-neon", ("asimd",)),),
    "armv7": (("armv7-neon", ("neon", "vfpv4")),),
}
_PRECISIONS = {name: number for number, name in enumerate(("int8", "int4", "int3", "int2", "fp32", "fp16", "bf16"))}
_DENSE = {"<f4": _PRECISIONS["fp32"], "<f2": _PRECISIONS["fp16"], "<u2": _PRECISIONS["bf16"]}  # by numpy's dtype
_BLAS_ROWS = 16  # of x, from which on expanding the matrix for BLAS is faster
_BLOCK = 32  # columns that share an activation's scale in native.c
_AGREEMENT = 3e-4  # largest error of the self-test, relative to the largest result


class NativeUnavailableError(Exception):
    """There is no library for this processor, or it does not work here."""


class _Matrix(ctypes.Structure):
    """`matrix` in native.c."""

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


class NativeKernels(Kernels):
    """Products in C, on this thread and without the interpreter's lock.

    Raises NativeUnavailableError where there are none. Experts that were expanded beforehand stay with numpy: packed
    ones are faster here.
    """

    backend = "native"

    def __init__(self, folder: Optional[str] = None) -> None:
        super().__init__()
        reasons = []
        for name in _fitting_variants():
            path = os.path.join(FOLDER if folder is None else folder, name + ".so")
            try:
                self._bind(ctypes.CDLL(path))
            except (OSError, AttributeError) as error:  # AttributeError: a function is missing
                reasons.append(f"{path} cannot be loaded: {error}")
                continue
            error_found = self._self_test()
            if error_found < _AGREEMENT:
                self.variant = name
                return
            reasons.append(f"{name} is {error_found:.1e} off numpy's results on this processor")
        raise NativeUnavailableError("; ".join(reasons))

    def _bind(self, library: ctypes.CDLL) -> None:
        """Raises AttributeError for a library that lacks a function."""
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        batch = [pointer] * 3 + [number, pointer]
        self._product = _declare(library.product, batch)
        self._swiglu = _declare(library.swiglu, batch)
        self._relu_ffn = _declare(library.relu_ffn, batch)
        self._linear = _declare(library.linear, [pointer] * 3 + [number] * 4)
        self._normed_linear = _declare(library.normed_linear, [pointer] * 5 + [number] * 3 + [ctypes.c_float])
        self._attend = _declare(library.attend, [pointer] * 5 + [number] * 2 + [pointer] * 3)
        self._read_memory = _declare(library.read_memory, [pointer, number], ctypes.c_float)
        self._work = np.empty(0, np.uint8)

    def swiglu(self, expert: Dict[str, Packed], x: np.ndarray) -> np.ndarray:
        if expert["gate"].expanded:
            return super().swiglu(expert, x)
        return self._run(self._swiglu, _prepared(expert, ("gate", "up", "down")), x, expert["down"].rows)

    def relu_ffn(self, expert: Dict[str, Packed], x: np.ndarray) -> np.ndarray:
        if expert["wi"].expanded:
            return super().relu_ffn(expert, x)
        return self._run(self._relu_ffn, _prepared(expert, ("wi", "wo")), x, expert["wo"].rows)

    def product(self, weight: Packed, x: np.ndarray) -> np.ndarray:
        if weight.expanded:
            return super().product(weight, x)
        return self._run(self._product, _Prepared([weight]), x, weight.rows)

    def _run(self, function: Any, prepared: _Prepared, x: np.ndarray, rows: int) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != prepared.columns:
            raise ValueError(f"x has shape {x.shape} where (n, {prepared.columns}) is expected")
        result = np.empty((len(x), rows), np.float32)
        if self._work.nbytes < prepared.work_bytes:
            self._work = np.empty(prepared.work_bytes, np.uint8)
        function(prepared.address, x.ctypes.data, result.ctypes.data, len(x), self._work.ctypes.data)
        return result

    def hold(self, stored: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(stored)

    def linear(self, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
        if len(x) >= _BLAS_ROWS:
            return x @ as_float32(weight).T
        x = np.ascontiguousarray(x, np.float32)
        rows, columns = weight.shape
        _require(x.shape[1] == columns and weight.flags.c_contiguous)
        result = np.empty((len(x), rows), np.float32)
        self._linear(
            weight.ctypes.data, x.ctypes.data, result.ctypes.data, len(x), rows, columns, _DENSE[weight.dtype.str]
        )
        return result

    def normed_linear(
        self, norm: np.ndarray, eps: float, weight: np.ndarray, x: np.ndarray
    ) -> Tuple[np.ndarray, np.ndarray]:
        """x (1, hidden) -> its RMS norm (1, hidden), and logits (1, rows) of that, for a matrix that was held."""
        rows, hidden = weight.shape
        _require(x.shape == (1, hidden) and len(norm) == hidden)
        _require(x.flags.c_contiguous and weight.flags.c_contiguous and x.dtype == norm.dtype == np.float32)
        normed, logits = np.empty_like(x), np.empty((1, rows), np.float32)
        self._normed_linear(
            norm.ctypes.data, weight.ctypes.data, x.ctypes.data, normed.ctypes.data, logits.ctypes.data, rows, hidden,
            _DENSE[weight.dtype.str], eps,
        )  # fmt: skip
        return normed, logits

    def attend(
        self, layer: AttentionLayer, cache: KeyValueCache, rotary: RotaryEmbedding, position: int, x: np.ndarray
    ) -> np.ndarray:
        """One token's attention block, x (1, hidden) -> (1, hidden), residual stream to residual stream."""
        _require(x.flags.c_contiguous and x.shape == (1, layer.hidden) and x.dtype == np.float32)
        _require(0 <= position < cache.positions)
        needed = layer.work_floats(cache.positions) * 4
        if self._work.nbytes < needed:
            self._work = np.empty(needed, np.uint8)
        result = np.empty_like(x)
        self._attend(
            layer.address, cache.addresses[0], cache.addresses[1], rotary.addresses[0], rotary.addresses[1],
            cache.positions, position, x.ctypes.data, result.ctypes.data, self._work.ctypes.data,
        )  # fmt: skip
        return result

    def read_memory(self, values: np.ndarray) -> float:
        """Their sum, float32, read once from front to back: what products are measured against."""
        _require(values.dtype == np.float32 and values.flags.c_contiguous)
        return float(self._read_memory(values.ctypes.data, values.size))

    def _self_test(self) -> float:
        """The largest error against numpy, relative: of every precision, of odd sizes, of both kinds of experts."""
        reference, random, worst = Kernels(), np.random.default_rng(0), 0.0
        x = random.standard_normal((2, 70)).astype(np.float32)
        for precision in (*FLOATS, *BITS):
            fmt = Format(precision) if precision in FLOATS else Format(precision, 32, symmetric=False)
            for names in (("gate", "up", "down"), ("wi", "wo")):
                shapes = [MatrixShape(name, *((70, 45) if name == names[-1] else (45, 70))) for name in names]
                layout = RecordLayout.of(fmt, shapes)
                weights = {s.name: random.standard_normal((s.rows, s.columns)).astype(np.float32) for s in shapes}
                expert = layout.unpack(layout.pack(weights))
                gated = len(names) == 3
                ours = self.swiglu(expert, x) if gated else self.relu_ffn(expert, x)
                expected = reference.swiglu(expert, x) if gated else reference.relu_ffn(expert, x)
                error = float(np.abs(ours - expected).max() / np.abs(expected).max())
                worst = error if not error <= worst else worst  # also where it is not a number
        return worst


class _AttentionLayer(ctypes.Structure):
    """`attention_layer` in native.c."""

    _fields_ = [
        ("norm", ctypes.c_void_p),
        ("matrices", ctypes.c_void_p * 4),
        ("precisions", ctypes.c_int32 * 4),
        ("hidden", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("eps", ctypes.c_float),
    ]


class AttentionLayer:
    """A layer's attention block as `attend` wants it: matrices q, k, v, o that were held."""

    def __init__(
        self,
        norm: np.ndarray,
        matrices: Sequence[np.ndarray],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: Optional[int],
        eps: float,
    ) -> None:
        self._views = (norm, *matrices)  # the memory that the addresses point to
        self.hidden = len(norm)
        self._heads = heads * head_dim
        self._kv_heads = kv_heads * head_dim
        _require(norm.dtype == np.float32 and all(view.flags.c_contiguous for view in self._views))
        self._layer = _AttentionLayer(
            norm.ctypes.data, (ctypes.c_void_p * 4)(*(m.ctypes.data for m in matrices)),
            (ctypes.c_int32 * 4)(*(_DENSE[m.dtype.str] for m in matrices)), self.hidden, heads, kv_heads, head_dim,
            window or 0, eps,
        )  # fmt: skip
        self.address = ctypes.addressof(self._layer)

    def work_floats(self, positions: int) -> int:
        return self.hidden + 2 * self._heads + max(self._kv_heads, positions) + _BLOCK


class _Prepared:
    """Matrices as native.c wants them: made once for an expert in a slab."""

    __slots__ = ("_matrices", "_views", "address", "columns", "work_bytes")

    def __init__(self, views: List[Packed]) -> None:
        self._views = views  # the memory that the addresses point to
        for view in views[1:]:  # gate, up, down or wi, wo: in like the first, out of its width
            _require(view.columns == (views[0].rows if view is views[-1] else views[0].columns))
            _require(view is views[-1] or view.rows == views[0].rows)
        self._matrices = (_Matrix * len(views))(*(_matrix(view) for view in views))
        self.address = ctypes.addressof(self._matrices)
        self.columns = views[0].columns
        width, widest = views[0].rows, max(view.columns for view in views)
        blocks = -(-widest // _BLOCK)
        self.work_bytes = 2 * 4 * (width + _BLOCK) + blocks * (3 * 4 + 2 * _BLOCK) + 64


def _prepared(expert: Dict[str, Packed], names: Tuple[str, ...]) -> _Prepared:
    """Kept with an expert that can keep it: the addresses cost more than a small product."""
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
    group = 0 if view.scales is None else group_size(view.format, view.columns) // _BLOCK
    return _Matrix(*addresses, _PRECISIONS[view.format.precision], view.rows, view.columns, group)


@functools.lru_cache(maxsize=64)
def _shapes(fmt: Format, rows: int, columns: int) -> Dict[str, Tuple[int, ...]]:
    """Of the arrays of a packed matrix, by the field of Packed."""
    return {part.name: part.shape for part in RecordLayout.of(fmt, [MatrixShape("", rows, columns)]).parts[0]}


def _require(condition: bool) -> None:
    """What C cannot check: a bug here must not become a write somewhere in memory."""
    if not condition:
        raise ValueError("an array is not of the shape, type or order that native kernels take")


def _declare(function: Any, arguments: List[Any], result: Any = None) -> Any:
    function.restype, function.argtypes = result, arguments
    return function


def _fitting_variants() -> List[str]:
    """The libraries that this processor can run, the best first. Raises NativeUnavailableError where there are none."""
    machine, features = machine_name(), cpu_features()
    variants = VARIANTS.get(machine, ())
    if not variants:
        raise NativeUnavailableError(f"there is no library for {machine}")
    fitting = [name for name, needed in variants if features.issuperset(needed)]
    if not fitting:
        missing = [feature for feature in variants[-1][1] if feature not in features]
        raise NativeUnavailableError(f"there is no library for {machine} without {' '.join(missing)}")
    return fitting


def machine_name() -> str:
    """As VARIANTS has it: what this process runs as, which on ARM may be 32 bits under a kernel of 64."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64", "armv8l", "armv7l"):
        return "aarch64" if struct.calcsize("P") == 8 else "armv7"
    return "x86_64" if machine in ("x86_64", "amd64") and struct.calcsize("P") == 8 else machine


def cpu_features() -> FrozenSet[str]:
    """What Linux lists of the first processor; a 64-bit kernel does not list what every ARMv8 has."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip().lower() in ("flags", "features"):
                    found = set(value.split())
                    if "asimd" in found:
                        found |= {"neon", "vfpv4"}
                    return frozenset(found)
    except OSError:
        pass
    return frozenset()
