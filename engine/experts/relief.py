"""Trades accuracy for bytes: reads less than the router asks for, or something else."""

from __future__ import annotations

from typing import Callable, Dict, Mapping, Protocol, Sequence

import numpy as np

from engine.container import Container, ExpertKey, Record
from engine.errors import RequestError


class Relief(Protocol):
    """Changes what is read while decoding, token by token; a prefill is always exact."""

    reroutes: bool  # `prefer` may answer something else than the logits

    def prefer(self, logits: np.ndarray, resident: Sequence[int]) -> np.ndarray:
        """Returns the scores to choose by, from the router's logits (1, experts) and the experts in memory."""
        ...

    def substitutes(self, layer: int, chosen: np.ndarray, shares: np.ndarray) -> Dict[ExpertKey, Record]:
        """Returns another record of those experts (k,) whose shares (k,) are so small that it will do."""
        ...


class ExactRelief:
    """Changes nothing: the router's choice, as stored."""

    reroutes = False

    def prefer(self, logits: np.ndarray, resident: Sequence[int]) -> np.ndarray:
        return logits

    def substitutes(self, layer: int, chosen: np.ndarray, shares: np.ndarray) -> Dict[ExpertKey, Record]:
        return {}


class LowBitMisses(ExactRelief):
    """Reads an unimportant expert that is missing in fewer bits (HOBBIT, 2024).

    Unimportant is a share under UNIMPORTANT of the uniform one, 1 / k.
    """

    UNIMPORTANT = 0.7

    def __init__(self, records: Mapping[ExpertKey, Record]) -> None:
        """Takes the record in few bits of each expert."""
        self._records = records

    @classmethod
    def of(cls, container: Container) -> LowBitMisses:
        """Takes the smallest record of each expert. Raises RequestError if that is the stored one for all."""
        smallest = dict(container.primary)
        for record in container.records:
            if record.bytes < smallest[record.layer, record.expert].bytes:
                smallest[record.layer, record.expert] = record
        if smallest == container.primary:
            raise RequestError(
                "it needs experts in a second, lower precision; import it with another `--precision`, such as int2, "
                "after the first"
            )
        return cls(smallest)

    def substitutes(self, layer: int, chosen: np.ndarray, shares: np.ndarray) -> Dict[ExpertKey, Record]:
        least = self.UNIMPORTANT / len(chosen)
        keys = [(layer, int(expert)) for expert, share in zip(chosen, shares) if share < least]
        return {key: self._records[key] for key in keys}


class CacheAwareRouting(ExactRelief):
    """Prefers experts in memory if the router is nearly indifferent (cache-prior; Skliar et al., 2024).

    The logits of resident experts rise by STRENGTH times the mean range of logits so far. The expert that the router
    likes best is always taken.
    """

    reroutes = True
    STRENGTH = 0.2

    def __init__(self) -> None:
        self._range, self._seen = 0.0, 0

    def prefer(self, logits: np.ndarray, resident: Sequence[int]) -> np.ndarray:
        self._seen += 1
        self._range += (float(np.ptp(logits)) - self._range) / self._seen
        preference = logits.copy()
        preference[0, list(resident)] += self.STRENGTH * self._range
        preference[0, int(logits.argmax())] = np.inf
        return preference


RELIEFS: Dict[str, Callable[[Container], Relief]] = {
    "cache-aware": lambda container: CacheAwareRouting(),
    "low-bit": LowBitMisses.of,
}
