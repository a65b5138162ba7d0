"""What strangers may do to the controller: devices by their output, files and databases by the names in them.

One folder for all packages, because such text crosses them: it comes in through harness/, is stored and shown by
reports/, and each test follows it to where a person or a shell would meet it. HYPOTHESIS_PROFILE=hard looks longer.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("hard", max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "20000")), deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
