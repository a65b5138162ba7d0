from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ContainerError
from engine.kernels import Kernels
from engine.quantize import (
    BITS,
    FLOATS,
    Format,
    MatrixShape,
    Packed,
    RecordLayout,
    bf16_from_float32,
    group_size,
    in_rows,
)
from engine.selftest import all_formats

FORMATS = all_formats()


def pack(weight: np.ndarray, fmt: Format) -> Packed:
    layout = RecordLayout.of(fmt, [MatrixShape("w", *weight.shape)])
    return layout.unpack(layout.pack({"w": weight}))["w"]


def decode(packed: Packed) -> np.ndarray:
    """The format's definition, column by column, written without a look at the kernels: (rows, columns)."""
    fmt, rows, columns = packed.format, packed.rows, packed.columns
    weight = np.empty((rows, columns))
    for column in range(columns):
        if fmt.precision in FLOATS:
            values = packed.codes[column]
            if fmt.precision == "bf16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            weight[:, column] = values
            continue
        bits = BITS[fmt.precision]
        group, place = divmod(column, group_size(fmt, columns))
        code = fields(packed.codes[:, group], 2 if bits == 3 else bits, place)
        if bits == 3:
            assert packed.high is not None
            code += fields(packed.high[:, group], 1, place) << 2
        code = np.where(code > 127, code - 256, code) if bits == 8 else code - (1 << (bits - 1))
        assert packed.scales is not None
        values = code * packed.scales[:, group].ravel().astype(float)
        if packed.offsets is not None:
            values += packed.offsets[:, group].ravel().astype(float)
        weight[:, column] = values[:rows]
    return weight


