"""Finds out whether preloading pays here, by doing without it now and then."""

from __future__ import annotations

from typing import List, Optional

# Tokens of one trial. The first is not counted: it starts with the buffer that the other arm has left.
TRIAL_TOKENS = 5
# Trials of each arm before the first verdict; then one trial in so many goes to the arm that lost.
OPENING_TRIALS = 3
RETRIAL_EVERY = 12
_WEIGHT = 0.25  # of the newest trial in an arm's running mean: storage warms up, texts change


class PreloadGovernor:
    """Switches the preloader off if measurement shows that it costs more than it hides.

    On saturated storage a preload saves no byte: a wrong one delays the right one and evicts what is needed. How much
    it hides depends on the arithmetic's share of a token. Both are known best from the time of a token itself: tokens
    are decoded in trials with and without preloading, interleaved, and the faster arm gets the tokens that follow.
    """

    def __init__(self) -> None:
        self.preloading = True
        self._means: List[Optional[float]] = [None, None]  # seconds a token without, with preloading
        self._trials = 0
        self._times: List[float] = []

    def decoded(self, time_s: float) -> None:
        """Notes that one more token was decoded, in `time_s`."""
        self._times.append(time_s)
        if len(self._times) < TRIAL_TOKENS:
            return
        counted = sorted(self._times[1:])
        trial = counted[len(counted) // 2 - 1 : len(counted) // 2 + 1]
        mean, arm = sum(trial) / len(trial), int(self.preloading)
        former = self._means[arm]
        self._means[arm] = mean if former is None else former + _WEIGHT * (mean - former)
        self._trials += 1
        self._times = []
        self.preloading = self._next_arm()

    def _next_arm(self) -> bool:
        if self._trials < 2 * OPENING_TRIALS:
            return not self.preloading
        off, on = self._means
        assert off is not None and on is not None
        better = on < off
        return not better if self._trials % RETRIAL_EVERY == 0 else better
