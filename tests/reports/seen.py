"""What a browser would see of a page, and all pages of the same records."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser

from reports.judging.judgement import Side, compare_sides
from reports.nights.gate import Measured
from reports.nights.night import Confirmation, Finding, Kind, Night
from reports.nights.trends import trends
from reports.pages.devices import devices_page
from reports.pages.night_page import night_page
from reports.pages.strategies import strategies_page
from reports.records import Run, Sweep

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}\x1b[31m\u202e\ud800"


class Page(HTMLParser):
    """Elements with their attributes, and text."""

    VOID = frozenset(("meta", "br", "img", "link", "input"))

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open, self.styles, self.scripts = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        within = {"style": self.styles, "script": self.scripts}
        within.get(self.open[-1] if self.open else "", self.text).append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def pages_of(sweep: Sweep, runs: Sequence[Run], text: str = "") -> dict[str, str]:
    """By kind. The night's is of a comparison with itself, in which `text` stands wherever words of people do."""
    side = Measured.of(sweep, runs)
    comparison = compare_sides(Side(text or "main", side.runs), Side(sweep.id, side.runs))
    cell = side.runs[0].cell
    found = (Finding(Kind.REGRESSION, text or "slower", cell, "tpot_s"), Finding(Kind.MISSING, text or "gone"))
    again = (Confirmation(cell, "tpot_s", 1.1, 1.05, 1.15, True, sweep.id, text or "confirmed", 0.001, 12),)
    night = Night(
        sweep.id, text or sweep.name, "2026-11-25T06:00:00+00:00", 1, text or "main", comparison, found, again,
        found[:1], (), trends(side, ("tpot_s", "peak_resident_bytes"), []),
    )  # fmt: skip
    return {
        "strategies": strategies_page([side]),
        "devices": devices_page([side]),
        "nightly": night_page(night, side, (), sweep.id),
    }
