"""A plugin of pytest for ci/devices: one line for each stand-in, which is one file of tests, on file descriptor 3."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_reports: dict[str, list[pytest.TestReport]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = Path(report.location[0]).stem.removeprefix("test_").replace("_", "-")
    if name not in _reports:
        _tell_of_the_last()
    _reports.setdefault(name, []).append(report)


def pytest_sessionfinish() -> None:
    _tell_of_the_last()


def _tell_of_the_last() -> None:
    if _reports:
        name, reports = next(reversed(_reports.items()))
        os.write(3, f"{name}: {_ending(reports)}\n".encode())


def _ending(reports: list[pytest.TestReport]) -> str:
    failed = [report for report in reports if report.failed]
    if failed:
        crash = getattr(failed[0].longrepr, "reprcrash", None)
        why = crash.message if crash else failed[0].longreprtext
        return f"failed: {failed[0].location[2]}: {' '.join(why.split())[:300]}"
    skipped = [report.longrepr[2] for report in reports if report.skipped and isinstance(report.longrepr, tuple)]
    why = ", ".join(dict.fromkeys(reason.removeprefix("Skipped: ") for reason in skipped))
    if not any(report.when == "call" and report.passed for report in reports):
        return f"skipped: {why}"
    return f"passed, in part skipped: {why}" if why else "passed"
