"""Implements layers that architectures share. All arithmetic is float32; shapes stand where arrays are made."""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Returns the root mean square layer norm (Zhang and Sennrich, 2019). x (n, hidden)."""
    mean_square = np.einsum("nh,nh->n", x, x)[:, None] / np.float32(x.shape[1])  # (n, 1)
    return x * (1 / np.sqrt(mean_square + np.float32(eps))) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    e /= e.sum(axis=-1, keepdims=True)
    return e


class RotaryEmbedding:
    """Rotates positions into vectors (Su et al., 2021), halves against each other as in Llama and Mixtral."""

    def __init__(self, head_dim: int, theta: float, positions: int) -> None:
        frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)  # (head_dim / 2,)
        angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies  # (positions, head_dim / 2)
        self._cos = np.cos(angles).astype(np.float32)
        self._sin = np.sin(angles).astype(np.float32)
        self.addresses = (self._cos.ctypes.data, self._sin.ctypes.data)  # for native kernels

    def apply(self, x: np.ndarray, start: int) -> np.ndarray:
        """Returns x (n, heads, head_dim) rotated to positions start .. start + n."""
        half = x.shape[2] // 2
        cos = self._cos[start : start + len(x), None]  # (n, 1, head_dim / 2)
        sin = self._sin[start : start + len(x), None]
        first, second = x[..., :half], x[..., half:]
        out = np.empty_like(x)
        out[..., :half] = first * cos - second * sin
        out[..., half:] = second * cos + first * sin
        return out


class KeyValueCache:
    """Holds keys and values of one sequence, for one attention layer."""

    def __init__(self, kv_heads: int, positions: int, head_dim: int) -> None:
        self._keys = np.empty((kv_heads, positions, head_dim), np.float32)
        self._values = np.empty((kv_heads, positions, head_dim), np.float32)
        self.positions = positions
        self.addresses = (self._keys.ctypes.data, self._values.ctypes.data)  # for native kernels

    def extend(self, start: int, keys: np.ndarray, values: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Adds keys and values (n, kv_heads, head_dim); returns all so far, (kv_heads, start + n, head_dim)."""
        end = start + len(keys)
        self._keys[:, start:end] = keys.transpose(1, 0, 2)
        self._values[:, start:end] = values.transpose(1, 0, 2)
        return self._keys[:, :end], self._values[:, :end]


def causal_attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, start: int, window: Optional[int]
) -> np.ndarray:
    """Computes grouped-query attention (Ainslie et al., 2023).

    queries (n, heads, head_dim) at positions start .. start + n; keys and values (kv_heads, start + n, head_dim).
    With a `window`, a position sees that many positions, itself included. Returns (n, heads * head_dim).
    """
    n, heads, head_dim = queries.shape
    kv_heads, seen, _ = keys.shape
    shared = heads // kv_heads  # query heads that share a key head
    q = queries.reshape(n, kv_heads, shared, head_dim).transpose(1, 2, 0, 3).reshape(kv_heads, shared * n, head_dim)
    scores = np.matmul(q, keys.transpose(0, 2, 1))  # (kv_heads, shared * n, seen)
    scores *= np.float32(head_dim**-0.5)
    if n > 1 or window is not None:
        row = np.arange(start, start + n)[:, None]
        column = np.arange(seen)
        hidden = column > row  # (n, seen)
        if window is not None:
            hidden |= column <= row - window
        scores.reshape(kv_heads, shared, n, seen)[:, :, hidden] = -np.inf
    mixed = np.matmul(softmax(scores), values)  # (kv_heads, shared * n, head_dim)
    return mixed.reshape(kv_heads, shared, n, head_dim).transpose(2, 0, 1, 3).reshape(n, heads * head_dim)


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, bias: Optional[np.ndarray] = None
) -> np.ndarray:
    """Computes T5's attention: every head has its own keys, scores are not scaled (Raffel et al., 2020).

    queries (n, heads, head_dim); keys and values (heads, seen, head_dim); bias (heads, n, seen), -inf where nothing
    is to be seen. Returns (n, heads * head_dim).
    """
    scores = np.matmul(queries.transpose(1, 0, 2), keys.transpose(0, 2, 1))  # (heads, n, seen)
    if bias is not None:
        scores += bias
    mixed = np.matmul(softmax(scores), values)  # (heads, n, head_dim)
    return mixed.transpose(1, 0, 2).reshape(len(queries), -1)


def route_top_k(logits: np.ndarray, preference: np.ndarray, k: int) -> Tuple[np.ndarray, np.ndarray]:
    """Routes by softmax with renormalised weights (Mixtral).

    logits (n, experts) -> experts (n, k), weights (n, k).

    The experts are those of highest `preference` (n, experts), ties by their number; their weights follow from the
    logits. Exact routing prefers by the logits themselves.
    """
    probabilities = softmax(logits)
    chosen = np.argsort(-preference, axis=1, kind="stable")[:, :k]  # (n, k)
    weights = np.take_along_axis(probabilities, chosen, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    return chosen, weights