def fields(words: np.ndarray, bits: int, column: int) -> np.ndarray:
    """words (blocks, words of a group, 32) -> the code of that column of the group in each row."""
    word, rest = divmod(column, 32 // bits)
    field, half = divmod(rest, 2)
    return (words[:, word].ravel().astype(np.int64) >> (16 * half + bits * field)) & ((1 << bits) - 1)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
@pytest.mark.parametrize("shape", [(24, 72), (8, 256), (5, 7), (1, 1), (3, 33)])
def test_weights_come_back_within_half_a_step(fmt: Format, shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    packed = pack(weight, fmt)
    error = np.abs(decode(packed) - weight)
    if fmt.precision in FLOATS:
        assert error.max() <= np.abs(weight).max() * {"fp32": 0, "fp16": 2**-11, "bf16": 2**-8}[fmt.precision]
        return
    assert packed.scales is not None
    scales = in_rows(packed.scales.astype(float))[:, : shape[0]]
    step = np.repeat(scales, group_size(fmt, shape[1]), axis=0)[: shape[1]].T  # (rows, columns)
    # Half a step, and what rounding a group's scale and offset to fp16 moves its outermost codes.
    slack = np.abs(weight).max() * 2**-10 * (1 << BITS[fmt.precision]) / 8 + 1e-6
    assert (error <= 0.5 * step + slack).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
@pytest.mark.parametrize("rows_of_x", [1, 3, 9])
def test_product_agrees_with_the_definition_of_the_format(fmt: Format, rows_of_x: int) -> None:
    random = np.random.default_rng(4)
    weight = random.standard_normal((40, 100)).astype(np.float32)
    x = random.standard_normal((rows_of_x, 100)).astype(np.float32)
    packed = pack(weight, fmt)
    expected = x.astype(np.float64) @ decode(packed).T
    assert np.abs(Kernels().product(packed, x) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
@pytest.mark.parametrize("shape", [(40, 100), (5, 7), (64, 256)])
def test_an_expanded_matrix_gives_the_same_bits_and_is_left_alone(fmt: Format, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(7)
    layout = RecordLayout.of(fmt, [MatrixShape("a", *shape), MatrixShape("b", *shape)])
    record = layout.pack({name: random.standard_normal(shape).astype(np.float32) for name in "ab"})
    packed = layout.unpack(record)
    # Of the slab's last use, something is left: every byte that counts has to be written.
    slab = np.full(layout.expanded().bytes, 0xFF, np.uint8)
    expanded = layout.expanded().unpack(slab)
    for name in "ab":
        Kernels().expand_into(packed[name], expanded[name])
    before = slab.copy()
    slab.setflags(write=False)
    expanded = layout.expanded().unpack(slab)
    kernels = Kernels()
    for rows_of_x in (1, 2, 4, 5, 33):
        x = random.standard_normal((rows_of_x, shape[1])).astype(np.float32)
        for name in "ab":
            assert expanded[name].codes.dtype == np.float32
            result = kernels.product(expanded[name], x)
            assert np.array_equal(result.view(np.uint32), kernels.product(packed[name], x).view(np.uint32))
    assert np.array_equal(slab, before)


def test_more_bits_and_finer_groups_lose_less() -> None:
    weight = np.random.default_rng(5).standard_normal((64, 256)).astype(np.float32)

    def loss(precision: str, group: int, symmetric: bool) -> float:
        return float(np.square(decode(pack(weight, Format(precision, group, symmetric))) - weight).mean())

    for group in (0, 32, 64):
        for symmetric in (True, False):
            losses = [loss(p, group, symmetric) for p in ("int8", "int4", "int3", "int2")]
            assert losses == sorted(losses)
        for precision in BITS:
            assert loss(precision, group, symmetric=False) < loss(precision, group, symmetric=True)
    assert loss("int4", 32, True) < loss("int4", 64, True) < loss("int4", 0, True)


def test_swiglu_is_the_formula() -> None:
    random = np.random.default_rng(6)
    shapes = [MatrixShape("gate", 24, 16), MatrixShape("up", 24, 16), MatrixShape("down", 16, 24)]
    weights = {s.name: random.standard_normal((s.rows, s.columns)).astype(np.float32) for s in shapes}
    layout = RecordLayout.of(Format("fp32"), shapes)
    x = random.standard_normal((5, 16)).astype(np.float32) * 40  # saturates the sigmoid on both sides
    gate, up = x.astype(np.float64) @ weights["gate"].T, x.astype(np.float64) @ weights["up"].T
    with np.errstate(over="ignore"):
        expected = (gate / (1 + np.exp(-gate)) * up) @ weights["down"].T
    result = Kernels().swiglu(layout.unpack(layout.pack(weights)), x)
    assert np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("fmt", "value"),
    [(Format("fp16"), 7e4), (Format("int2", 32), 1e5), (Format("int4", 32, False), 3e6), (Format("int8"), np.nan)],
    ids=lambda v: v.label if isinstance(v, Format) else str(v),
)
def test_what_a_format_cannot_hold_is_refused(fmt: Format, value: float) -> None:
    with pytest.raises(ContainerError, match="w: "):
        pack(np.full((8, 64), value, np.float32), fmt)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64))
@settings(max_examples=200, deadline=None)
def test_bf16_rounds_to_nearest_even(values: list[float]) -> None:
    array = np.array(values, np.float32)
    rounded = bf16_from_float32(array)
    lower = (array.view(np.uint32) >> 16).astype(np.uint32)
    for value, candidate, low in zip(array, rounded, lower, strict=True):
        with np.errstate(over="ignore"):
            options = [np.array([b << 16], np.uint32).view(np.float32)[0] for b in (low, low + 1)]
        distances = [abs(float(o) - float(value)) for o in options]
        if np.isinf(options[1]):
            continue  # the largest floats round to infinity, as IEEE 754 has it
        best = int(low) + (distances[1] < distances[0] or (distances[1] == distances[0] and int(low) % 2))
        assert int(candidate) == best


def test_formats_that_make_no_sense_are_refused() -> None:
    for arguments in (("int5",), ("int4", 16), ("fp16", 32), ("fp16", 0, False)):
        with pytest.raises(ContainerError):
            Format(*arguments)  # type: ignore[arg-type]


def test_every_half_comes_back_as_the_float_that_it_is() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    packed = Packed(Format("fp16"), 1, len(halves), halves[:, None], None, None, None)
    floats = Kernels().expand(packed)[0, :, 0]
    assert np.array_equal(floats, halves.astype(np.float32))
    assert np.array_equal(np.signbit(floats), np.signbit(halves))
