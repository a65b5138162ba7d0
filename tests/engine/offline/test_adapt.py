"""Bits for each expert: measured mixtures, both searches, on the demonstration model and real text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.container import Container
from engine.errors import ContainerError, RequestError
from engine.experts.profile import PathProfile
from engine.offline.activations import profile_texts
from engine.offline.adapt import BEST_FORMATS, PAPER_FORMATS, Plan, _lower_hull, adapt, write_adapted
from engine.offline.calibration import Measuring
from engine.offline.importer import import_checkpoint
from engine.offline.model import OfflineModel
from engine.offline.perplexity import evaluate
from engine.offline.tokenizer import Tokenizer
from engine.quantize import Format
from tests.golden.checkpoints import SHIPPED

TEXTS = SHIPPED.parent / "texts"


def tokens(container: Container, name: str, count: int) -> list[int]:
    return list(Tokenizer.from_container(container.path).encode((TEXTS / name).read_text(encoding="utf-8"))[:count])


@pytest.fixture(scope="module")
def calibration(shipped: Container) -> list[int]:
    return tokens(shipped, "novel.train.txt", 700)


@pytest.fixture(scope="module")
def profile(shipped: Container, calibration: list[int]) -> PathProfile:
    return profile_texts(OfflineModel(shipped), [calibration])


@pytest.fixture(scope="module")
def paper(shipped: Container, calibration: list[int], profile: PathProfile) -> Plan:
    return adapt(shipped.path, calibration, profile=profile, method="paper", tolerance=0.02)


def nats(path: str, text: list[int]) -> float:
    return evaluate(OfflineModel.open(path), text, 1).nats_per_token


def test_a_mixture_is_measured_as_the_container_that_it_becomes(
    shipped: Container, calibration: list[int], paper: Plan, tmp_path: Path
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
    measuring = Measuring(shipped.path, [tuple(calibration[:200])], [Format("int2")])
    keys = sorted(shipped.primary)
    base = dict.fromkeys(keys, 0)
    changes = {key: 1 for key in keys if key[0] >= 6}
    with_prefix = measuring.score(base, changes)
    from_scratch = measuring.score({**base, **changes}, {})
    assert with_prefix.nats_per_token == pytest.approx(from_scratch.nats_per_token, abs=1e-6)
    assert measuring.score(base, {}).divergence == pytest.approx(0, abs=1e-9)
    assert measuring.score(base, {}).agreement == 1
    assert with_prefix.divergence > 0.001


def test_the_papers_search_keeps_to_its_rules(paper: Plan) -> None:
    assert paper.loss <= 0.02
    used = sorted(set(paper.assignment.values()))
    assert len(used) == 2
    assert used[1] - used[0] == 1  # neighbours among the uniform bitwidths
    lower = {f"{layer}/{expert}" for (layer, expert), n in paper.assignment.items() if n == used[1]}
    upper = paper.evidence.keys() - lower
    assert max(paper.evidence[e] for e in lower) <= min(paper.evidence[e] for e in upper)
    assert any(loss > 0.02 for _, loss in paper.measured)  # one step further was not tolerable


def test_the_better_search_loses_less_at_equal_bytes_on_other_text(
    shipped: Container, calibration: list[int], profile: PathProfile, paper: Plan, tmp_path: Path
) -> None:
    best = adapt(shipped.path, calibration, profile=profile, method="best", budget_bytes=paper.bytes_experts)
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
        adapt(shipped.path, calibration[:64], profile=profile, method="best", budget_bytes=1000)
    low = import_checkpoint(SHIPPED, tmp_path / "low.emoe", [Format("int4", 32)])
    with pytest.raises(ContainerError, match="in int4-g32 already"):
        adapt(low.path, calibration, profile=profile)
    other = PathProfile.load(str(save_of_another_model(tmp_path)))
    with pytest.raises(RequestError, match="the profile is of another model"):
        adapt(shipped.path, calibration, profile=other)


def save_of_another_model(folder: Path) -> Path:
    from engine.experts.profile import PathCounter

    PathCounter(2, 4).finish().save(str(folder / "other.json"))
    return folder / "other.json"


def test_formats_worth_having_lose_ever_more_for_a_byte() -> None:
    points = [(100, 0.0, 0), (50, 0.1, 1), (40, 5.0, 2), (30, 0.4, 3), (20, 0.3, 4), (10, 9.0, 5)]
    assert [n for _, _, n in _lower_hull(points)] == [0, 1, 4, 5]
    idle = [(100, 0.0, 0), (50, 0.0, 1), (10, 0.0, 2)]
    assert [n for _, _, n in _lower_hull(idle)] == [0, 2]  # an expert that nothing activates: the fewest bytes
    assert {f.precision for f in PAPER_FORMATS} == {"int8", "int4", "int2"}
    assert all(not f.symmetric for f in BEST_FORMATS)


def test_a_plan_says_what_was_measured(paper: Plan, tmp_path: Path) -> None:
    paper.save(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert sum(plan["precisions"].values()) == len(plan["experts"]) == 128
    assert plan["bytes_experts"] == paper.bytes_experts
    assert plan["loss"] == paper.loss
    assert len(plan["calibration_sha256"]) == 64
