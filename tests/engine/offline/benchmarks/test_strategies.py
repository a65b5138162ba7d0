"""Strategies side by side: the same prompts, rotating turns, ratios out of the raw times, and answers that count."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.container import Container
from engine.errors import EngineError, RequestError
from engine.experts.profile import PathProfile
from engine.generate import Engine
from engine.offline.benchmarks.strategies import Candidate, compare, ratios, summarise
from engine.protocol import ExpertBudget
from engine.quantize import Format
from engine.selftest import selftest_profile, write_random_model

TEXT = tuple((7 * i) % 96 for i in range(80))
RATE = 50e6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PathProfile]:
    path = str(tmp_path_factory.mktemp("model") / "m.emoe")
    write_random_model(path, [Format("fp32"), Format("int2", 32)])
    return path, selftest_profile(Container.open(path))


def test_all_candidates_take_turns_on_the_same_prompts(
    model: tuple[str, PathProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, profile = model
    names = ("naive-swap", "edgemoe", "edgemoe-cacheaware", "edgemoe-oracle")
    turns: list[tuple[str, tuple[int, ...]]] = []
    generate = Engine.generate

    def noted(self: Engine, prompt: tuple[int, ...], *arguments: object, **options: object) -> object:
        turns.append((self.strategy.name, prompt))
        return generate(self, prompt, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "generate", noted)
    measured = compare(
        [Candidate.parse(f"{name}={path}") for name in names], TEXT, RATE, budget=ExpertBudget(experts=4),
        profile=profile, rounds=2, new_tokens=6,
    )  # fmt: skip
    rounds = [turns[i : i + 5] for i in range(0, len(turns), 5)]
    assert [r[0][0] for r in rounds] == ["full-load"] * 3
    assert [[name for name, _ in r[1:]] for r in rounds] == [
        [*names], [*names[1:], names[0]], [*names[2:], *names[:2]]
    ]  # fmt: skip
    assert [len({prompt for _, prompt in r}) for r in rounds] == [1, 1, 1]
    assert rounds[1][0][1] != rounds[2][0][1]

    rows = summarise(measured, RATE, {"edgemoe": 3.2})
    assert [row["strategy"] for row in rows] == list(names)
    assert all(row["storage"] == "emulated" and len(row["tpot_ms_rounds"]) == 2 for row in rows)  # type: ignore[arg-type]
    assert ratios(measured[0], measured[0]) == [1, 1]
    for row, m in zip(rows, measured, strict=True):
        least, most = sorted(a / b for a, b in zip(measured[0].tpot_s, m.tpot_s, strict=True))
        assert (row["ratio_least"], row["ratio_most"]) == (least, most)
        assert all(floor >= compute for floor, compute in zip(m.floor_s(RATE), m.compute_s, strict=True))
    assert rows[0]["hit_rate"] == 0 and rows[0]["recall_at_k"] is None
    assert rows[0]["read_bytes_per_token"] == 3 * 2 * 32768  # three layers, two experts each, nothing kept
    assert rows[3]["recall_at_k"] == 1
    assert [row["paper_ratio"] for row in rows] == [None, 3.2, None, None]


def test_a_candidate_that_answers_differently_is_not_measured(
    model: tuple[str, PathProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, profile = model
    generate = Engine.generate

    def wrong(self: Engine, *arguments: object, **options: object) -> object:
        tokens, steps = generate(self, *arguments, **options)  # type: ignore[arg-type]
        return (tokens if self.strategy.name != "edgemoe" else (1, *tokens[1:])), steps

    monkeypatch.setattr(Engine, "generate", wrong)
    candidates = [Candidate.parse(f"{name}={path}") for name in ("naive-swap", "edgemoe")]
    with pytest.raises(EngineError, match=r"edgemoe on .* gave other tokens than naive-swap"):
        compare(candidates, TEXT, RATE, profile=profile, rounds=2, new_tokens=4)


def test_mistakes(model: tuple[str, PathProfile], tmp_path: Path) -> None:
    for text in ("edgemoe", "edgemoe="):
        with pytest.raises(RequestError, match=r"such as edgemoe=model\.emoe"):
            Candidate.parse(text)
    with pytest.raises(RequestError, match="'fast' is not one of"):
        Candidate.parse("fast=model.emoe")
    with pytest.raises(RequestError, match="the text has 10 tokens"):
        compare([Candidate.parse(f"naive-swap={model[0]}")], TEXT[:10], RATE)
