"""Tells which version of the farm this is."""

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
    """Returns 0.1.0 for a release, and 0.1.0+g3f2a91c04b7e or ….dirty for a checkout, as PEP 440 has it."""
    commit = commit_of(Path(__file__).parents[1])
    return f"{RELEASE}+g{commit}" if commit else RELEASE


def commit_of(checkout: Path) -> str:
    """Returns the commit, with .dirty where files differ from it; empty where the folder itself is no checkout."""
    if not (checkout / ".git").exists():  # what is installed inside another project's checkout has no commit of ours
        return ""
    try:
        commit = _git(checkout, "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=.dirty")
        # `describe` does not count new files. One in the engine is deployed with it; elsewhere it may be a user's own.
        added = _git(checkout, "ls-files", "--others", "--exclude-standard", "--", "engine")
    except (OSError, subprocess.SubprocessError):  # no git here, or not our checkout: measuring goes on without it
        return ""
    return commit + ".dirty" if added and not commit.endswith(".dirty") else commit


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True, timeout=_GIT_DEADLINE_S,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )  # fmt: skip
    return done.stdout.strip()
