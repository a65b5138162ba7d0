"""One model in the spellings of several releases of transformers; where a folder says two things, it says which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from engine.container import Container
from engine.offline.importing.checkpoint import CheckpointError
from engine.offline.importing.importer import import_checkpoint
from engine.quantize import Format
from tests.engine.offline.conftest import TINY
from tests.golden.checkpoints import Recipe, write_checkpoint

Weights = dict[str, np.ndarray]


def imported(folder: Path, to: Path, recipe: Recipe, weights: Weights, shards: int = 1) -> Container:
    write_checkpoint(folder, recipe.config, weights, shards)
    return import_checkpoint(folder, to, [Format("fp32")])


def fused(weights: Weights, prefix: str) -> Weights:
    """Keeps a layer's experts in two tensors, as transformers 5 does."""
    tensors = dict(weights)
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.{prefix}"
        tensors[f"{new}.gate.weight"] = tensors.pop(f"{old}.gate.weight")
        parts = [[tensors.pop(f"{old}.experts.{e}.{w}.weight") for w in ("w1", "w3", "w2")] for e in range(3)]
        tensors[f"{new}.experts.gate_up_proj"] = np.stack([np.concatenate(part[:2]) for part in parts])
        tensors[f"{new}.experts.down_proj"] = np.stack([part[2] for part in parts])
    return tensors


@pytest.mark.parametrize("prefix", ["mlp", "block_sparse_moe"])
@pytest.mark.parametrize("shards", [1, 2])
def test_fused_experts_are_the_same_model(tmp_path: Path, prefix: str, shards: int) -> None:
    recipe = replace(TINY, new_keys=True)
    imported(tmp_path / "plain" / "hf", tmp_path / "plain.emoe", recipe, TINY.weights())
    imported(tmp_path / "fused" / "hf", tmp_path / "fused.emoe", recipe, fused(TINY.weights(), prefix), shards)
    assert (tmp_path / "fused.emoe").read_bytes() == (tmp_path / "plain.emoe").read_bytes()


def test_fused_experts_of_another_size_are_named(tmp_path: Path) -> None:
    tensors = fused(TINY.weights(), "mlp")
    tensors["model.layers.1.mlp.experts.down_proj"] = np.zeros((2, 16, 12), np.float32)
    with pytest.raises(
        CheckpointError, match=r"down_proj has shape \(2, 16, 12\) where config.json implies \(3, 16, 12\)"
    ):
        imported(tmp_path / "hf", tmp_path / "m.emoe", TINY, tensors)


def test_a_tied_table_may_have_either_name(tmp_path: Path) -> None:
    tied = replace(TINY, tied=True)
    tensors = tied.weights()
    imported(tmp_path / "hf", tmp_path / "embed.emoe", tied, tensors)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    imported(tmp_path / "hf", tmp_path / "head.emoe", tied, tensors)
    assert (tmp_path / "head.emoe").read_bytes() == (tmp_path / "embed.emoe").read_bytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_stored_frequencies_that_follow_from_theta_are_left_out(tmp_path: Path, dtype: type) -> None:
    tensors = TINY.weights()
    imported(tmp_path / "hf", tmp_path / "plain.emoe", TINY, tensors)
    for layer in range(2):
        frequencies = (10_000.0 ** -(np.arange(0, 8, 2) / 8)).astype(dtype)
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies
    imported(tmp_path / "hf", tmp_path / "m.emoe", TINY, tensors)
    assert (tmp_path / "m.emoe").read_bytes() == (tmp_path / "plain.emoe").read_bytes()
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = (500_000.0 ** -(np.arange(0, 8, 2) / 8)).astype(dtype)
    with pytest.raises(CheckpointError, match=r"layers\.1.*inv_freq holds other frequencies than rope_theta 10000"):
        imported(tmp_path / "hf", tmp_path / "m.emoe", TINY, tensors)


def test_an_index_of_an_earlier_save_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", TINY.config, TINY.weights(), shards=2)
    save_file(replace(TINY, seed=100).weights(), tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="one is of an earlier save; remove it"):
        import_checkpoint(tmp_path / "hf", tmp_path / "m.emoe")


def test_an_index_that_names_the_single_file_is_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", TINY.config, TINY.weights())
    index = {"weight_map": dict.fromkeys(TINY.weights(), "model.safetensors")}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    import_checkpoint(tmp_path / "hf", tmp_path / "m.emoe")


@pytest.mark.parametrize(("stops", "expected"), [(7, [1, 7]), ([1, 9], [1, 9]), ([9, 7], [1, 9, 7]), (None, [1])])
def test_all_the_tokens_at_which_transformers_stops_are_kept(
    tmp_path: Path, stops: int | list[int] | None, expected: list[int]
) -> None:
    write_checkpoint(tmp_path / "hf", TINY.config, TINY.weights())
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    assert import_checkpoint(tmp_path / "hf", tmp_path / "m.emoe").config["eos_ids"] == expected


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "hf", TINY.config, TINY.weights())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4\n"
    (tmp_path / "hf" / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=rf"{name}: only git-lfs's pointer to the file: run `git lfs pull`"):
        import_checkpoint(tmp_path / "hf", tmp_path / "m.emoe")


@pytest.mark.parametrize(("largest", "fits"), [(39, True), (40, False), (45, False)])
def test_the_largest_token_id_has_to_fit_the_model(tmp_path: Path, largest: int, fits: bool) -> None:
    write_checkpoint(tmp_path / "hf", TINY.config, TINY.weights())
    tokenizer = json.loads(Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0")).to_str())
    tokenizer["model"]["vocab"]["hi"] = largest
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(tokenizer))
    if fits:
        import_checkpoint(tmp_path / "hf", tmp_path / "m.emoe")
        return
    with pytest.raises(
        CheckpointError, match=rf"its largest token id is {largest}, where the model has the ids below 40"
    ):
        import_checkpoint(tmp_path / "hf", tmp_path / "m.emoe")
