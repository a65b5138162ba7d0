"""Eviction policies against their definitions, computed the long way."""

from __future__ import annotations

import random

import pytest

from engine.experts.eviction import EvictionPolicy, FadingUses, ForwardDistance, PolicyInputs, policy_named

LAYERS, EXPERTS = 4, 6


def distance(first: int, of: int, layer: int) -> int:
    """Returns how many layers pass before layer `of` comes, after `layer`; 1 to the number of layers."""
    here = layer if layer >= first else first - 1
    return next(d for d in range(1, 2 * LAYERS) if first + (here - first + d) % (LAYERS - first) == of)


def leaving(policy: EvictionPolicy, layer: int) -> list[tuple[int, int]]:
    """Returns the experts in the order in which they would leave while `layer` computes."""
    gone: list[tuple[int, int]] = []
    while (key := policy.victim(lambda k: k not in gone, layer)) is not None:
        gone.append(key)
    return gone


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_online_distance_evicts_the_least_faded_uses_over_distance(first: int, seed: int) -> None:
    chooser = random.Random(seed)
    policy = policy_named("online-distance", PolicyInputs(LAYERS, first))
    uses: dict[tuple[int, int], list[int]] = {}
    resident: list[tuple[int, int]] = []
    for token in range(150):
        for layer in range(first, LAYERS):
            # Some experts are favoured, and others after a while: what is learned has to fade.
            favoured = chooser.random() < 0.7
            expert = token // 50 if favoured else chooser.randrange(EXPERTS)
            key = (layer, expert)
            if key not in resident:
                if len(resident) == 7:
                    worth = {
                        k: sum(0.5 ** ((token - t) / FadingUses.HALF_LIFE_TOKENS) for t in uses[k])
                        / distance(first, k[0], layer)
                        for k in resident
                    }
                    victim = policy.victim(lambda k: True, layer)
                    assert victim is not None
                    # Two that are worth the same may leave in either order; floats differ in the last places.
                    assert worth[victim] <= min(worth.values()) * (1 + 1e-9)
                    policy.removed(victim)
                    resident.remove(victim)
                policy.inserted(key)
                resident.append(key)
            policy.used(key)
            uses.setdefault(key, []).append(token)


def test_what_online_distance_learned_outlives_an_eviction() -> None:
    policy = policy_named("online-distance", PolicyInputs(1))
    for expert, uses in ((1, 3), (2, 2)):
        policy.inserted((0, expert))
        for _ in range(uses):
            policy.used((0, expert))
    policy.removed((0, 1))
    policy.inserted((0, 1))  # read again, not yet used again
    assert leaving(policy, 0) == [(0, 2), (0, 1)]


def test_online_distance_lets_what_was_never_used_and_an_encoders_experts_go_first() -> None:
    policy = policy_named("online-distance", PolicyInputs(3, 1))
    for key in ((1, 0), (0, 5), (2, 1)):
        policy.inserted(key)
        policy.used(key)
    policy.inserted((2, 3))  # read ahead
    assert set(leaving(policy, 1)[:2]) == {(0, 5), (2, 3)}


def test_a_profile_counts_for_forward_distance_alone() -> None:
    """The paper's policy goes by the profile, ours by what it saw; both by the same distance."""
    frequency = {(0, 0): 0.9, (0, 1): 0.1}
    orders = []
    for name in ("forward-distance", "online-distance"):
        policy = policy_named(name, PolicyInputs(1, frequency=frequency))
        assert isinstance(policy, ForwardDistance)
        for key in ((0, 0), (0, 1)):
            policy.inserted(key)
        for key in ((0, 0), (0, 1), (0, 1)):
            policy.used(key)
        orders.append(leaving(policy, 0))
    assert orders == [[(0, 1), (0, 0)], [(0, 0), (0, 1)]]
