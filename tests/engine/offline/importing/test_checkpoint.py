"""What cannot be imported is refused with a line that names the tensor or key, and the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.models.mixtral import MixtralConfig
from engine.offline.importing.checkpoint import Checkpoint, CheckpointError
from engine.offline.importing.importer import import_checkpoint, layout_of
from engine.offline.importing.layout import Layout
from engine.offline.importing.mixtral import MixtralLayout
from engine.quantize import Format
from tests.engine.offline.conftest import TINY, Change
from tests.golden.checkpoints import RECIPES

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
WRITE = Callable[..., Path]


def layout(folder: Path) -> Layout:
    return layout_of(Checkpoint.open(folder))


def drop(name: str) -> Change:
    return lambda config, tensors: tensors.pop(name)


def put(name: str, value: np.ndarray) -> Change:
    return lambda config, tensors: tensors.update({name: value})


def key(name: str, value: Any) -> Change:
    return lambda config, tensors: config.update({name: value})


@pytest.mark.parametrize("change, words", [
    (drop(EXPERT), [EXPERT, "is missing"]),
    (drop("model.norm.weight"), ["model.norm.weight", "is missing"]),
    (drop("lm_head.weight"), ["lm_head.weight", "is missing"]),
    (put("model.layers.0.self_attn.q_proj.bias", np.zeros(16, np.float32)),
     ["model.layers.0.self_attn.q_proj.bias", "surplus", "model.safetensors"]),
    (put("model.layers.2.input_layernorm.weight", np.ones(16, np.float32)), ["layers.2.input_layernorm", "surplus"]),
    (put(EXPERT, np.zeros((12, 16), np.float32)), [EXPERT, "(12, 16)", "(16, 12)", "model.safetensors"]),
    (put(EXPERT, np.zeros((16, 12), np.float64)), [EXPERT, "F64", "BF16"]),
    (put(EXPERT, np.zeros((16, 12), np.int8)), [EXPERT, "I8", "quantised"]),
    (put("name\x1b[31m", np.zeros(1, np.float32)), ["'name\\x1b[31m'", "surplus"]),
])  # fmt: skip
def test_tensors(change: Change, words: list[str], checkpoint: WRITE) -> None:
    with pytest.raises(CheckpointError) as error:
        layout(checkpoint(change))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (key("model_type", "llama"), ["model_type", "'llama'", "mixtral"]),
    (key("architectures", ["MixtralForSequenceClassification"]), ["architectures"]),
    (key("hidden_act", "gelu"), ["hidden_act", "'gelu'", "silu"]),
    (key("quantization_config", {"bits": 4}), ["quantization_config", "original"]),
    (key("rope_scaling", {"type": "linear", "factor": 2.0}), ["rope_scaling", "'linear'"]),
    (key("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}), ["rope_parameters", "'yarn'"]),
    (key("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}), ["partial_rotary_factor"]),
    (key("rope_theta", -1), ["rope_theta", "-1"]),
    (key("num_local_experts", None), ["num_local_experts", "is missing"]),
    (key("num_experts_per_tok", 4), ["num_experts_per_tok", "4", "3 experts"]),
    (key("num_key_value_heads", 3), ["num_key_value_heads", "3"]),
    (key("head_dim", 7), ["head_dim", "even"]),
    (key("hidden_size", "16"), ["hidden_size", "'16'"]),
    (key("vocab_size", True), ["vocab_size", "True"]),
    (key("num_hidden_layers", 10**9), ["num_hidden_layers"]),
    (key("num_hidden_layers", 1 << 10), ["model.layers.2.input_layernorm.weight", "is missing"]),
    (key("eos_token_id", [1, 40]), ["eos_token_id", "40"]),
    (key("tie_word_embeddings", "no"), ["tie_word_embeddings", "'no'"]),
    (key("tie_word_embeddings", True), ["lm_head.weight", "differs", "model.embed_tokens.weight"]),
])  # fmt: skip
def test_configurations(change: Change, words: list[str], checkpoint: WRITE) -> None:
    with pytest.raises(CheckpointError) as error:
        layout(checkpoint(change))
    assert all(word in str(error.value) for word in words), str(error.value)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 70),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 50), max_size=3),
    st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "type", "x"]), st.floats() | st.text(), max_size=3),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(TINY.write(tmp_path_factory.mktemp("tiny")))


@settings(max_examples=400, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*TINY.config, "head_dim", "rope_parameters", "num_experts"]), ANYTHING,
                       min_size=1, max_size=3))  # fmt: skip
def test_a_changed_configuration_is_refused_or_fits_the_engine(tiny: Checkpoint, changes: dict[str, Any]) -> None:
    """Never another exception, and never a configuration with which the engine would not start."""
    try:
        accepted = MixtralLayout.of(replace(tiny, config={**TINY.config, **changes}))
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        MixtralConfig.parse(accepted.config)


def test_old_and_new_keys_of_the_configuration_mean_the_same(tmp_path: Path) -> None:
    old = layout(replace(TINY, rope_theta=123.0).write(tmp_path / "old"))
    new = layout(replace(TINY, rope_theta=123.0, new_keys=True).write(tmp_path / "new"))
    assert old.config == new.config
    assert old.config["rope_theta"] == 123.0


def test_what_transformers_leaves_out_has_its_default(checkpoint: WRITE) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in (
            "rope_theta",
            "rope_scaling",
            "rms_norm_eps",
            "sliding_window",
            "tie_word_embeddings",
            "bos_token_id",
        ):
            config.pop(name, None)

    config = layout(checkpoint(change)).config
    assert (config["rope_theta"], config["norm_eps"], config["sliding_window"]) == (1e6, 1e-5, None)
    assert (config["tied_head"], config["bos_id"], config["eos_ids"]) == (False, None, [1])


def test_a_tied_head_that_is_stored_twice_is_left_out(checkpoint: WRITE) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = True
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    assert "head" not in {ours for _, ours, _ in layout(checkpoint(change)).non_experts()}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers(value: float, dtype: Any, checkpoint: WRITE) -> None:
    weight = np.zeros((16, 12), dtype)
    weight[3, 4] = value
    opened = Checkpoint.open(checkpoint(put(EXPERT, weight)))
    with pytest.raises(CheckpointError, match=f"{EXPERT} holds NaN"):
        opened.read(EXPERT)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_every_dtype_is_read_as_written(name: str, tmp_path: Path) -> None:
    recipe = replace(TINY, dtype=name)
    opened = Checkpoint.open(recipe.write(tmp_path))
    for tensor, expected in recipe.weights().items():
        np.testing.assert_array_equal(opened.read(tensor), expected)


@pytest.mark.parametrize("cut", [0, 4, 100, -5])
def test_a_file_that_is_cut_off(cut: int, checkpoint: WRITE) -> None:
    path = checkpoint() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut off or damaged"):
        Checkpoint.open(path.parent)


@settings(max_examples=300, deadline=None)
@given(offset=st.integers(0, 3000), damage=st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_refused_or_still_describes_such_a_model(
    tiny: Checkpoint, offset: int, damage: bytes
) -> None:
    content = bytearray((tiny.folder / "model.safetensors").read_bytes())
    content[offset : offset + len(damage)] = damage
    folder = tiny.folder / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY.config))
    (folder / "model.safetensors").write_bytes(content)
    try:
        layout(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)


# --- sharded --------------------------------------------------------------------------------------------------------


def sharded(tmp_path: Path, change: Callable[[dict[str, str]], object]) -> Path:
    folder = replace(TINY, shards=3).write(tmp_path / "sharded")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return folder


def test_shards_hold_the_same_weights_as_one_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path, lambda weight_map: None)
    layout(folder)
    np.testing.assert_array_equal(Checkpoint.open(folder).read(EXPERT), TINY.weights()[EXPERT])


@pytest.mark.parametrize("target", [
    "../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", ".hidden.safetensors", "model.bin",
    "a\n.safetensors", ["x.safetensors"], 7, None,
])  # fmt: skip
def test_an_index_that_leaves_its_folder_is_refused(target: Any, tmp_path: Path) -> None:
    folder = sharded(tmp_path, lambda weight_map: weight_map.update({EXPERT: target}))
    with pytest.raises(CheckpointError, match="refused") as error:
        Checkpoint.open(folder)
    assert EXPERT in str(error.value)
    assert "\n" not in str(error.value)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path, lambda weight_map: None)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: cannot be read: No such file"):
        Checkpoint.open(folder)


def test_an_index_that_names_a_tensor_no_shard_holds(tmp_path: Path) -> None:
    folder = sharded(tmp_path, lambda weight_map: weight_map.update(extra="model-00001-of-00003.safetensors"))
    with pytest.raises(CheckpointError, match="'extra', placed there by"):
        Checkpoint.open(folder)


def test_a_shard_with_a_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    folder = sharded(tmp_path, lambda weight_map: weight_map.pop(EXPERT))
    with pytest.raises(CheckpointError, match=EXPERT):
        Checkpoint.open(folder)


# --- the folder -----------------------------------------------------------------------------------------------------


def test_folders_that_are_no_checkpoint(tmp_path: Path, checkpoint: WRITE) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        Checkpoint.open(tmp_path)
    folder = checkpoint()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        Checkpoint.open(folder)
    for text, complaint in (("{", "not JSON"), ("[1]", "expected a JSON object"), ("[" * 100_000, "not JSON")):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=complaint):
            Checkpoint.open(folder)


def test_every_recipe_has_exactly_the_tensors_of_its_layout(tmp_path: Path) -> None:
    for recipe in RECIPES:
        names = dict(layout(recipe.write(tmp_path / recipe.name)).shapes())
        assert names == {name: tensor.shape for name, tensor in recipe.weights().items()}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_never_ends_costs_no_memory(tmp_path: Path, name: str) -> None:
    folder = RECIPES[0].write(tmp_path / "hf")
    (folder / "tokenizer.json").write_text("{}")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=rf"{name}: (cannot be read: not a plain file|cut off or damaged)"):
        import_checkpoint(folder, tmp_path / "m.emoe", [Format("fp32")])
    assert not list(tmp_path.glob(".m.emoe*"))
