"""A model whose arithmetic overflows fails, and says where: the likeliest of NaN would be token 0, and fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import engine.selftest
from engine.container import Container, ContainerWriter
from engine.errors import ContainerError, NumberError
from engine.generate import Engine
from engine.offline.accuracy.model import OfflineModel
from engine.offline.summary import verify
from engine.protocol import Passage, Sampling
from engine.quantize import Format, MatrixShape, RecordLayout, bf16_from_float32
from engine.selftest import selftest_profile, write_random_model
from engine.strategies import STRATEGIES

PROMPT = (1, 17, 5, 80, 33)
INT4 = Format("int4", 32, symmetric=False)
Spoil = Callable[[pytest.MonkeyPatch], None]


def tensor(name: str, factor: float) -> Spoil:
    """Multiplies one non-expert tensor, far beyond what products of it can hold."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        add = ContainerWriter.add_tensor

        def added(self: ContainerWriter, called: str, array: np.ndarray, **options: str) -> None:
            add(self, called, array * np.float32(factor if called == name else 1), **options)

        monkeypatch.setattr(ContainerWriter, "add_tensor", added)

    return spoil


def stored(part: str, value: float, layer: int) -> Spoil:
    """Gives a layer's experts a scale, an offset or a weight that no import would; the checksums are right."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        add, pack, where = ContainerWriter.add_expert, RecordLayout.pack, [-1]

        def added(self: ContainerWriter, at: int, *arguments: object) -> None:
            where[0] = at
            add(self, at, *arguments)  # type: ignore[arg-type]

        def packed(self: RecordLayout, weights: dict[str, np.ndarray]) -> np.ndarray:
            record = pack(self, weights)
            if where[0] == layer:
                for matrix in self.unpack(record).values():
                    into = getattr(matrix, part)
                    into[...] = bf16_from_float32(np.array(value, np.float32)) if into.dtype == np.uint16 else value
            return record

        monkeypatch.setattr(ContainerWriter, "add_expert", added)
        monkeypatch.setattr(RecordLayout, "pack", packed)

    return spoil


def config(key: str, value: float, architecture: str = "_MIXTRAL") -> Spoil:
    return lambda monkeypatch: monkeypatch.setitem(getattr(engine.selftest, architecture), key, value)


CASES = {
    "weights-overflow": (tensor("layers.1.o", 1e38), "mixtral", INT4, "layer 1"),
    "norm-overflows": (tensor("layers.2.moe_norm", 1e38), "mixtral", INT4, "layer 2"),
    "embedding-overflows": (tensor("embed", 1e37), "mixtral", INT4, "the embedding"),
    "head-overflows": (tensor("head", 3e38), "mixtral", INT4, "the head"),
    "nan-scale": (stored("scales", np.nan, 1), "mixtral", INT4, "layer 1"),
    "infinite-scale": (stored("scales", np.inf, 2), "mixtral", INT4, "layer 2"),
    "nan-offset": (stored("offsets", np.nan, 0), "mixtral", INT4, "layer 0"),
    "nan-int8-scale": (stored("scales", np.nan, 1), "mixtral", Format("int8"), "layer 1"),
    "infinite-fp16-weight": (stored("codes", np.inf, 1), "mixtral", Format("fp16"), "layer 1"),
    "nan-fp16-weight": (stored("codes", np.nan, 1), "mixtral", Format("fp16"), "layer 1"),
    "infinite-bf16-weight": (stored("codes", np.inf, 1), "mixtral", Format("bf16"), "layer 1"),
    "nan-fp32-weight": (stored("codes", np.nan, 2), "mixtral", Format("fp32"), "layer 2"),
    "rope": (config("rope_theta", 1e-300), "mixtral", INT4, "layer 0"),
    "switch-scale": (stored("scales", np.nan, 2), "switch_transformers", INT4, "layer"),
    "switch-weights": (tensor("decoder.1.attention.o", 1e38), "switch_transformers", INT4, "layer"),
    "switch-head": (tensor("head", 3e38), "switch_transformers", INT4, "the head"),
}
UNSEEN = {"rope", *(name for name in CASES if name.endswith(("overflow", "overflows", "weights", "head")))}


@pytest.fixture(params=CASES)
def spoiled(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    spoil, architecture, fmt, where = CASES[request.param]
    with monkeypatch.context() as patched:
        spoil(patched)
        write_random_model(str(tmp_path / "m.emoe"), [fmt], architecture=architecture)
    return request.param, str(tmp_path / "m.emoe"), where


@pytest.mark.parametrize("backend", ["numpy", "auto"])
@pytest.mark.parametrize("strategy", ["full-load", "naive-swap", "edgemoe-online"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_overflows_fails_and_names_the_layer(
    spoiled: tuple[str, str, str], strategy: str, backend: str, tmp_path: Path
) -> None:
    name, path, where = spoiled
    write_random_model(str(tmp_path / "sound.emoe"), [INT4], architecture=CASES[name][1])
    profile = selftest_profile(Container.open(str(tmp_path / "sound.emoe")))
    made = Engine(Container.open(path), STRATEGIES[strategy], profile=profile, backend=backend)
    try:
        with pytest.raises(NumberError, match=rf"m\.emoe: no number from {where}.*model verify"):
            made.generate(PROMPT, 4, Sampling())
        with pytest.raises(NumberError, match=f"no number from {where}"):
            made.nats(Passage(PROMPT, (3, 4)))
    finally:
        made.close()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_offline_tools_refuse_it_too(spoiled: tuple[str, str, str]) -> None:
    name, path, _ = spoiled
    decoder = (0, 1) if CASES[name][1] == "switch_transformers" else None
    with pytest.raises(NumberError, match="no number"):
        OfflineModel.open(path).logits(PROMPT, decoder)


def test_verify_finds_what_is_stored_as_no_number(spoiled: tuple[str, str, str]) -> None:
    name, path, _ = spoiled
    if name in UNSEEN:  # each float is a number; only their products are none
        verify(path)
    else:
        with pytest.raises(ContainerError, match=r"m\.emoe: layer \d expert \d: \w+ holds NaN or infinity: import"):
            verify(path)


@pytest.mark.parametrize(("precision", "wider"), [("fp16", "bf16"), ("bf16", "fp32")])
def test_a_weight_that_a_format_cannot_hold_is_refused(precision: str, wider: str) -> None:
    shape = MatrixShape("up", 8, 8)
    weight = np.full((8, 8), np.finfo(np.float32).max, np.float32)
    with pytest.raises(ContainerError, match=f"up: a weight is beyond the range of {precision}: import it as {wider}"):
        RecordLayout.of(Format(precision), [shape]).pack({"up": weight})
