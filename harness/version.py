"""Which farm this is."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from functools import cache
from pathlib import Path

_GIT_DEADLINE_S = 5.0

RELEASE = importlib.metadata.version("edgemoe-farm")


@cache
def farm_version() -> str:
    """Of a release 0.1.0; of a checkout with its commit, as PEP 440 has it: 0.1.0+g3f2a91c04b7e, or ….dirty."""
    commit = commit_of(Path(__file__).parents[1])
    return f"{RELEASE}+g{commit}" if commit else RELEASE


def commit_of(checkout: Path) -> str:
    """3f2a91c04b7e, with .dirty where files differ from it; empty where the folder itself is no checkout."""
    if not (checkout / ".git").exists():  # what is installed inside another project's checkout has no commit of ours
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=.dirty"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_GIT_DEADLINE_S,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # no git here, or not our checkout: measuring goes on without it
        return ""
    return done.stdout.strip()
