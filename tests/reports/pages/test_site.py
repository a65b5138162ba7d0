"""The pages of a database as it is now."""

from __future__ import annotations

from dataclasses import replace
from typing import Never

import pytest

from reports.errors import RecordError
from reports.pages import page
from reports.pages.site import KEPT_S, MOST_KEPT, REFRESH_S, Site
from reports.results.controllers import Controller
from reports.results.database import ResultsDatabase
from reports.results.history import Recorded
from tests.reports.seen import HOSTILE, Page


@pytest.fixture
def database(tmp_path):
    with ResultsDatabase.open(tmp_path / "farm.db") as database:
        yield database


class Rendered:
    """A site whose pages are counted, and its clock."""

    def __init__(self, database, is_at_work=lambda controller: True):
        self.now, self.pages = 0.0, []
        self.site = Site(database, is_at_work, page=self.page, clock=lambda: self.now)
        self.answer = self.site.answer

    def page(self, database, sweeps, kind) -> str:
        (sweep,) = sweeps
        self.pages.append(sweep)
        return f"<p>{len(database.runs(sweep_id=sweep))} of {sweep}, {kind}"


def test_an_empty_database_has_a_page_and_no_sweep(database) -> None:
    site = Site(database, lambda controller: True)
    assert "Nothing has been measured yet" in Page(site.answer("/").body.decode()).words
    assert site.answer("/sweep/latest").status == 404


def test_a_page_is_the_one_that_report_writes(database, make) -> None:
    runs = make.runs(blocks=1)
    database.add_sweep(sweep := make.sweep(runs))
    for run in runs:
        database.add_run(run)
    site = Site(database, lambda controller: True)
    answer = site.answer(f"/sweep/{sweep.id}")
    assert answer.body.decode() == page(database, [sweep.id])
    assert answer.status == 200 and answer.refresh_s is None
    index = Page(site.answer("/").body.decode())
    its = {f"/sweep/{sweep.id}{kind}" for kind in ("", "/strategies", "/devices")}
    assert {a["href"] for a in index.all("a")} == {"/sweep/latest", *its}
    for kind in ("strategies", "devices"):
        body = site.answer(f"/sweep/{sweep.id}/{kind}").body.decode()
        assert body == page(database, [sweep.id], kind)
    assert site.answer(f"/sweep/{sweep.id}/nightly").status == 404
    assert "6 / 6" in index.words and "complete" in index.words


def test_a_page_is_rendered_once_for_each_record(database, make) -> None:
    first, second = make.run(block=0), make.run(block=1)
    database.add_sweep(make.sweep([first, second]))
    database.add_run(first)
    rendered = Rendered(database)
    path = f"/sweep/{first.sweep_id}"
    before = rendered.answer(path)
    assert rendered.answer(path) == before == rendered.answer("/sweep/20261123")
    assert len(rendered.pages) == 1
    database.add_run(second)
    after = rendered.answer(path)
    assert after.body != before.body and after.tag != before.tag
    assert len(rendered.pages) == 2
    rendered.now += KEPT_S + 1  # what it says of other sweeps may have changed
    assert rendered.answer(path).tag == after.tag
    assert len(rendered.pages) == 3
    assert database.recorded() == {first.sweep_id: Recorded(2, 2, second.started_at)}


def test_few_pages_are_kept(database, make) -> None:
    run = make.run()
    for i in range(MOST_KEPT + 1):
        database.add_sweep(make.sweep([run], id=f"s{i}-"))
    rendered = Rendered(database)
    for i in (*range(MOST_KEPT + 1), MOST_KEPT, 0):
        rendered.answer(f"/sweep/s{i}-")
    assert rendered.pages == [f"s{i}-" for i in (*range(MOST_KEPT + 1), 0)]


def test_what_is_measured_now_comes_again_unless_it_shall_stand_still(database, make) -> None:
    run = make.run()
    database.add_sweep(make.sweep([run]))
    living = [True]
    site = Rendered(database, lambda controller: living[0])
    path = f"/sweep/{run.sweep_id}"
    assert site.answer(path).refresh_s is None
    assert "incomplete" in site.answer("/").body.decode()
    database.enter(Controller("c", "me@here", 1, "", run.sweep_id))
    assert site.answer(path).refresh_s == site.answer("/").refresh_s == REFRESH_S
    assert site.answer(path, still=True).refresh_s is None
    assert "running" in site.answer("/").body.decode()
    living[0] = False
    assert site.answer(path).refresh_s is None
    assert "stale" in site.answer("/").body.decode()


@pytest.mark.parametrize(
    "path",
    ["/sweep", "/sweep/", "/sweep/..%2f..%2fetc%2fpasswd", "/../farm.db", "/farm.db", "//sweep/latest", "/sweep/%00",
     "/sweep/" + "9" * 101, "/sweep/%ff%fe", "", "/sweep/latest/more",
     "/sweep/latest/devices/more", "/sweep/latest/"],
)  # fmt: skip
def test_nothing_else_is_there(database, make, path) -> None:
    database.add_sweep(make.sweep([make.run()]))
    answer = Site(database, lambda controller: True).answer(path)
    assert answer.status == 404 and answer.content_type.startswith("text/plain")


def test_hostile_names_stay_text(database, make) -> None:
    run = make.run()
    database.add_sweep(replace(make.sweep([run], id='x"><i>/?#%'), name=HOSTILE.replace("\ud800", "")))
    page = Page(Site(database, lambda controller: True).answer("/").body.decode())
    assert not {tag for tag, _ in page.elements} & {"img", "i"}
    links = [a["href"] for a in page.all("a") if a["href"] != "/sweep/latest"]
    assert len(links) == 3
    assert {Site(database, lambda controller: True).answer(link).status for link in links} == {200}


def test_what_cannot_be_shown_is_one_line(database, make) -> None:
    database.add_sweep(make.sweep([make.run()]))

    def page(database, sweeps, kind) -> Never:
        raise RecordError("run x is \x1b damaged: restore the database")

    answer = Site(database, lambda controller: True, page=page).answer("/sweep/latest")
    assert (answer.status, answer.body.decode()) == (503, "run x is \ufffd damaged: restore the database\n")
