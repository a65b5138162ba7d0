import io
import os
import zipfile

import pytest

from harness.device.deploy import ENGINE_SOURCE, EngineBundle
from harness.errors import UsageError
from harness.sweep.engines import EngineStore


@pytest.fixture
def store(tmp_path):
    return EngineStore(tmp_path / "engines", now=lambda: 1e9)


def bundle(tmp_path, text):
    source = tmp_path / "source" / "engine"
    source.mkdir(parents=True, exist_ok=True)
    (source / "__main__.py").write_text(text)
    return EngineBundle.of(source)


def test_an_engine_comes_back_as_it_was_kept(store, tmp_path) -> None:
    engine = EngineBundle.of(ENGINE_SOURCE)
    assert engine.sha256 not in store
    store.keep(engine)
    store.keep(engine)
    assert engine.sha256 in store
    assert store.get(engine.sha256) == engine
    assert len(list((tmp_path / "engines").iterdir())) == 1


def test_a_slowed_engine_is_another_engine_and_carries_its_delay(store) -> None:
    slowed = EngineBundle.of(ENGINE_SOURCE, test_delay="edgemoe=0.10")
    assert slowed.sha256 != EngineBundle.of(ENGINE_SOURCE).sha256
    store.keep(slowed)
    archive = zipfile.ZipFile(io.BytesIO(store.get(slowed.sha256).content))
    assert archive.read("engine/test_delay") == b"edgemoe=0.10"


def test_what_is_damaged_or_another_is_never_handed_out(store, tmp_path) -> None:
    one, other = bundle(tmp_path, "1"), bundle(tmp_path, "2")
    store.keep(one)
    path = tmp_path / "engines" / f"{one.sha256}.zip"
    path.write_bytes(other.content)
    with pytest.raises(UsageError, match="holds another engine"):
        store.get(one.sha256)
    path.write_bytes(b"PK damaged")
    with pytest.raises(UsageError, match="cannot be read"):
        store.get(one.sha256)
    with pytest.raises(UsageError, match="is not kept in"):
        store.get(other.sha256)
    with pytest.raises(UsageError, match="is no engine"):
        store.get("../../etc/passwd")


def test_an_engine_that_a_power_cut_left_empty_is_kept_anew(store, tmp_path) -> None:
    engine = bundle(tmp_path, "1")
    store.keep(engine)
    (tmp_path / "engines" / f"{engine.sha256}.zip").write_bytes(b"")
    store.keep(engine)
    assert store.get(engine.sha256) == engine


def test_pruning_leaves_what_is_no_engine(store, tmp_path) -> None:
    store.keep(bundle(tmp_path, "1"))
    backup = tmp_path / "engines" / "backup.zip"
    backup.write_bytes(b"years of work")
    os.utime(backup, (0, 0))
    store.prune(days=1, wanted=())
    assert backup.exists()


def test_pruning_leaves_what_is_wanted_or_was_used_of_late(store, tmp_path) -> None:
    old, wanted, fresh = (bundle(tmp_path, text) for text in "abc")
    for engine in (old, wanted, fresh):
        store.keep(engine)
    for engine in (old, wanted):
        os.utime(tmp_path / "engines" / f"{engine.sha256}.zip", (1e9 - 100 * 86400, 1e9 - 100 * 86400))
    assert store.prune(days=90, wanted={wanted.sha256}) == 1
    assert old.sha256 not in store
    assert wanted.sha256 in store
    assert fresh.sha256 in store


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="engines cannot be kept in"):
        EngineStore(tmp_path / "file" / "engines").keep(bundle(tmp_path, "1"))


def test_a_damaged_engine_is_not_there_and_is_put_aside_when_it_is_kept_again(store, tmp_path, caplog) -> None:
    one = bundle(tmp_path, "1")
    store.keep(one)
    path = tmp_path / "engines" / f"{one.sha256}.zip"
    path.write_bytes(one.content[:-30])
    assert one.sha256 not in store
    store.keep(one)
    assert store.get(one.sha256) == one
    assert path.with_name(f"{path.name}.damaged").read_bytes() == one.content[:-30]
    assert "is damaged: put aside" in caplog.text
