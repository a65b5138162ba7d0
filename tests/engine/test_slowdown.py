import platform

import pytest

from engine import slowdown as module
from engine.errors import RequestError
from engine.slowdown import slowdown


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("edgemoe=0.10", 0.10),
        ("sti=0.2,edgemoe=0.05", 0.05),
        ("sti=0.2", 0.0),
        (f"edgemoe@{platform.node()}=0.1", 0.1),
        ("edgemoe@elsewhere=0.1", 0.0),
        ("edgemoe@engine=0.1", 0.1),  # a folder on the way to the engine
    ],
)
def test_whom_it_slows(monkeypatch, text, share) -> None:
    monkeypatch.setenv("EDGEMOE_TEST_DELAY", text)
    found, notes = slowdown("edgemoe")
    assert found == share
    assert len(notes) == (share > 0)


@pytest.mark.parametrize("text", ["edgemoe", "edgemoe=", "=0.1", "edgemoe=-1", "edgemoe=nan", "edgemoe=x"])
def test_what_is_no_delay_is_refused(monkeypatch, text) -> None:
    monkeypatch.setenv("EDGEMOE_TEST_DELAY", text)
    with pytest.raises(RequestError, match="is no delay: write STRATEGY=SHARE"):
        slowdown("edgemoe")


def test_without_the_variable_a_file_beside_the_engine_says_it(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("EDGEMOE_TEST_DELAY", raising=False)
    assert slowdown("edgemoe") == (0.0, ())
    monkeypatch.setattr(module, "__file__", str(tmp_path / "slowdown.py"))
    (tmp_path / "test_delay").write_text("edgemoe=0.25\n")
    share, (note,) = slowdown("edgemoe")
    assert share == 0.25
    assert "slowed on purpose" in note
