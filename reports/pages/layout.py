"""One self-contained HTML file: style and script inside, no network, the same bytes for the same values.

Whatever a device or a user wrote reaches the page through autoescape and reports.text.marked. The content security
policy allows the one style sheet and the one script, by their hashes, and nothing else. Without the script a page lacks
filters, sorting and zoom, and no content.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from reports import units
from reports.records import Cell, emulation
from reports.text import marked


def self_contained(template: str, **values: Any) -> str:
    """The HTML of a template that extends layout.html.j2."""
    return _environment().get_template(template).render(**values, **_inline())


def where(cell: Cell, *, but: Iterable[str] = ()) -> str:
    """A cell in words; `but`: parts that stand beside it anyway."""
    parts = ("device", "container", "strategy", "expert_budget", "workload", "page_cache")
    words = [getattr(cell, part) for part in parts if part not in but]
    return " / ".join(word for word in words if word != "default")


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def words(name: str) -> str:
    return name.replace("_", " ")


@cache
def _inline() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, file in (("style", "page.css"), ("script", "page.js")):
        text = (Path(__file__).parents[1] / "templates" / file).read_text(encoding="utf-8")
        found[name] = Markup(text)  # noqa: S704 - our own file; the policy allows these very bytes
        found[f"{name}_hash"] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return found


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(moment=units.moment, counted=counted)
    environment.filters["at"] = _at
    environment.filters["emulation"] = emulation
    return environment


def _at(position: float) -> str:
    """On a chart's canvas: a tenth of its unit is less than can be seen."""
    return f"{position:.1f}".removesuffix(".0")


def _visible(value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return marked(value)
