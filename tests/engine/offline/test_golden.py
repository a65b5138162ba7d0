"""The engine against golden values that transformers gave; tests/programs/golden.py has made them.

How far may two right answers in float32 lie apart? A product of n terms, summed in whatever order, is the exact product
of factors that are off by sqrt(n) roundings at most (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019). So the weights
are disturbed by that much, and what becomes of the answer is what rounding may make of it. Either side of a comparison
has its own rounding: twice that is allowed. On processors from Nehalem to AVX-512 the errors are 0.13 to 0.55 of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.container import Container
from engine.generate import Engine
from engine.models.switch import Switch
from engine.offline.accuracy.model import OfflineModel
from engine.offline.accuracy.perplexity import evaluate
from engine.offline.importing.importer import import_checkpoint
from engine.offline.tokenizer import Tokenizer
from engine.protocol import Passage, Sampling
from engine.quantize import Format
from engine.strategies import strategy_named
from tests.golden import checkpoints
from tests.golden.checkpoints import CONTEXT, HELD_OUT, RECIPES, Recipe, held_out_text, write_checkpoint
from tests.golden.switch import SWITCH_RECIPES, SwitchRecipe

FOLDER = Path(checkpoints.__file__).parent
ROUNDING = 2.0**-24  # of float32, relative
FACTS: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
ARRAYS = np.load(FOLDER / "golden.npz")


class Answers:
    """What the engine makes of a recipe's weights."""

    def __init__(self, recipe: Recipe | SwitchRecipe, folder: Path, weights: dict[str, np.ndarray]) -> None:
        folder.mkdir()
        write_checkpoint(folder, recipe.config, weights)
        self.container = import_checkpoint(folder, folder / "m.emoe", [Format("fp32")])
        self.routing: dict[int, np.ndarray] = {}
        self.encoded: np.ndarray | None = None
        model = OfflineModel(self.container)
        if isinstance(recipe, Recipe):
            self.logits = model.logits(recipe.prompt)
            return
        self.logits = model.logits(recipe.prompt, recipe.decoder_tokens, observe=self.routing.__setitem__)
        engine = Engine(self.container, strategy_named("naive-swap"))
        try:
            assert isinstance(engine.model, Switch)
            start = engine.model.start(len(recipe.prompt))
            self.encoded = engine.model.encode(np.array(recipe.prompt), start, engine.supply)
        finally:
            engine.close()

    def distance(self, other: Answers) -> dict[str, float]:
        found = {"logits": _largest(self.logits - other.logits)}
        if self.encoded is not None and other.encoded is not None:
            found["encoded"] = _largest(self.encoded - other.encoded)
        return found


def tolerances(recipe: Recipe | SwitchRecipe, answers: Answers, folder: Path) -> dict[str, float]:
    """Returns what float32's rounding may change in each of the answers, of which each side has its own."""
    found: list[dict[str, float]] = []
    for seed in range(3):
        noise = np.random.default_rng(seed)
        disturbed = {
            name: (tensor * (1 + np.sqrt(tensor.shape[-1]) * ROUNDING * noise.uniform(-1, 1, tensor.shape))).astype(
                "f4"
            )
            for name, tensor in _floats(recipe).items()
        }
        found.append(answers.distance(Answers(recipe, folder / f"disturbed-{seed}", disturbed)))
    return {name: 2 * max(each[name] for each in found) for name in found[0]}


def _floats(recipe: Recipe | SwitchRecipe) -> dict[str, np.ndarray]:
    return {name: tensor.astype(np.float32) for name, tensor in recipe.weights().items()}


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max())


