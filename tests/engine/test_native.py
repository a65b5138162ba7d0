"""Native kernels beside numpy and float64, and what happens where they cannot be had."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine.kernels.native as native
from engine.container import TENSOR_INT8, Container
from engine.errors import RequestError
from engine.generate import Engine
from engine.kernels import Kernels, NativeKernels, make_kernels, processor
from engine.kernels.native import DecoderLayer, TokenMemory
from engine.kernels.processor import NativeUnavailableError
from engine.models.layers import route_top_k
from engine.offline.importing.importer import import_checkpoint
from engine.protocol import Sampling
from engine.quantize import FLOATS, Format, MatrixShape, RecordLayout, as_float32, bf16_from_float32
from engine.selftest import all_formats, write_random_model
from engine.strategies import STRATEGIES
from tests.golden.checkpoints import RECIPES

SHAPES = [(64, 96), (40, 100), (5, 7), (1, 1), (33, 31), (31, 65), (256, 32)]


def library_names() -> list[str]:
    try:
        return processor.fitting_variants()
    except NativeUnavailableError:
        return []


# Every library that this processor can run, and several threads.
@pytest.fixture(scope="module", params=[(name, threads) for name in library_names() for threads in (1, 3)], ids=str)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeKernels]:
    name, threads = request.param
    folder = tmp_path_factory.mktemp(name)
    shutil.copy(Path(native.FOLDER) / f"{name}.so", folder)
    made = NativeKernels(threads, str(folder))
    assert (made.variant, made.threads) == (name, threads)
    yield made
    made.close()


def random_matrix(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("fmt", all_formats(), ids=lambda f: f.label)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_product_is_that_of_float64(kernels: NativeKernels, fmt: Format, shape: tuple[int, int], n: int) -> None:
    """The packed weights, exactly, times the activations: an error of their rounding to 16 bits, and no more."""
    layout = RecordLayout.of(fmt, [MatrixShape("w", *shape)])
    packed = layout.unpack(layout.pack({"w": random_matrix(*shape)}))["w"]
    exact = Kernels().product(packed, np.eye(shape[1], dtype=np.float32)).astype(np.float64)  # (columns, rows)
    x = random_matrix(n, shape[1])
    result = kernels.product(packed, x)
    assert result.shape == (n, shape[0])
    assert result.dtype == np.float32
    # Of each sum: half a step of 16 bits of the largest activation, times the weights that it meets.
    step = 2**-20 if fmt.precision in FLOATS else 2**-15
    bound = np.abs(exact).sum(axis=0) * np.abs(x).max() * step
    assert (np.abs(result - x @ exact) <= bound + 1e-6).all()


@pytest.mark.parametrize("fmt", all_formats(), ids=lambda f: f.label)
@pytest.mark.parametrize("names", [("gate", "up", "down"), ("wi", "wo")], ids=["swiglu", "relu"])
def test_an_expert_is_that_of_numpy(kernels: NativeKernels, fmt: Format, names: tuple[str, ...]) -> None:
    shapes = [MatrixShape(name, *((70, 45) if name == names[-1] else (45, 70))) for name in names]
    layout = RecordLayout.of(fmt, shapes)
    expert = layout.unpack(layout.pack({s.name: random_matrix(s.rows, s.columns) for s in shapes}))
    x = random_matrix(3, 70) * np.float32(4)  # also where the sigmoid is flat
    ours, theirs = (getattr(k, "swiglu" if len(names) == 3 else "relu_ffn")(expert, x) for k in (kernels, Kernels()))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    again = kernels.swiglu(expert, x) if len(names) == 3 else kernels.relu_ffn(expert, x)
    assert np.array_equal(ours, again)
    alone = kernels.swiglu(expert, x[1:2]) if len(names) == 3 else kernels.relu_ffn(expert, x[1:2])
    assert np.array_equal(ours[1:2], alone)  # a prompt's tokens get the bits that they would get one by one


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("n", [1, 3, 20])
def test_matrices_of_the_non_experts(kernels: NativeKernels, kind: str, shape: tuple[int, int], n: int) -> None:
    matrix = random_matrix(*shape)
    stored = bf16_from_float32(matrix) if kind == "bf16" else matrix.astype("<f2" if kind == "fp16" else "<f4")
    x = random_matrix(n, shape[1])
    exact = x.astype(np.float64) @ as_float32(stored).T.astype(np.float64)
    held = kernels.hold(stored)
    assert held.nbytes == stored.nbytes
    assert np.abs(kernels.linear(held, x) - exact).max() < 1e-5 * max(1, np.abs(exact).max())
    assert np.abs(Kernels().linear(Kernels().hold(stored), x) - exact).max() < 1e-5 * max(1, np.abs(exact).max())


def test_threads_change_no_bit() -> None:
    """Matrices that are large enough to be shared, with a last block that is not whole."""
    layout = RecordLayout.of(
        Format("int4", 32),
        [MatrixShape("gate", 1000, 320), MatrixShape("up", 1000, 320), MatrixShape("down", 320, 1000)],
    )
    expert = layout.unpack(layout.pack({s.name: random_matrix(s.rows, s.columns) for s in layout.matrices}))
    found = []
    for threads in (1, 2, 5):
        try:
            kernels = NativeKernels(threads)
        except NativeUnavailableError as error:
            pytest.skip(f"no native kernels here: {error}")
        held = kernels.hold(random_matrix(3001, 320))
        rounds = []
        for _ in range(300):  # with idle moments between them, in which workers may or may not fall asleep
            rounds.append(np.concatenate([kernels.swiglu(expert, random_matrix(2, 320)).ravel(),
                                          kernels.linear(held, random_matrix(1, 320)).ravel()]))  # fmt: skip
        assert all(np.array_equal(rounds[0], other) for other in rounds)
        found.append(rounds[0])
        kernels.close()
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_threads_end(tmp_path: Path) -> None:
    write_random_model(str(tmp_path / "m.emoe"), [Format("int4", 32)])
    container = Container.open(str(tmp_path / "m.emoe"))
    before = threading.active_count()
    for _ in range(20):
        engine = Engine(container, STRATEGIES["full-load"], threads=4)
        engine.generate((1, 2, 3), 4, Sampling())
        engine.close()
    assert threading.active_count() == before


def a_layer(kernels: NativeKernels, *, hidden: int, experts: int, top_k: int) -> tuple[DecoderLayer, TokenMemory]:
    """With one head of two, and a token that stands before its experts."""
    held = [kernels.hold(random_matrix(*shape)) for shape in [(2, hidden)] * 3 + [(hidden, 2), (experts, hidden)]]
    norm = np.ones(hidden, np.float32)
    layer = DecoderLayer(norm, norm, held, heads=1, kv_heads=1, head_dim=2, window=None, top_k=top_k, eps=1e-5)
    token = TokenMemory(hidden, experts, top_k)
    token.normed[...] = random_matrix(1, hidden)
    return layer, token


def test_a_token_s_experts_in_one_call(kernels: NativeKernels) -> None:
    shapes = [MatrixShape("gate", 45, 70), MatrixShape("up", 45, 70), MatrixShape("down", 70, 45)]
    packed = []
    for number, fmt in enumerate(all_formats()):
        layout = RecordLayout.of(fmt, shapes)
        weights = {s.name: random_matrix(s.rows + number, s.columns)[number:] for s in shapes}
        packed.append(layout.unpack(layout.pack(weights)))
    layer, token = a_layer(kernels, hidden=70, experts=9, top_k=4)
    token.shares[...] = [0.5, 0.2, 0.2, 0.1]
    for first in range(len(packed) - 3):
        experts, places = packed[first : first + 4], [2, 0, 3, 1]
        token.outputs[...] = np.nan
        token.x[...] = before = random_matrix(1, 70)
        kernels.experts_of_token(layer, token, experts[:3], places[:3], last=False)
        assert np.isnan(token.outputs[1]).all()
        assert np.array_equal(token.x, before)
        kernels.experts_of_token(layer, token, experts[3:], places[3:], last=True)
        for expert, place in zip(experts, places, strict=True):
            alone = kernels.swiglu(expert, token.normed)[0] * token.shares[0, place]
            assert np.array_equal(token.outputs[place], alone)
        assert np.array_equal(token.x, before + token.outputs.sum(axis=0))
    layer, token = a_layer(kernels, hidden=70, experts=20, top_k=20)  # more than fit in a call
    token.shares[...] = 1
    token.x[...] = 0
    kernels.experts_of_token(layer, token, packed[:1] * 20, range(20), last=True)
    assert (token.outputs == token.outputs[0]).all()
    assert np.allclose(token.x, 20 * token.outputs[0])
    with pytest.raises(ValueError, match="native kernels take"):
        kernels.experts_of_token(layer, token, packed[:1], [20], last=True)
    with pytest.raises(ValueError, match="native kernels take"):
        kernels.experts_of_token(layer, TokenMemory(71, 20, 20), packed[:1], [0], last=True)


@pytest.mark.parametrize("experts", [2, 8, 16, 40])
@pytest.mark.parametrize("k", [1, 2, 20])
def test_routing(kernels: NativeKernels, experts: int, k: int) -> None:
    k = min(k, experts)
    for seed in range(20):
        logits = np.random.default_rng(seed).integers(-9, 9, (1, experts)).astype(np.float32) / 2  # with ties
        chosen, shares = kernels.route(logits, k)
        expected, weights = route_top_k(logits, logits, k)
        assert chosen.tolist() == expected.tolist()
        assert np.abs(shares - weights).max() < 1e-6
    chosen, _ = kernels.route(np.full((1, experts), np.nan, np.float32), k)
    assert sorted(set(chosen[0].tolist())) == sorted(chosen[0].tolist())
    assert 0 <= chosen.min() <= chosen.max() < experts


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_non_experts_in_int8(kernels: NativeKernels, shape: tuple[int, int]) -> None:
    layout = RecordLayout.of(TENSOR_INT8, [MatrixShape("", *shape)])
    packed = layout.unpack(layout.pack({"": random_matrix(*shape)}))[""]
    exact = Kernels().product(packed, np.eye(shape[1], dtype=np.float32)).T  # (rows, columns)
    held, plain = kernels.hold(packed), Kernels().hold(packed)
    assert np.array_equal(plain, exact)
    assert held.nbytes < plain.nbytes / 3 or shape[0] % 32
    numbers = np.array([shape[0] - 1, 0])
    assert np.array_equal(kernels.rows(held, numbers), exact[numbers])
    for n in (1, 20):
        x = random_matrix(n, shape[1])
        assert np.abs(kernels.linear(held, x) - x @ exact.T).max() < 2e-4 * max(1, np.abs(x @ exact.T).max())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
@pytest.mark.parametrize("int8_non_experts", [False, True], ids=["stored", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
def test_whole_models_token_by_token(recipe: Any, threads: int, int8_non_experts: bool, tmp_path: Path) -> None:
    """Grouped queries, sliding windows, odd sizes, every float: the logits of numpy along 24 tokens."""
    if not library_names():
        pytest.skip("no native kernels here")
    container = import_checkpoint(recipe.write(tmp_path / "hf"), tmp_path / "m.emoe", int8_non_experts=int8_non_experts)
    found = []
    for backend in ("numpy", "native"):
        engine = Engine(container, STRATEGIES["full-load"], backend=backend, threads=threads)
        try:
            prompt = np.array(recipe.prompt[:3])
            state = engine.model.start(3, 24)
            rows = [engine.model.prefill(prompt, state, engine.supply)]
            for token in recipe.prompt[3:27]:
                rows.append(engine.model.forward(np.array([token]), state, engine.supply))
            found.append(np.concatenate(rows))
        finally:
            engine.close()
    bound = 1e-3 if int8_non_experts else 1e-4  # rounded activations, in every product of every layer
    assert np.abs(found[1] - found[0]).max() < bound * max(1.0, float(np.abs(found[0]).max()))


def test_a_shape_that_does_not_fit_is_refused(kernels: NativeKernels) -> None:
    layout = RecordLayout.of(Format("int4", 32), [MatrixShape("w", 8, 64)])
    packed = layout.unpack(layout.pack({"w": random_matrix(8, 64)}))["w"]
    for shape in ((1, 63), (64,), (1, 65)):
        with pytest.raises(ValueError, match="is expected"):
            kernels.product(packed, np.zeros(shape, np.float32))


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_sequence_does_not_grow_past_its_positions(kernels: NativeKernels, tmp_path: Path, backend: str) -> None:
    """Which for native kernels would be memory of somebody else."""
    write_random_model(str(tmp_path / "m.emoe"), [Format("int4", 32)])
    engine = Engine(Container.open(str(tmp_path / "m.emoe")), STRATEGIES["full-load"], backend=backend)
    try:
        state = engine.model.start(3, 1)
        engine.model.prefill(np.array([1, 2, 3]), state, engine.supply)
        engine.model.forward(np.array([4]), state, engine.supply)
        with pytest.raises(RequestError, match="started with 4 positions"):
            engine.model.forward(np.array([5]), state, engine.supply)
    finally:
        engine.close()


def test_without_a_library_numpy_computes_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_model(str(tmp_path / "m.emoe"), [Format("int4", 32)])
    container = Container.open(str(tmp_path / "m.emoe"))
    expected = generated(container, "auto")
    for why, change in (
        ("there is no library for mips64", lambda: monkeypatch.setattr(processor, "machine_name", lambda: "mips64")),
        ("without asimd", lambda: monkeypatch.setattr(processor, "machine_name", lambda: "aarch64")),
        ("cannot be loaded", lambda: monkeypatch.setattr(native, "FOLDER", broken(tmp_path))),
        ("cannot be loaded", lambda: monkeypatch.setattr(native, "FOLDER", str(tmp_path / "nowhere"))),
        ("off numpy's results", lambda: monkeypatch.setattr(NativeKernels, "_self_test", lambda self: 0.5)),
        ("off numpy's results", lambda: monkeypatch.setattr(NativeKernels, "_self_test", lambda self: np.nan)),
    ):
        with monkeypatch.context():
            change()
            chosen, warnings = make_kernels("auto")
            assert chosen.backend == "numpy"
            assert why in warnings[0]
            assert generated(container, "auto") == expected
            with pytest.raises(RequestError, match="ask for numpy or auto"):
                make_kernels("native")
        monkeypatch.undo()


def broken(folder: Path) -> str:
    """A folder with files that are no libraries."""
    for variants in processor.VARIANTS.values():
        for name, _ in variants:
            (folder / f"{name}.so").write_bytes(b"no library")
    return str(folder)


def test_where_the_best_library_does_not_work_the_next_one_does(
    kernels: NativeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting = processor.fitting_variants()
    if len(fitting) < 2:
        pytest.skip("one library at most fits this processor")
    shutil.copy(Path(native.FOLDER) / f"{fitting[1]}.so", tmp_path)
    (tmp_path / f"{fitting[0]}.so").write_bytes(b"no library")
    assert NativeKernels(folder=str(tmp_path)).variant == fitting[1]
    numpy_off = iter([0.5, 0.0])
    monkeypatch.setattr(NativeKernels, "_self_test", lambda self: next(numpy_off))
    assert NativeKernels().variant == fitting[1]


@pytest.mark.parametrize("fmt", all_formats(), ids=lambda f: f.label)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("column", [0, 31, 40, 99])
def test_what_is_not_a_number_is_not_lost(kernels: NativeKernels, fmt: Format, value: float, column: int) -> None:
    layout = RecordLayout.of(fmt, [MatrixShape("w", 40, 100)])
    packed = layout.unpack(layout.pack({"w": random_matrix(40, 100)}))["w"]
    x = random_matrix(2, 100)
    x[1, column] = value
    result = kernels.product(packed, x)
    assert np.isfinite(result[0]).all()
    assert not np.isfinite(result[1]).any()


def test_views_that_do_not_fit_one_another_are_refused(kernels: NativeKernels) -> None:
    shapes = [MatrixShape("gate", 40, 70), MatrixShape("up", 45, 70), MatrixShape("down", 70, 40)]
    layout = RecordLayout.of(Format("int4", 32), shapes)
    expert = layout.unpack(layout.pack({s.name: random_matrix(s.rows, s.columns) for s in shapes}))
    with pytest.raises(ValueError, match="native kernels take"):
        kernels.swiglu(expert, random_matrix(1, 70))
    short = expert["gate"]._replace(rows=72)
    with pytest.raises(ValueError, match="native kernels take"):
        kernels.product(short, random_matrix(1, 70))


def generated(container: Container, backend: str) -> tuple[int, ...]:
    engine = Engine(container, STRATEGIES["full-load"], backend=backend)
    try:
        return engine.generate((1, 2, 3), 12, Sampling())[0]
    finally:
        engine.close()


def test_records_say_which_backend_computed(kernels: NativeKernels, tmp_path: Path) -> None:
    write_random_model(str(tmp_path / "m.emoe"), [Format("int4", 32)])
    container = Container.open(str(tmp_path / "m.emoe"))
    for backend in ("numpy", "native", "auto"):
        engine = Engine(container, STRATEGIES["full-load"], backend=backend)
        load = engine.load_report(0.0, None)
        engine.close()
        assert load.backend == ("numpy" if backend == "numpy" else "native")
        assert (load.variant is None) == (backend == "numpy")
    with pytest.raises(RequestError, match="backend 'fortran' is not one of"):
        make_kernels("fortran")


def test_the_environment_says_what_auto_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMOE_BACKEND", "numpy")
    kernels, warnings = make_kernels("auto")
    assert (kernels.backend, warnings) == ("numpy", [])
    monkeypatch.setenv("EDGEMOE_BACKEND", "fortran")
    assert make_kernels("numpy")[0].backend == "numpy"
    with pytest.raises(RequestError, match="EDGEMOE_BACKEND 'fortran' is not one of"):
        make_kernels("auto")
