"""The engine against golden values that transformers gave; tests/golden/make.py has made them."""

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
from tests.golden.checkpoints import CONTEXT, HELD_OUT, RECIPES, Recipe, held_out_text
from tests.golden.switch import SWITCH_RECIPES, SwitchRecipe

FOLDER = Path(checkpoints.__file__).parent
FACTS: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
ARRAYS = np.load(FOLDER / "golden.npz")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_checkpoint_means_what_transformers_says(recipe: Recipe, tmp_path: Path) -> None:
    golden = FACTS["recipes"][recipe.name]
    assert recipe.sha256() == golden["sha256"], "the recipe has changed: make the golden values again with ci/oracle"
    container = import_checkpoint(recipe.write(tmp_path / "hf"), tmp_path / "m.emoe", [Format("fp32")])
    model = OfflineModel(container)
    np.testing.assert_allclose(model.logits(recipe.prompt), ARRAYS[f"{recipe.name}.logits"], rtol=0, atol=1e-4)
    routing = model.routing(Passage(recipe.prompt[:1], recipe.prompt[1:]))  # (positions, layers, k)
    np.testing.assert_array_equal(routing.transpose(1, 0, 2), ARRAYS[f"{recipe.name}.routing"])
    # Token by token, with a cache of keys and values, where transformers had the whole sequence at each step.
    engine = Engine(container, strategy_named("naive-swap"))
    try:
        tokens, _ = engine.generate(recipe.prompt, len(golden["greedy"]), Sampling())
    finally:
        engine.close()
    assert list(tokens) == golden["greedy"]


@pytest.mark.parametrize("recipe", SWITCH_RECIPES, ids=lambda recipe: recipe.name)
def test_a_switch_checkpoint_means_what_transformers_says(recipe: SwitchRecipe, tmp_path: Path) -> None:
    golden = FACTS["recipes"][recipe.name]
    assert recipe.sha256() == golden["sha256"], "the recipe has changed: make the golden values again with ci/oracle"
    container = import_checkpoint(recipe.write(tmp_path / "hf"), tmp_path / "m.emoe", [Format("fp32")])
    model = OfflineModel(container)
    routing: dict[int, np.ndarray] = {}
    logits = model.logits(recipe.prompt, recipe.decoder_tokens, observe=routing.__setitem__)
    np.testing.assert_allclose(logits, ARRAYS[f"{recipe.name}.logits"], rtol=0, atol=1e-4)
    expected = [ARRAYS[f"{recipe.name}.{stack}_routing"] for stack in ("encoder", "decoder")]
    for layer, chosen in enumerate([*expected[0], *expected[1]]):
        np.testing.assert_array_equal(routing[layer][:, 0], chosen)
    engine = Engine(container, strategy_named("naive-swap"))
    try:
        assert isinstance(engine.model, Switch)
        encoded = engine.model.encode(np.array(recipe.prompt), engine.model.start(len(recipe.prompt)), engine.supply)
        np.testing.assert_allclose(encoded, ARRAYS[f"{recipe.name}.encoded"], rtol=0, atol=1e-4)
        tokens, _ = engine.generate(recipe.prompt, len(golden["greedy"]), Sampling())
    finally:
        engine.close()
    assert list(tokens) == golden["greedy"]


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
