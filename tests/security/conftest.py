"""What strangers may do to the controller: devices by their output, files and databases by the names in them.

One folder for all packages, because such text crosses them: it comes in through harness/, is stored and shown by
reports/, and each test follows it to where a person or a shell would meet it. HYPOTHESIS_PROFILE=hard looks longer.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("hard", max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "20000")), deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("HYPOTHESIS_PROFILE") == "hard":
        for item in items:
            item.add_marker(pytest.mark.timeout(7200))  # the usual end of a test is for the usual number of examples
