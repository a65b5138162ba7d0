"""Computes experts in numpy: the readable reference, and the fallback if nothing faster works.

A product with a packed matrix is done in two steps: `expand` turns the codes into float32 without their scales,
then one batched BLAS product runs over the groups and the scales are applied to its small result. That is three to
six times as fast as expanding whole weights, and gives the same bits wherever the record came from. An expert that
was expanded beforehand (`expand_into`) skips the first step, with the same bits again.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, Optional, Tuple, Union

import numpy as np

from engine.quantize import BITS, BLOCK, FLOATS, LOW_BITS, Packed, as_float32, group_size, in_rows, int8_rows

# Above this many rows of x, scaling the weights once and one large product beat scaling every group's result.
WHOLE_PRODUCT_ROWS = 4


class Kernels:
    """Multiplies with packed experts. Holds scratch memory, so one instance serves one thread."""

    backend = "numpy"
    variant: Optional[str] = None  # of a native library
    clock: Optional[Callable[[], float]] = None  # where there is one, what `expand` takes is added to `expanding_s`
    expanding_s = 0.0

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._scratch: Dict[Tuple[str, Tuple[int, ...]], np.ndarray] = {}

    def swiglu(self, expert: Dict[str, Packed], x: np.ndarray) -> np.ndarray:
        """Returns down(silu(gate(x)) * up(x)) (Shazeer, 2020). x (n, hidden) -> (n, hidden), float32."""
        gated = self.product(expert["gate"], x)  # (n, width)
        gated *= sigmoid(gated)
        gated *= self.product(expert["up"], x)
        return self.product(expert["down"], gated)

    def relu_ffn(self, expert: Dict[str, Packed], x: np.ndarray) -> np.ndarray:
        """Returns wo(relu(wi(x))), an expert of Switch Transformers. x (n, hidden) -> (n, hidden), float32."""
        inner = self.product(expert["wi"], x)  # (n, width)
        np.maximum(inner, 0, out=inner)
        return self.product(expert["wo"], inner)

    def hold(self, stored: Union[np.ndarray, Packed]) -> Any:
        """Returns a matrix of the non-experts, from Container.read_matrix, as `linear` and `rows` take it."""
        return int8_rows(stored) if isinstance(stored, Packed) else as_float32(stored)

    def rows(self, weight: Any, numbers: np.ndarray) -> np.ndarray:
        """Returns rows (n,) int of a held matrix as (n, columns) float32."""
        result: np.ndarray = weight[numbers]
        return result

    def linear(self, weight: Any, x: np.ndarray) -> np.ndarray:
        """Returns x @ W.T, (n, rows) float32, for x (n, columns) float32 and a held matrix."""
        result: np.ndarray = x @ weight.T
        return result

    def close(self) -> None:
        """Ends what computes beside this thread: nothing here."""

    def product(self, weight: Packed, x: np.ndarray) -> np.ndarray:
        """Returns x @ W.T, (n, rows) float32, for x (n, columns) float32. Writes nothing into `weight`."""
        if weight.format.precision in FLOATS:
            return x @ self.expand(weight)[0]
        assert weight.scales is not None
        n, columns = x.shape
        size = group_size(weight.format, columns)
        groups = -(-columns // size)
        if groups * size != columns:  # the padding's codes meet zeros
            x = np.concatenate((x, np.zeros((n, groups * size - columns), np.float32)), axis=1)
        codes = self.expand(weight)  # (groups, size, padded rows)
        scales = _flat(weight.scales)  # (groups, padded rows)
        grouped = x.reshape(n, groups, size)
        sums = grouped.sum(axis=2)  # (n, groups)
        bits = BITS[weight.format.precision]
        shift = np.zeros_like(scales) if bits == 8 else scales * -np.float32(1 << (bits - 1))  # what `centre` costs
        if weight.offsets is not None:
            shift += _flat(weight.offsets)
        if n <= WHOLE_PRODUCT_ROWS:
            dots = np.matmul(grouped.transpose(1, 0, 2), codes)  # (groups, n, rows)
            dots *= scales[:, None]
            result: np.ndarray = dots.sum(axis=0)
        else:
            scaled = np.multiply(codes, scales[:, None], out=self._array("codes", codes.shape, np.float32))
            result = x @ scaled.reshape(groups * size, -1)
        result += sums @ shift
        return result[:, : weight.rows]

    def expand_into(self, weight: Packed, into: Packed) -> None:
        """Fills the views `into` of an expanded layout (see RecordLayout.expanded) from a matrix as stored."""
        codes = self.expand(weight, into.codes)
        if codes is not into.codes:
            into.codes[...] = codes
        if weight.scales is not None and into.scales is not None:
            into.scales[...] = in_rows(weight.scales)
        if weight.offsets is not None and into.offsets is not None:
            into.offsets[...] = in_rows(weight.offsets)

    def expand(self, weight: Packed, out: Optional[np.ndarray] = None) -> np.ndarray:
        """Returns codes as float32, (groups, size, padded rows), centred for int8, from 0 below.

        Floats come as (1, columns, rows).

        Where they are float32 already they are returned as they are; else in `out`, or in scratch memory.
        """
        if self.clock is None:
            return self._expand(weight, out)
        start = self.clock()
        codes = self._expand(weight, out)
        self.expanding_s += self.clock() - start
        return codes

    def _expand(self, weight: Packed, out: Optional[np.ndarray]) -> np.ndarray:
        precision = weight.format.precision
        codes = weight.codes
        if weight.expanded:
            return codes
        if precision == "fp32":
            return codes[None]
        if precision in FLOATS:
            if out is None:
                out = self._array("dense", (1, *codes.shape), np.float32)
            if precision == "bf16":
                np.left_shift(codes, 16, out=out[0].view(np.uint32), casting="unsafe", dtype=np.uint32)
            else:  # numpy converts halves one by one; moved bits, scaled by the exponents' difference, are the same
                bits = out[0].view(np.int32)
                bits[...] = codes.view(np.int16)
                np.left_shift(bits, 13, out=bits)
                np.bitwise_and(bits, -0x70002000, out=bits)  # the sign was extended over the exponent
                out *= np.float32(2.0**112)
            return out
        bits = LOW_BITS[precision]
        blocks, groups, words, _ = codes.shape
        if out is None:
            out = self._array("codes", (groups, words * 32 // bits, blocks * BLOCK), np.float32)
        field = self._array("field", codes.shape, np.int32)
        for view, at in _fields(out, words, bits):
            if bits == 8:  # to the top and down again, for the sign
                np.left_shift(codes.view(np.int32), 24 - at, out=field)
                np.right_shift(field, 24, out=field)
            else:
                np.right_shift(codes.view(np.int32), at, out=field)
                np.bitwise_and(field, (1 << bits) - 1, out=field)
            view[...] = field
        if weight.high is not None:
            field = self._array("field", weight.high.shape, np.int32)
            for view, at in _fields(out, weight.high.shape[2], 1):
                np.right_shift(weight.high.view(np.int32), at, out=field)
                np.bitwise_and(field, 1, out=field)
                np.left_shift(field, 2, out=field)
                view += field
        return out

    def _array(self, name: str, shape: Tuple[int, ...], dtype: type) -> np.ndarray:
        """Returns scratch memory, kept between calls: page faults of fresh memory cost more than the sums."""
        array = self._scratch.get((name, shape))
        if array is None:
            array = self._scratch[name, shape] = np.empty(shape, dtype)
        return array


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Returns the sigmoid, without overflow for any float32."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def _flat(values: np.ndarray) -> np.ndarray:
    """Returns scales or offsets, as stored or expanded, as (groups, padded rows) float32."""
    return values if values.ndim == 2 else in_rows(values.astype(np.float32))


def _fields(codes: np.ndarray, words: int, bits: int) -> Iterator[Tuple[np.ndarray, int]]:
    """Returns where in codes (groups, size, padded rows) each field of the words goes, and its first bit.

    The former is a view of the words' shape, (blocks, groups, words, BLOCK).
    """
    groups, _, rows = codes.shape
    split = codes.reshape(groups, words, 16 // bits, 2, rows // BLOCK, BLOCK).transpose(2, 3, 4, 0, 1, 5)
    for field, halves in enumerate(split):
        for half, view in enumerate(halves):
            yield view, 16 * half + bits * field