def greedy(container: Container, recipe: Recipe | SwitchRecipe, tokens: int) -> list[int]:
    """Returns the answer token by token, with a cache; transformers had the whole sequence at each step."""
    engine = Engine(container, strategy_named("naive-swap"))
    try:
        return list(engine.generate(recipe.prompt, tokens, Sampling())[0])
    finally:
        engine.close()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_checkpoint_means_what_transformers_says(recipe: Recipe, tmp_path: Path) -> None:
    golden = FACTS["recipes"][recipe.name]
    assert recipe.sha256() == golden["sha256"], "the recipe has changed: make the golden values again with ci/oracle"
    container = import_checkpoint(recipe.write(tmp_path / "hf"), tmp_path / "m.emoe", [Format("fp32")])
    model = OfflineModel(container)
    allowed = tolerances(recipe, Answers(recipe, tmp_path / "plain", recipe.weights()), tmp_path)
    expected = ARRAYS[f"{recipe.name}.logits"]
    np.testing.assert_allclose(model.logits(recipe.prompt), expected, rtol=0, atol=allowed["logits"])
    routing = model.routing(Passage(recipe.prompt[:1], recipe.prompt[1:]))  # (positions, layers, k)
    np.testing.assert_array_equal(routing.transpose(1, 0, 2), ARRAYS[f"{recipe.name}.routing"])
    assert greedy(container, recipe, len(golden["greedy"])) == golden["greedy"]


@pytest.mark.parametrize("recipe", SWITCH_RECIPES, ids=lambda recipe: recipe.name)
def test_a_switch_checkpoint_means_what_transformers_says(recipe: SwitchRecipe, tmp_path: Path) -> None:
    golden = FACTS["recipes"][recipe.name]
    assert recipe.sha256() == golden["sha256"], "the recipe has changed: make the golden values again with ci/oracle"
    container = import_checkpoint(recipe.write(tmp_path / "hf"), tmp_path / "m.emoe", [Format("fp32")])
    logits = OfflineModel(container).logits(recipe.prompt, recipe.decoder_tokens)
    answers = Answers(recipe, tmp_path / "plain", recipe.weights())
    allowed = tolerances(recipe, answers, tmp_path)
    np.testing.assert_allclose(logits, ARRAYS[f"{recipe.name}.logits"], rtol=0, atol=allowed["logits"])
    np.testing.assert_allclose(answers.encoded, ARRAYS[f"{recipe.name}.encoded"], rtol=0, atol=allowed["encoded"])
    expected = [ARRAYS[f"{recipe.name}.{stack}_routing"] for stack in ("encoder", "decoder")]
    for layer, chosen in enumerate([*expected[0], *expected[1]]):
        np.testing.assert_array_equal(answers.routing[layer][:, 0], chosen)
    assert greedy(container, recipe, len(golden["greedy"])) == golden["greedy"]


@pytest.mark.parametrize("recipe", [RECIPES[0], SWITCH_RECIPES[3]], ids=lambda recipe: recipe.name)
def test_a_hundredth_too_much_in_any_tensor_is_no_rounding(recipe: Recipe | SwitchRecipe, tmp_path: Path) -> None:
    """So that what is allowed hides no mistake.

    Left out are experts, of which the prompt chooses a few, and the third embedding of an untied checkpoint.
    """
    answers = Answers(recipe, tmp_path / "plain", recipe.weights())
    allowed = tolerances(recipe, answers, tmp_path)["logits"]
    names = [name for name in recipe.weights() if "expert" not in name and name != "shared.weight"]
    for n, name in enumerate(names):
        weights = _floats(recipe)
        weights[name] *= np.float32(1.01)
        wrong = Answers(recipe, tmp_path / f"wrong-{n}", weights)
        assert answers.distance(wrong)["logits"] > allowed, name


def test_the_golden_values_cover_64_tokens_of_every_recipe() -> None:
    names = [recipe.name for recipe in RECIPES] + [recipe.name for recipe in SWITCH_RECIPES]
    assert {name: len(facts["greedy"]) for name, facts in FACTS["recipes"].items()} == dict.fromkeys(names, 64)


@pytest.mark.parametrize("path", HELD_OUT, ids=lambda path: path.name)
def test_the_shipped_model_predicts_held_out_text_as_in_transformers(path: Path, shipped: Container) -> None:
    golden = FACTS["held_out"][path.name]
    text = held_out_text(path)
    tokens = Tokenizer.from_container(shipped.path).encode(text)
    result = evaluate(OfflineModel(shipped), tokens, len(text.encode()), CONTEXT)
    assert (result.tokens, result.scored_tokens) == (golden["tokens"], golden["scored"])
    assert result.perplexity == pytest.approx(np.exp(golden["nats_per_token"]), rel=1e-4)
