"""One power cut: ci/power-cut is this with sixty. And that its verdict can be bad."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.programs.power_cut import CannotCutError, Card, cut_power


def test_after_a_power_cut_the_next_run_works_by_itself(tmp_path: Path) -> None:
    try:
        results = cut_power(tmp_path, cuts=1, seed=3)
    except CannotCutError as error:
        pytest.skip(str(error))
    assert [result.broken for result in results] == [""]


def test_what_was_not_synced_is_lost_with_the_power(tmp_path: Path) -> None:
    """The proof that a copy of the card is what a power cut leaves: without a sync there is nothing in it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a loop device needs root")
    try:
        card = Card(tmp_path)
        with card.mounted(card.image) as loop:
            (card.mounted_at / "synced").write_text("x")
            os.sync()
            (card.mounted_at / "not-synced").write_text("x")
            card.copy(loop, tmp_path / "copy")
        with card.mounted(tmp_path / "copy"):
            names = {path.name for path in card.mounted_at.iterdir()}
    except CannotCutError as error:
        pytest.skip(str(error))
    assert names == {"lost+found", "synced"}
