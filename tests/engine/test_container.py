from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.container import RECORD_ALIGNMENT, VERSION, Container, ContainerWriter
from engine.errors import ContainerError, EngineError, StorageError
from engine.experts.lanes import new_slab
from engine.experts.store import ExpertStore
from engine.generate import Engine
from engine.protocol import READERS, Sampling
from engine.quantize import Format
from engine.selftest import write_random_model
from engine.strategies import STRATEGIES


def small_model(path: Path, **options: Any) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    experts = {}
    with ContainerWriter(
        str(path), architecture="mixtral", config={"top_k": 1}, formats=[Format("fp32"), Format("int2")], **options
    ) as writer:
        writer.add_tensor("embed", random.standard_normal((5, 8)).astype(np.float32))
        writer.add_tensor("half", random.standard_normal(3).astype(np.float16))
        writer.add_tensor("brain", np.array([0x3F80, 0xC000], np.uint16), dtype="bf16")
        for layer in range(2):
            for expert in range(3):
                weights = {"gate": random.standard_normal((4, 8)).astype(np.float32)}
                experts[layer, expert] = weights
                writer.add_expert(layer, expert, weights)
    return experts


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.emoe"
    experts = small_model(path, tokenizer=b'{"a": 1}', origin={"source": "here"})
    container = Container.open(str(path))
    assert (container.moe_layers, container.experts_per_layer, len(container.records)) == (2, 3, 12)
    assert container.tokenizer_json() == b'{"a": 1}'
    assert container.origin == {"source": "here"}
    assert container.read_tensor("brain").tolist() == [1.0, -2.0]
    assert container.read_tensor("half").dtype == np.float32
    for (layer, expert), weights in experts.items():
        record = container.primary[layer, expert]
        packed = container.layouts[record.format].unpack(container.read_expert(record))["gate"]
        assert np.array_equal(packed.codes.T, weights["gate"])
    assert all(r.offset % RECORD_ALIGNMENT == 0 for r in container.records)
    assert container.expert_bytes == 12 * RECORD_ALIGNMENT
    assert [p.name for p in tmp_path.iterdir()] == ["m.emoe"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.emoe"
    path.write_bytes(b"the former container")
    with (
        pytest.raises(RuntimeError),
        ContainerWriter(str(path), architecture="mixtral", config={}, formats=[Format("fp32")]) as writer,
    ):
        writer.add_expert(0, 0, {"gate": np.zeros((4, 8), np.float32)})
        raise RuntimeError
    assert path.read_bytes() == b"the former container"
    with (
        pytest.raises(ContainerError, match="no matrices"),
        ContainerWriter(str(path), architecture="mixtral", config={}, formats=[Format("fp32")]) as writer,
    ):
        writer.add_tensor("embed", np.zeros(3, np.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["m.emoe"]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="nowhere"):
        small_model(tmp_path / "nowhere" / "m.emoe")
    with pytest.raises(ContainerError, match="No such file"):
        Container.open(str(tmp_path / "none.emoe"))


# --- damage ---------------------------------------------------------------------------------------------------------


def rewrite_header(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A hostile container: its header says what `change` makes of it, and all checksums are right."""
    data = source.read_bytes()
    start, size = struct.unpack_from("<QQ", data, 16)
    header = json.loads(data[start : start + size])
    change(header)
    text = json.dumps(header).encode()
    preamble = struct.pack("<8sIIQQQI", b"EDGEMOE\0", VERSION, 0, start, len(text), start + len(text), zlib.crc32(text))
    preamble += struct.pack("<I", zlib.crc32(preamble))
    target.write_bytes(preamble.ljust(64, b"\0") + data[64:start] + text)


HOSTILE: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("record beyond the end", lambda h: h["records"][0].__setitem__(3, 1 << 40), "outside the file"),
    ("record at a negative place", lambda h: h["records"][0].__setitem__(3, -16384), "not a number in range"),
    ("record over the preamble", lambda h: h["records"][0].__setitem__(3, 0), "outside the file"),
    ("records that overlap", lambda h: h["records"][1].__setitem__(3, h["records"][0][3]), "overlap"),
    ("record not aligned", lambda h: h["records"][0].__setitem__(3, h["records"][0][3] + 64), "not aligned"),
    ("record of a wrong size", lambda h: h["records"][0].__setitem__(4, 1), "disagree"),
    ("record of an unknown format", lambda h: h["records"][0].__setitem__(2, 9), "format"),
    ("record twice", lambda h: h["records"].append(h["records"][0]), "twice"),
    ("expert missing", lambda h: h.__setitem__("records", h["records"][2:]), "experts where"),
    ("no experts", lambda h: h.__setitem__("records", []), "0 experts"),
    ("a huge layer", lambda h: h["records"][0].__setitem__(0, 1 << 40), "experts where"),
    ("tensor over a record", lambda h: h["tensors"][0].__setitem__(3, h["records"][0][3]), "overlap"),
    ("tensor of a wrong size", lambda h: h["tensors"][0].__setitem__(2, [1 << 20, 1 << 20]), "disagree"),
    ("tensor twice", lambda h: h["tensors"].append(h["tensors"][0]), "twice"),
    ("packed tensor of one dimension", lambda h: h["tensors"][1].__setitem__(1, "int8"), "malformed|disagree"),
    ("tensor of an unknown precision", lambda h: h["tensors"][0].__setitem__(1, "fp8"), "malformed"),
    ("a huge matrix", lambda h: h["matrices"][0].__setitem__(1, 1 << 43), "malformed"),
    ("no matrix", lambda h: h.__setitem__("matrices", []), "no matrices"),
    ("unknown key", lambda h: h.__setitem__("surprise", 1), "unknown key"),
    ("missing key", lambda h: h.pop("config"), "malformed"),
    ("numbers as text", lambda h: h["records"][0].__setitem__(3, "16384"), "not a number"),
    ("true as a number", lambda h: h["records"][0].__setitem__(0, False), "not a number"),
    ("a checksum too large", lambda h: h["records"][0].__setitem__(5, 1 << 32), "checksum"),
    ("tokenizer outside", lambda h: h.__setitem__("tokenizer", [64, 1 << 40, 0]), "outside"),
    ("a list for an object", lambda h: h.__setitem__("origin", []), "malformed"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in HOSTILE], ids=[c[0] for c in HOSTILE])
def test_a_hostile_header_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    small_model(tmp_path / "good.emoe")
    rewrite_header(tmp_path / "good.emoe", tmp_path / "bad.emoe", lambda header: None)
    Container.open(str(tmp_path / "bad.emoe"))
    rewrite_header(tmp_path / "good.emoe", tmp_path / "bad.emoe", change)
    with pytest.raises(ContainerError, match=message) as caught:
        Container.open(str(tmp_path / "bad.emoe"))
    assert "bad.emoe" in str(caught.value)


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    small_model(tmp_path / "good.emoe")
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    rewrite_header(tmp_path / "good.emoe", tmp_path / "bad.emoe", lambda header: header.__setitem__("matrices", deep))
    with pytest.raises(ContainerError):
        Container.open(str(tmp_path / "bad.emoe"))


@pytest.mark.parametrize("length", [0, 4, 63, 64, 70000, -1])
def test_a_truncated_container_is_refused(tmp_path: Path, length: int) -> None:
    small_model(tmp_path / "good.emoe")
    data = (tmp_path / "good.emoe").read_bytes()
    (tmp_path / "cut.emoe").write_bytes(data[:length])
    with pytest.raises(ContainerError, match=r"cut\.emoe"):
        Container.open(str(tmp_path / "cut.emoe"))
    (tmp_path / "cut.emoe").write_bytes(data + b"\0")
    with pytest.raises(ContainerError, match="bytes long where"):
        Container.open(str(tmp_path / "cut.emoe"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, tuple[int, ...], list[bool]]:
    """A model, its bytes, what it generates, and for each byte whether anything depends on it."""
    path = tmp_path_factory.mktemp("fuzz") / "model.emoe"
    write_random_model(str(path), [Format("int8", 32)])
    data = path.read_bytes()
    container = Container.open(str(path))
    used = [False] * len(data)
    spans = [(t.offset, t.bytes) for t in container.tensors.values()] + [(r.offset, r.bytes) for r in container.records]
    start, size = struct.unpack_from("<QQ", data, 16)
    for offset, length in [*spans, (0, 64), (start, size)]:
        used[offset : offset + length] = [True] * length
    return path, data, answer(path), used


def answer(path: Path) -> tuple[int, ...]:
    engine = Engine(Container.open(str(path)), STRATEGIES["full-load"])
    try:
        return engine.generate((1, 2, 3), 2, Sampling())[0]
    finally:
        engine.close()


mutations = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1 << 30), st.integers(0, 7)),
    st.tuples(st.just("overwrite"), st.integers(0, 1 << 30), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 30), st.just(0)),
    st.tuples(st.just("insert"), st.integers(0, 1 << 30), st.binary(min_size=1, max_size=32)),
    st.tuples(st.just("zero"), st.integers(0, 1 << 30), st.integers(1, 40000)),
)


@given(changes=st.lists(mutations, min_size=1, max_size=3))
@settings(max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_containers_are_refused_or_unharmed(
    original: tuple[Path, bytes, tuple[int, ...], list[bool]], changes: list[tuple[str, int, Any]]
) -> None:
    path, data, expected, used = original
    mutated = bytearray(data)
    for kind, place, how in changes:
        at = place % max(1, len(mutated))
        if kind == "flip":
            mutated[at : at + 1] = bytes([mutated[at] ^ 1 << how]) if mutated else b""
        elif kind == "overwrite":
            mutated[at : at + len(how)] = how
        elif kind == "cut":
            del mutated[at:]
        elif kind == "insert":
            mutated[at:at] = how
        else:
            mutated[at : at + how] = b"\0" * len(mutated[at : at + how])
    bad = path.with_name("mutated.emoe")
    bad.write_bytes(mutated)
    harmed = len(mutated) != len(data) or any(
        used[i] for i in np.flatnonzero(np.frombuffer(mutated, np.uint8) != np.frombuffer(data, np.uint8))
    )
    try:
        tokens = answer(bad)
    except EngineError as error:
        assert harmed, f"refused without damage: {error}"
        assert "mutated.emoe" in str(error)
    else:
        assert not harmed, "damage was accepted"
        assert tokens == expected


# --- reading experts ------------------------------------------------------------------------------------------------


def open_store(container: Container, reader: str, **options: Any) -> ExpertStore:
    settings = {"keep_cached": True, "bytes_per_s": None, "clock": lambda: 0.0, "sleep": lambda s: None, **options}
    return ExpertStore(container, reader=reader, **settings)


@pytest.mark.parametrize(("bytes_per_s", "expected"), [(20e6, 16 << 10), (100e6, 80 << 10), (4e9, 1 << 20)])
def test_a_read_that_may_be_broken_off_asks_for_a_millisecond_at_a_time(
    tmp_path: Path, bytes_per_s: float, expected: int
) -> None:
    """And one that may not, for all of the record at once."""
    made = ContainerWriter(str(tmp_path / "m.emoe"), architecture="mixtral", config={}, formats=[Format("fp32")])
    with made as writer:
        writer.add_expert(0, 0, {"gate": np.zeros((3072, 1024), np.float32)})
    container = Container.open(str(tmp_path / "m.emoe"))
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    store = open_store(container, "pread", clock=lambda: now[0], sleep=sleep, bytes_per_s=bytes_per_s)
    record, asked = container.records[0], []
    slab = new_slab(record.slot_bytes)
    try:
        for _ in range(12):
            asked.clear()
            store.read(record, slab, lambda: asked.append(now[0]) or False)
        assert abs((asked[3] - asked[2]) * bytes_per_s - expected) < (17 << 10)
        asked.clear()
        store.read(record, slab)
        assert asked == []
    finally:
        store.close()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("keep_cached", [True, False])
def test_every_reader_reads_the_same(tmp_path: Path, reader: str, keep_cached: bool) -> None:
    small_model(tmp_path / "m.emoe")
    container = Container.open(str(tmp_path / "m.emoe"))
    store = open_store(container, reader, keep_cached=keep_cached)
    try:
        for record in container.records:
            slab = new_slab(record.slot_bytes)
            assert store.read(record, slab) == record.slot_bytes
            assert np.array_equal(slab[: record.bytes], container.read_expert(record))
    finally:
        store.close()


@pytest.mark.parametrize("reader", READERS)
def test_damage_in_an_expert_is_noticed_and_named(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "m.emoe"
    small_model(path)
    container = Container.open(str(path))
    record = container.records[3]
    with path.open("r+b") as file:
        file.seek(record.offset + record.bytes - 1)
        last = file.read(1)
        file.seek(record.offset + record.bytes - 1)
        file.write(bytes([last[0] ^ 128]))
        os.fsync(file.fileno())
    store = open_store(container, reader)
    try:
        with pytest.raises(StorageError, match=r"layer 0 expert 1 is damaged"):
            store.read(record, new_slab(record.slot_bytes))
        store.read(container.records[0], new_slab(RECORD_ALIGNMENT))
    finally:
        store.close()


def test_a_file_that_shrinks_while_it_is_used_is_an_error(tmp_path: Path) -> None:
    small_model(tmp_path / "m.emoe")
    container = Container.open(str(tmp_path / "m.emoe"))
    store = open_store(container, "pread")
    try:
        os.truncate(tmp_path / "m.emoe", 32768)
        with pytest.raises(StorageError, match="shorter"):
            store.read(container.records[-1], new_slab(RECORD_ALIGNMENT))
    finally:
        store.close()


def test_emulated_storage_takes_its_time_and_no_more(tmp_path: Path) -> None:
    small_model(tmp_path / "m.emoe")
    container = Container.open(str(tmp_path / "m.emoe"))
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds + 1e-4  # as real sleeps do, it takes a little longer

    store = open_store(container, "pread", bytes_per_s=1e6, clock=lambda: now[0], sleep=sleep)
    try:
        for record in container.records:
            store.read(record, new_slab(record.slot_bytes))
    finally:
        store.close()
    ideal = container.expert_bytes / 1e6
    assert ideal <= now[0] - 100 <= ideal + 2e-4
