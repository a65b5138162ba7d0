from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engine.errors import RequestError
from engine.offline.routing.activation_paths import coverage, path_counts, selftest_profile
from engine.offline.routing.trace import Trace


def trace_of(*tokens: tuple[int, ...], layers: int = 0, first_layer: int = 0) -> Trace:
    """Top-1: each token's expert in each layer, of four."""
    n, decoder_layers = len(tokens), len(tokens[0])
    return Trace(
        "t", layers or decoder_layers, 4, first_layer, np.zeros(n, np.int32), np.zeros(1, np.int32),
        np.array(tokens, np.uint16)[:, :, None], np.zeros((n, decoder_layers - 1, 4), np.uint16),
    )  # fmt: skip


def test_paths_are_counted_from_every_layer_on() -> None:
    trace = trace_of((0, 1, 2), (0, 1, 3), (0, 1, 2))
    assert path_counts(trace, 1) == [3, 3, 2, 1]
    assert path_counts(trace, 2) == [3, 2, 1]  # 0-1; 1-2, 1-3
    assert path_counts(trace, 3) == [2, 1]


def test_the_order_in_which_a_router_names_experts_is_no_path() -> None:
    pairs = np.array([[[0, 1]], [[1, 0]]], np.uint16)
    trace = Trace("t", 1, 4, 0, np.zeros(2, np.int32), np.zeros(1, np.int32), pairs, np.zeros((2, 0, 4), np.uint16))
    assert path_counts(trace, 1) == [2]


def test_what_decides_the_next_expert_must_be_known_to_foresee_it() -> None:
    """The second layer repeats the first; the first is what the second was not."""
    trace = trace_of(*[(0, 0), (1, 1)] * 20)
    profile = selftest_profile(trace)
    for shares in (coverage(profile), coverage(profile, trace)):
        nothing, one, two = shares
        assert nothing[:2] == pytest.approx([0.5, 1.0], abs=0.02)
        assert one[0] == two[0] == pytest.approx(1.0)
        assert all(len(known) == 4 and known[-1] == pytest.approx(1.0) for known in shares)


def test_an_unseen_text_is_foreseen_less() -> None:
    profile = selftest_profile(trace_of(*[(0, 0), (1, 1)] * 20))
    _, one, _ = coverage(profile, trace_of(*[(0, 1), (1, 0)] * 20))
    assert one[0] < 0.1
    assert one[-1] <= 1.0


def test_layers_of_an_encoder_are_not_counted_and_another_model_is_refused() -> None:
    profile = selftest_profile(trace_of((0, 1), (2, 3), layers=3, first_layer=1))
    assert [len(counts) for counts in profile.marginal] == [0, 2, 2]
    with pytest.raises(RequestError, match="different models"):
        coverage(profile, dataclasses.replace(trace_of((0, 1)), experts=5))
