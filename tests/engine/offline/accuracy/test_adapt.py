"""Bits for each expert: measured mixtures, both searches, on the demonstration model and real text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.container import Container
from engine.errors import ContainerError, RequestError
from engine.experts.profile import PathCounter, PathProfile
from engine.offline.accuracy.adapt import BEST_FORMATS, PAPER_FORMATS, BitwidthPlan, _lower_hull, adapt, write_adapted
from engine.offline.accuracy.calibration import Calibration, Measuring
from engine.offline.accuracy.model import OfflineModel
from engine.offline.accuracy.passages import TextPair, cut, passages_of
from engine.offline.accuracy.perplexity import evaluate
from engine.offline.importing.importer import import_checkpoint
from engine.offline.routing.activations import profile_texts
from engine.offline.tokenizer import Tokenizer
from engine.protocol import Passage
from engine.quantize import Format
from tests.golden.checkpoints import SHIPPED
from tests.golden.switch import SwitchRecipe

TEXTS = SHIPPED.parent / "texts"


def tokens(container: Container, name: str, count: int) -> list[int]:
    return list(Tokenizer.from_container(container.path).encode((TEXTS / name).read_text(encoding="utf-8"))[:count])


@pytest.fixture(scope="module")
def calibration(shipped: Container) -> list[int]:
    return tokens(shipped, "novel.train.txt", 700)


@pytest.fixture(scope="module")
def profile(shipped: Container, calibration: list[int]) -> PathProfile:
    return profile_texts(OfflineModel(shipped), [calibration])


def passages(container: Container, text: list[int]) -> Calibration:
    return Calibration(tuple(cut(text, 256, OfflineModel(container).config)))


@pytest.fixture(scope="module")
def paper(shipped: Container, calibration: list[int], profile: PathProfile) -> BitwidthPlan:
    return adapt(shipped.path, passages(shipped, calibration), profile=profile, method="paper", tolerance=0.02)


def nats(path: str, text: list[int]) -> float:
    return evaluate(OfflineModel.open(path), text, 1).nats_per_token


def test_a_mixture_is_measured_as_the_container_that_it_becomes(
    shipped: Container, calibration: list[int], paper: BitwidthPlan, tmp_path: Path
) -> None:
    written = write_adapted(shipped.path, paper, tmp_path / "mixed.emoe")
    assert paper.score.nats_per_token == pytest.approx(nats(written.path, calibration), abs=1e-5)
    assert written.expert_bytes == paper.bytes_experts
    labels = {key: written.formats[record.format] for key, record in written.primary.items()}
    assert labels == {key: paper.formats[number] for key, number in paper.assignment.items()}
    assert written.tokenizer_json() == shipped.tokenizer_json()
    assert written.origin["adapted"].startswith("paper, perplexity loss 0.0")
    for name in shipped.tensors:
        assert (written.read_tensor(name) == shipped.read_tensor(name)).all()


def test_layers_before_the_first_change_need_not_be_computed_again(shipped: Container, calibration: list[int]) -> None:
    measuring = Measuring(shipped.path, passages(shipped, calibration[:200]), [Format("int2")])
    keys = sorted(shipped.primary)
    base = dict.fromkeys(keys, 0)
    changes = {key: 1 for key in keys if key[0] >= 6}
    with_prefix = measuring.score(base, changes)
    from_scratch = measuring.score({**base, **changes}, {})
    assert with_prefix.nats_per_token == pytest.approx(from_scratch.nats_per_token, abs=1e-6)
    assert measuring.score(base, {}).divergence == pytest.approx(0, abs=1e-9)
    assert measuring.score(base, {}).agreement == 1
    assert with_prefix.divergence > 0.001


def test_the_papers_search_keeps_to_its_rules(paper: BitwidthPlan) -> None:
    assert paper.loss <= 0.02
    used = sorted(set(paper.assignment.values()))
    assert len(used) == 2
    assert used[1] - used[0] == 1  # neighbours among the uniform bitwidths
    lower = {f"{layer}/{expert}" for (layer, expert), n in paper.assignment.items() if n == used[1]}
    upper = paper.evidence.keys() - lower
    assert max(paper.evidence[e] for e in lower) <= min(paper.evidence[e] for e in upper)
    assert any(loss > 0.02 for _, loss in paper.measured)  # one step further was not tolerable


def test_the_better_search_loses_less_at_equal_bytes_on_other_text(
    shipped: Container, calibration: list[int], profile: PathProfile, paper: BitwidthPlan, tmp_path: Path
) -> None:
    same_text = passages(shipped, calibration)
    best = adapt(shipped.path, same_text, profile=profile, method="best", budget_bytes=paper.bytes_experts)
    assert best.bytes_experts <= paper.bytes_experts
    assert best.loss < paper.loss
    held_out = tokens(shipped, "novel.val.txt", 4000)
    lost = [
        nats(write_adapted(shipped.path, plan, tmp_path / f"{plan.method}.emoe").path, held_out)
        for plan in (best, paper)
    ]
    assert lost[0] < lost[1]


def test_what_cannot_be_adapted(
    shipped: Container, calibration: list[int], profile: PathProfile, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="budget of 1000 bytes is too small: the fewest"):
        adapt(shipped.path, passages(shipped, calibration[:64]), profile=profile, method="best", budget_bytes=1000)
    low = import_checkpoint(SHIPPED, tmp_path / "low.emoe", [Format("int4", 32)])
    with pytest.raises(ContainerError, match="in int4-g32 already"):
        adapt(low.path, passages(shipped, calibration), profile=profile)
    other = PathProfile.load(str(save_of_another_model(tmp_path)))
    with pytest.raises(RequestError, match="the profile is of another model"):
        adapt(shipped.path, passages(shipped, calibration), profile=other)


def test_rouge_2_of_what_a_model_writes(shipped: Container) -> None:
    tokenizer = Tokenizer.from_container(shipped.path)
    pairs = [
        TextPair("It was the best of times, it was", "the worst of times"),
        TextPair("He said that he was", "not there"),
    ]
    prompts = tuple(passages_of(pairs, tokenizer))
    written = [tokenizer.decode(OfflineModel(shipped).generate(p.prompt, 8)) for p in prompts]
    measuring = Measuring(shipped.path, Calibration(prompts, tuple(written), 8), [Format("int2")])
    base = dict.fromkeys(shipped.primary, 0)
    assert measuring.score(base, {}).rouge_2 == 1  # it writes what it wrote
    coarse = measuring.score(base, dict.fromkeys(shipped.primary, 1)).rouge_2
    assert coarse is not None and coarse < 1
    with pytest.raises(RequestError, match="calibrate on pairs"):
        adapt(shipped.path, Calibration(prompts), profile=save_and_load(shipped), metric="rouge-2")


def save_and_load(container: Container) -> PathProfile:
    return PathCounter(container.moe_layers, container.experts_per_layer).finish()


@pytest.mark.parametrize("method", ["paper", "best"])
def test_an_encoder_and_a_decoder_are_adapted_together(method: str, tmp_path: Path) -> None:
    recipe = SwitchRecipe("adapted", seed=5, vocab=60, hidden=64, width=128, heads=4, head_dim=8, experts=3)
    container = import_checkpoint(recipe.write(tmp_path / "hf"), tmp_path / "m.emoe", [Format("fp32")])
    model = OfflineModel(container)
    random = np.random.RandomState(3)
    text = [int(t) for t in random.randint(2, 60, 200)]
    calibration = Calibration(tuple(cut(text, 50, model.config)))
    assert calibration.passages[0] == Passage(tuple(text[:25]), tuple(text[25:50]))
    profile = profile_texts(model, [text], 50)
    plan = adapt(container.path, calibration, profile=profile, method=method, budget_bytes=300_000, workers=1)
    written = write_adapted(container.path, plan, tmp_path / "small.emoe")
    assert written.expert_bytes == plan.bytes_experts <= 300_000
    assert {layer for layer, _ in plan.assignment} == {0, 1, 2, 3}
    assert evaluate(OfflineModel(written), text, 1, 50).nats_per_token == pytest.approx(
        plan.score.nats_per_token, abs=1e-5
    )
    measuring = Measuring(container.path, calibration, [Format("int2")])
    base = dict.fromkeys(sorted(container.primary), 0)
    for layer in range(4):  # in the encoder, and in the decoder
        changes = {key: 1 for key in base if key[0] == layer}
        shared, alone = measuring.score(base, changes), measuring.score({**base, **changes}, {})
        assert shared.nats_per_token == pytest.approx(alone.nats_per_token, abs=1e-6)
        assert shared.divergence > 0


def save_of_another_model(folder: Path) -> Path:
    PathCounter(2, 4).finish().save(str(folder / "other.json"))
    return folder / "other.json"


def test_formats_worth_having_lose_ever_more_for_a_byte() -> None:
    points = [(100, 0.0, 0), (50, 0.1, 1), (40, 5.0, 2), (30, 0.4, 3), (20, 0.3, 4), (10, 9.0, 5)]
    assert [n for _, _, n in _lower_hull(points)] == [0, 1, 4, 5]
    idle = [(100, 0.0, 0), (50, 0.0, 1), (10, 0.0, 2)]
    assert [n for _, _, n in _lower_hull(idle)] == [0, 2]  # an expert that nothing activates: the fewest bytes
    assert {f.precision for f in PAPER_FORMATS} == {"int8", "int4", "int2"}
    assert all(not f.symmetric for f in BEST_FORMATS)


def test_a_plan_says_what_was_measured(paper: BitwidthPlan, tmp_path: Path) -> None:
    paper.save(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert sum(plan["precisions"].values()) == len(plan["experts"]) == 128
    assert plan["bytes_experts"] == paper.bytes_experts
    assert plan["loss"] == paper.loss
    assert len(plan["calibration_sha256"]) == 64
