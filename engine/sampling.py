"""Turns logits into tokens and probabilities."""

from __future__ import annotations

import numpy as np

from engine.models.layers import softmax
from engine.protocol import Sampling


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns log probabilities over the last axis, in the precision of `logits`."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


class Sampler:
    """Chooses greedily at temperature 0, else by nucleus sampling; a seed gives the same tokens on every device."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def choose(self, logits: np.ndarray) -> int:
        """Returns a token id for logits (vocab,); the lowest id among equals."""
        temperature, top_p = self._sampling.temperature, self._sampling.top_p
        if temperature == 0:
            return int(np.argmax(logits))
        probabilities = softmax(logits.astype(np.float64) / temperature)
        if top_p == 1:  # nothing is left out: no need to sort
            cumulative = np.cumsum(probabilities)
            place = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
            return min(place, len(cumulative) - 1)
        order = np.argsort(-probabilities, kind="stable")
        cumulative = np.cumsum(probabilities[order])
        kept = 1 + int(np.searchsorted(cumulative, top_p * cumulative[-1]))  # the smallest set that reaches top_p
        kept = min(kept, len(order))
        place = int(np.searchsorted(cumulative[:kept], self._random.random() * cumulative[kept - 1], side="right"))
        return int(order[min(place, kept - 1)])
