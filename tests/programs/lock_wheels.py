"""Writes harness/device/numpy.sha256: the numpy wheels that devices may get. `ci/lock` calls it.

For each Python it takes the newest wheel of each C library and processor, and an older one only where that runs on
older systems. Without --upgrade, nothing is asked for while each Python in WANTED has its wheels.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

TARGET = Path(__file__).parents[2] / "harness/device/numpy.sha256"
WANTED = ("cp38", "cp39", "cp310", "cp311", "cp312", "cp313", "cp313t", "cp314", "cp314t")
NAME = re.compile(r"numpy-([0-9.]+)-(cp3[0-9]+)-(cp3[0-9]+t?)-([a-z0-9_.]+)\.whl")
TAG = re.compile(r"(manylinux|musllinux)_([0-9]+)_([0-9]+)_([a-z0-9_]+)")
OLD_NAMES = {"manylinux1": "manylinux_2_5", "manylinux2010": "manylinux_2_12", "manylinux2014": "manylinux_2_17"}
HEAD = "# The numpy wheels that devices may get, as sha256sum writes them. Made by ci/lock.\n"


@dataclass(frozen=True)
class Wheel:
    """Describes a wheel of the index by what decides who can use it."""

    file: str
    sha256: str
    version: tuple[int, ...]
    abi: str
    library: str  # with its processor
    needs: tuple[int, int]  # the oldest version of that library that loads it


def wheels(listing: object) -> list[Wheel]:
    """Returns the Linux wheels of releases in a simple index's JSON (PEP 691) that are not yanked."""
    assert isinstance(listing, dict)
    found = []
    for file in listing["files"]:
        name = NAME.fullmatch(file["filename"])
        if name is None or file.get("yanked") or name[3] not in WANTED:
            continue
        version = tuple(int(part) for part in name[1].split("."))
        for platform in name[4].split("."):
            head, _, tail = platform.partition("_")
            tag = TAG.fullmatch(f"{OLD_NAMES[head]}_{tail}" if head in OLD_NAMES else platform)
            if tag is not None:
                library, needs = f"{tag[1]} {tag[4]}", (int(tag[2]), int(tag[3]))
                found.append(Wheel(file["filename"], file["hashes"]["sha256"], version, name[3], library, needs))
    return found


def chosen(found: list[Wheel]) -> dict[str, str]:
    """Returns hashes by file name: of each ABI and library those wheels than which none is newer and as undemanding."""
    return {
        wheel.file: wheel.sha256
        for wheel in found
        if not any(
            (other.abi, other.library) == (wheel.abi, wheel.library)
            and other.version > wheel.version
            and other.needs <= wheel.needs
            for other in found
        )
    }


def main(arguments: list[str]) -> int:
    locked = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
    if "--upgrade" not in arguments and all(f"-{abi}-" in locked for abi in WANTED):
        return 0
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    request = urllib.request.Request(f"{index}/numpy/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = chosen(wheels(json.load(answer)))
    TARGET.write_text(HEAD + "".join(f"{files[name]}  {name}\n" for name in sorted(files)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
