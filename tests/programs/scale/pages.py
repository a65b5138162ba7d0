"""What pages of 500 cells weigh and take, in Debian's chromium. ci/bench-pages has the command line.

render  the page from records that are read
open    from the address to the end of loading, filters and sorting made
filter  one word, from the key to the rows
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from reports.pages.devices import devices_page
from reports.pages.night_page import night_page
from reports.pages.strategies import strategies_page
from tests.programs.scale.sides import night, side

DEVICES, STRATEGIES, WORKLOADS = 10, 10, 5  # 500 cells
LIMITS: dict[str, float] = {"bytes": 2_000_000, "open_s": 1.0}
_OPENED = 5  # times; the median counts
_FILTER = """() => {
    const field = document.querySelector("#filters input");
    const began = performance.now();
    field.value = "board-03";
    field.dispatchEvent(new Event("input", { bubbles: true }));
    document.body.getBoundingClientRect();  // laid out anew
    return (performance.now() - began) / 1e3;
}"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="ci/bench-pages",
        description="Renders and opens each kind of page of 500 cells; exits with 1 where one is over its limit: "
        f"{LIMITS['bytes'] / 1e6:g} MB, {LIMITS['open_s']:g} s to open. Two minutes; needs chromium.",
        epilog="examples: ci/bench-pages --json    ci/bench-pages --blocks 1 --keep /tmp/pages",
    )
    parser.add_argument("--blocks", type=int, default=3, help="of each sweep (default 3)")
    parser.add_argument("--keep", type=Path, help="write the pages into this folder, and keep them")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        print("ci/bench-pages: no chromium: as root, apt-get install chromium", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-pages-") as temporary, sync_playwright() as playwright:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        result = measure(browser, options.blocks, folder)
        browser.close()
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{'':12}{'bytes':>10}{'render':>9}{'open':>9}{'filter':>9}")
        for kind, found in result.items():
            times = "".join(f"{found[name]:7.3f} s" for name in ("render_s", "open_s", "filter_s"))
            print(f"{kind:12}{found['bytes']:10}{times}")
    over = [(kind, name) for kind, found in result.items() for name, limit in LIMITS.items() if found[name] > limit]
    for kind, name in over:
        print(f"ci/bench-pages: {kind}: {name} is over {LIMITS[name]:g}", file=sys.stderr)
    return 1 if over else 0


def measure(browser: Browser, blocks: int, folder: Path) -> dict[str, dict[str, Any]]:
    size = DEVICES, STRATEGIES, WORKLOADS
    before, after = side(*size, blocks=blocks), side(*size, blocks=blocks, seed=2, day=1, slower=1.2)
    judged = night(before, after)
    kinds: dict[str, Callable[[], str]] = {
        "strategies": lambda: strategies_page([after]),
        "devices": lambda: devices_page([after]),
        "nightly": lambda: night_page(judged, after, [before], before.sweep.id),
    }
    found = {}
    for kind, page in kinds.items():
        began = time.perf_counter()
        html = page().encode()
        file = folder / f"{kind}.html"
        file.write_bytes(html)
        found[kind] = {"bytes": len(html), "render_s": time.perf_counter() - began, **_opened(browser, file)}
    return found


def _opened(browser: Browser, file: Path) -> dict[str, float]:
    opened, filtered = [], []
    for _ in range(_OPENED):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(file.as_uri())
        opened.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1e3"))
        filtered.append(page.evaluate(_FILTER))
        page.close()
    return {"open_s": median(opened), "filter_s": median(filtered)}


if __name__ == "__main__":
    sys.exit(main())
