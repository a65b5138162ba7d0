from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.container import Container
from engine.errors import ContainerError
from engine.offline.importing.checkpoint import CheckpointError
from engine.offline.importing.importer import formats_of, import_checkpoint
from engine.offline.summary import container_summary, verify
from engine.quantize import PRECISIONS, Format, as_float32
from tests.engine.offline.conftest import TINY
from tests.golden.checkpoints import SHIPPED

WRITE = Callable[..., Path]


@pytest.mark.parametrize("dtype, precision", [("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")])
def test_by_default_everything_keeps_its_precision_and_every_bit(dtype: str, precision: str, tmp_path: Path) -> None:
    recipe = replace(TINY, dtype=dtype)
    container = import_checkpoint(recipe.write(tmp_path / "hf"), tmp_path / "m.emoe")
    weights = recipe.weights()
    assert container.formats == (Format(precision),)
    assert {t.precision for t in container.tensors.values()} == {precision}
    np.testing.assert_array_equal(
        container.read_tensor("layers.1.router"),
        weights["model.layers.1.block_sparse_moe.gate.weight"].astype(np.float32),
    )
    packed = container.layouts[0].unpack(container.read_expert(container.primary[1, 2]))
    for matrix, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        codes = packed[matrix].codes
        values = as_float32(codes) if dtype == "bfloat16" else codes.astype(np.float32)
        expected = weights[f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"].astype(np.float32)
        np.testing.assert_array_equal(values.T, expected)


def test_experts_of_several_dtypes_become_float32(checkpoint: WRITE, tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
        tensors[name] = tensors[name].astype(np.float16)

    assert import_checkpoint(checkpoint(change), tmp_path / "m.emoe").formats == (Format("fp32"),)


def test_non_experts_in_int8(checkpoint: WRITE, tmp_path: Path) -> None:
    """Large matrices alone, to half a step of the largest of 32; norms and routers are what they were."""
    stored = import_checkpoint(checkpoint(), tmp_path / "stored.emoe")
    packed = import_checkpoint(checkpoint(), tmp_path / "int8.emoe", int8_non_experts=True)
    assert {name for name, tensor in packed.tensors.items() if tensor.precision == "int8"} == {
        "embed", "head", *(f"layers.{i}.{name}" for i in range(2) for name in "qkvo")
    }  # fmt: skip
    for name, tensor in packed.tensors.items():
        exact, found = stored.read_tensor(name), packed.read_tensor(name)
        assert tensor.shape == exact.shape == found.shape
        bound = 0 if tensor.precision != "int8" else np.abs(exact).max() / 127 * 0.51
        assert np.abs(found - exact).max() <= bound


def test_each_expert_is_there_in_each_format_the_first_is_primary(checkpoint: WRITE, tmp_path: Path) -> None:
    formats = formats_of(PRECISIONS, None, None)
    container = import_checkpoint(checkpoint(), tmp_path / "m.emoe", formats)
    facts = container_summary(container.path)
    assert facts["precisions"] == dict.fromkeys(PRECISIONS, 6)
    assert facts["primary_formats"] == {"fp32": 6}
    assert (facts["layers"], facts["moe_layers"], facts["experts_per_layer"], facts["top_k"]) == (2, 2, 3, 2)
    assert facts["bytes_experts"] + facts["bytes_non_experts"] < facts["bytes_total"] == container.file_bytes
    assert verify(container.path) == (len(container.tensors) + 6 * len(formats), container.file_bytes)


def test_formats() -> None:
    assert formats_of(["int4"], None, None) == (Format("int4", 32, symmetric=False),)
    assert formats_of(["int2", "fp16"], 0, True) == (Format("int2", 0, symmetric=True), Format("fp16"))
    assert formats_of(["fp16"], 32, False) == (Format("fp16"),)
    with pytest.raises(CheckpointError, match="twice"):
        formats_of(["int4", "int4"], None, None)


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: WRITE, tmp_path: Path) -> None:
    folder = checkpoint()
    for name in ("a.emoe", "b.emoe"):
        import_checkpoint(folder, tmp_path / name, formats_of(["int4"], None, None), origin={"licence": "none"})
    assert (tmp_path / "a.emoe").read_bytes() == (tmp_path / "b.emoe").read_bytes()
    assert Container.open(str(tmp_path / "a.emoe")).origin == {"checkpoint": "checkpoint", "licence": "none"}


def test_nothing_is_left_behind_where_the_last_expert_is_bad(checkpoint: WRITE, tmp_path: Path) -> None:
    bad = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[bad][0, 0] = np.nan

    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match=f"{bad} holds NaN"):
        import_checkpoint(checkpoint(change), out / "m.emoe")
    assert list(out.iterdir()) == []


def test_a_weight_beyond_the_range_of_fp16_names_the_expert(checkpoint: WRITE, tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][0, 0] = 1e6

    with pytest.raises(CheckpointError, match=r"layer 1 expert 2: up: .*bf16"):
        import_checkpoint(checkpoint(change), tmp_path / "m.emoe", [Format("fp16")])


def test_a_place_that_cannot_be_written(checkpoint: WRITE, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=r"no/m\.emoe: cannot be written: No such file"):
        import_checkpoint(checkpoint(), tmp_path / "no" / "m.emoe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ContainerError, match="folder: cannot be written"):
        import_checkpoint(checkpoint(), tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "folder"]


def test_tokenizers(checkpoint: WRITE, tmp_path: Path) -> None:
    folder = checkpoint()
    assert import_checkpoint(folder, tmp_path / "m.emoe").tokenizer_json() is None
    (folder / "tokenizer.json").write_bytes((SHIPPED / "tokenizer.json").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: its largest token id is 4095, where the model has the ids below 40"
    ):
        import_checkpoint(folder, tmp_path / "m.emoe")
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: its tokenizer cannot be read"):
        import_checkpoint(folder, tmp_path / "m.emoe")


def test_progress_goes_from_nothing_to_all(checkpoint: WRITE, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    import_checkpoint(checkpoint(), tmp_path / "m.emoe", progress=lambda done, of: seen.append((done, of)))
    assert seen == [(done, 6) for done in range(7)]


def test_verify_finds_one_wrong_bit_anywhere(checkpoint: WRITE, tmp_path: Path) -> None:
    container = import_checkpoint(checkpoint(), tmp_path / "m.emoe")
    last = container.records[-1]
    for offset, name in (
        (container.tensors["norm"].offset, "norm"),
        (last.offset + last.bytes - 64, "layer 1 expert 2"),
    ):
        content = bytearray((tmp_path / "m.emoe").read_bytes())
        content[offset] ^= 1
        (tmp_path / "damaged.emoe").write_bytes(content)
        with pytest.raises(ContainerError, match=f"{name}.*checksum"):
            verify(str(tmp_path / "damaged.emoe"))
