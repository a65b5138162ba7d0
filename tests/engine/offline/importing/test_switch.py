"""Import and runs of Switch Transformers, beyond what the golden values show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.container import Container
from engine.errors import RequestError
from engine.generate import Engine
from engine.models.switch import Switch, relative_buckets, sparse_layers
from engine.offline.accuracy.model import OfflineModel
from engine.offline.importing.checkpoint import CheckpointError
from engine.offline.importing.importer import import_checkpoint
from engine.protocol import ExpertBudget, Sampling
from engine.quantize import Format
from engine.selftest import selftest_profile
from engine.strategies import strategy_named
from tests.engine.offline.conftest import Change
from tests.golden.checkpoints import write_checkpoint
from tests.golden.switch import SwitchRecipe

TINY = SwitchRecipe("tiny", seed=7, vocab=100, hidden=16, width=12, heads=2, head_dim=8, experts=3)
EMBED, ENCODER_EMBED = "shared.weight", "encoder.embed_tokens.weight"


def write(folder: Path, change: Change = lambda config, tensors: None, recipe: SwitchRecipe = TINY) -> Path:
    config, tensors = recipe.config, recipe.weights()
    change(config, tensors)
    write_checkpoint(folder, config, tensors)
    return folder


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return import_checkpoint(write(tmp_path / "hf"), tmp_path / "m.emoe", [Format("fp32")])


def key(name: str, value: Any) -> Change:
    return lambda config, tensors: config.update({name: value})


def put(name: str, value: np.ndarray) -> Change:
    return lambda config, tensors: tensors.update({name: value})


@pytest.mark.parametrize("change, words", [
    (key("dense_act_fn", "gated-gelu"), ["dense_act_fn", "'relu'"]),
    (key("router_dtype", "bfloat16"), ["router_dtype", "'float32'"]),
    (key("architectures", ["SwitchTransformersEncoderModel"]), ["architectures"]),
    (key("num_heads", 0), ["num_heads"]),
    (key("decoder_start_token_id", 100), ["decoder_start_token_id", "below 100"]),
    (key("relative_attention_num_buckets", 2), ["relative_attention_num_buckets"]),
    (key("decoder_sparse_step", 0), ["no decoder layer has experts"]),
    (key("decoder_sparse_step", 3), ["decoder.block.3.layer.2.mlp.wi.weight", "is missing"]),
    (key("num_experts", 4), ["router.classifier.weight", "(3, 16)", "(4, 16)"]),
    (key("router_bias", True), ["router.classifier.bias", "is missing"]),
    (put("decoder.block.1.layer.2.mlp.wi.weight", np.zeros((12, 16), np.float32)), ["1.layer.2.mlp.wi", "surplus"]),
    (put(ENCODER_EMBED, np.zeros((100, 16), np.float32)), [ENCODER_EMBED, "differs", "tie_word_embeddings"]),
])  # fmt: skip
def test_what_is_refused(change: Change, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(write(tmp_path / "hf", change), tmp_path / "m.emoe")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "m.emoe").exists()


def test_tied_tensors_that_are_stored_again_are_left_out(container: Container, tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in (ENCODER_EMBED, "decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[EMBED].copy()

    again = import_checkpoint(write(tmp_path / "again", change), tmp_path / "again.emoe", [Format("fp32")])
    assert again.tensors.keys() == container.tensors.keys()


def test_an_untied_head_with_one_table_of_embeddings_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    recipe = SwitchRecipe("untied", seed=8, vocab=100, hidden=16, width=12, heads=2, head_dim=8, experts=3, tied=False)

    def alike(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for stack in ("encoder", "decoder"):
            tensors[f"{stack}.embed_tokens.weight"] = tensors[EMBED].copy()

    def once(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for stack in ("encoder", "decoder"):
            del tensors[f"{stack}.embed_tokens.weight"]

    logits = [
        OfflineModel(
            import_checkpoint(write(tmp_path / name, change, recipe), tmp_path / f"{name}.emoe", [Format("fp32")])
        ).logits([5, 6], [0, 3])
        for name, change in (("alike", alike), ("once", once))
    ]
    np.testing.assert_array_equal(*logits)


def test_its_non_experts_stay_in_floats(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="non-experts of switch_transformers in floats only"):
        import_checkpoint(write(tmp_path / "hf"), tmp_path / "m.emoe", int8_non_experts=True)


def test_each_expert_of_the_encoder_is_read_once_for_a_whole_prompt(container: Container) -> None:
    engine = Engine(container, strategy_named("naive-swap"))
    asked: list[tuple[int, np.ndarray]] = []
    try:
        state = engine.model.start(40, 1)
        engine.model.prefill(np.arange(40) % 100, state, engine.supply, observe=lambda *what: asked.append(what))
        read = engine.supply.take_counters().misses
    finally:
        engine.close()
    assert [layer for layer, _ in asked] == [0, 1, 2, 3]
    assert len(asked[0][1]) == 40
    assert read == sum(len(np.unique(chosen)) for _, chosen in asked) < 2 * 40


@pytest.mark.parametrize("name", ["edgemoe-lookahead", "edgemoe-buffer", "sti"])
def test_strategies_decode_the_same_tokens_with_hardly_a_buffer(name: str, container: Container) -> None:
    tokens = []
    for strategy in ("full-load", name):
        budget = ExpertBudget(experts=4) if strategy_named(strategy).has_budget else None
        engine = Engine(container, strategy_named(strategy), expert_budget=budget, profile=selftest_profile(container))
        try:
            tokens.append(engine.generate((4, 9, 9, 2), 12, Sampling(temperature=1.0, seed=3))[0])
        finally:
            engine.close()
    assert tokens[0] == tokens[1]


def test_a_sequence_has_a_prompt_first_and_an_end(container: Container) -> None:
    engine = Engine(container, strategy_named("full-load"))
    try:
        state = engine.model.start(2, 2)
        with pytest.raises(RequestError, match="before the encoder"):
            engine.model.forward(np.array([0]), state, engine.supply)
        engine.model.prefill(np.array([3, 4]), state, engine.supply)
        with pytest.raises(RequestError, match="more than the 2 decoder tokens"):
            engine.model.forward(np.array([5, 6]), state, engine.supply)
        with pytest.raises(RequestError, match="between 0 and 99"):
            engine.model.prefill(np.array([100]), engine.model.start(1, 1), engine.supply)
    finally:
        engine.close()


def test_decoder_tokens_belong_to_models_with_an_encoder(container: Container, shipped: Container) -> None:
    with pytest.raises(RequestError, match="decoder of its own"):
        OfflineModel(container).logits([3])
    with pytest.raises(RequestError, match="no encoder"):
        OfflineModel(shipped).logits([3], [4])


def test_token_by_token_is_all_at_once_where_no_expert_is_full(container: Container) -> None:
    decoder_tokens = [0, 7, 8, 9, 3, 3]
    engine = Engine(container, strategy_named("full-load"))
    try:
        assert isinstance(engine.model, Switch)
        state = engine.model.start(3, len(decoder_tokens))
        engine.model.encode(np.array([5, 6, 7]), state, engine.supply)
        rows = [engine.model.forward(np.array([token]), state, engine.supply)[0] for token in decoder_tokens]
    finally:
        engine.close()
    together = OfflineModel(container).logits([5, 6, 7], decoder_tokens)
    np.testing.assert_allclose(np.stack(rows), together, rtol=0, atol=1e-5)


def test_which_layers_are_sparse() -> None:
    assert sparse_layers(12, 2) == [1, 3, 5, 7, 9, 11]  # switch-base
    assert sparse_layers(5, 1) == [0, 1, 2, 3, 4]
    assert sparse_layers(6, 4) == [1, 5]
    assert sparse_layers(6, 0) == []


def test_buckets_of_positions() -> None:
    distance = np.arange(-200, 201)
    both, past = (relative_buckets(distance, bidirectional, 32, 128) for bidirectional in (True, False))
    assert (both.min(), both.max(), past.min(), past.max()) == (0, 31, 0, 31)
    assert (past[distance >= 0] == 0).all()
    np.testing.assert_array_equal(past[200 - np.arange(16)], np.arange(16))  # the near ones each have their own
    assert (np.diff(past[200::-1]) >= 0).all()
    assert (both[distance > 0] == both[distance < 0][::-1] + 16).all()
