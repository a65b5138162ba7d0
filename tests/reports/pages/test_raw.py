from dataclasses import replace

import pytest

from reports.pages.raw import Detail, raw_samples


@pytest.mark.parametrize("budget", [10_000_000, 60_000, 20_000, 1])
def test_samples_are_told_in_as_much_detail_as_fits(make, budget):
    runs = make.runs(blocks=2)
    raw = raw_samples(runs, budget)
    detail = {10_000_000: Detail.STEPS, 60_000: Detail.TIMES, 20_000: Detail.SAMPLES, 1: Detail.RUNS}[budget]
    assert raw.detail is detail
    assert len(raw.cells) == 6 and {raw.anchor(run) for run in runs} == {cell.anchor for cell in raw.cells}
    texts = [text for cell in raw.cells for run in cell.runs for _, text in run.samples]
    assert sum(map(len, texts)) < budget


def test_at_every_detail_a_run_has_its_conditions_verdict_and_command(make):
    runs = [replace(run, reasons=("looked at twice",)) for run in make.runs(blocks=1)]
    for budget in (10_000_000, 60_000, 20_000):
        for cell in raw_samples(runs, budget).cells:
            (run,) = cell.runs
            assert run.verdict == "valid" and run.reasons == ("looked at twice",)
            assert "cached before" in run.conditions and run.command.startswith("python3 -m engine")
            assert run.samples[0][1]
    for cell in raw_samples(runs, 1).cells:
        assert "valid" in cell.lines and "looked at twice" in cell.lines and "python3 -m engine" in cell.lines


def test_what_engaged_is_told_where_it_changes(make) -> None:
    runs = make.runs(devices=("pi4b-emulated",), blocks=4)
    edgemoe = [run for run in runs if run.cell.strategy == "edgemoe"]
    changed = replace(edgemoe[2], load=replace(edgemoe[2].load, reader="mmap"), command="python3 -m other")
    (cell,) = raw_samples([*edgemoe[:2], changed, edgemoe[3]]).cells
    engaged = [run.engaged for run in cell.runs]
    assert [bool(text) for text in engaged] == [True, False, True, True]
    assert "reader pread" in engaged[0] and "reader mmap" in engaged[2] and engaged[3] == engaged[0]
    command = edgemoe[0].command
    assert [run.command for run in cell.runs] == [command, "", "python3 -m other", command]


def test_a_sample_of_the_timeline_is_no_repetition(make):
    from tests.programs.scale.sides import complete

    (cell,) = raw_samples([complete(make.run())]).cells
    titles = [title for title, _ in cell.runs[0].samples]
    assert sum("for the timeline" in title for title in titles) == 1
    assert sum("warm-up" in title for title in titles) == 1


def test_runs_without_samples_have_no_place(make):
    failed = make.failed()
    raw = raw_samples([failed])
    assert raw.cells == () and raw.anchor(failed) == ""
