"""Tells how often the nightly gate is wrong, and how soon it is right, on nights drawn from recorded noise."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from reports.nights.night import Kind, Night
from tests.programs.nights.simulated import Change, SimulatedFarm, recorded

NIGHTS_A_BASELINE = 20
NIGHTS_BEFORE = 10  # a slow-down: a farm has a history
TARGET = ("pi4b-emulated", "edgemoe")


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/nights", description=__doc__)
    parser.add_argument("--nights", type=int, default=200, help="without any change (default 200)")
    parser.add_argument("--trials", type=int, default=40, help="of each slow-down (default 40)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    starts = range(0, options.nights, NIGHTS_A_BASELINE)
    lengths = [min(NIGHTS_A_BASELINE, options.nights - start) for start in starts]
    with ProcessPoolExecutor() as farms:
        nights = [n for part in farms.map(unchanged, [options.seed + start for start in starts], lengths) for n in part]
        seeds = range(options.seed + 1000, options.seed + 1000 + options.trials)
        first = list(farms.map(partial(found_after, slower=1.10, nights=1), seeds))
        seeds = range(options.seed + 5000, options.seed + 5000 + options.trials)
        three = list(farms.map(partial(found_after, slower=1.05, nights=3), seeds))
    codes = Counter(night.exit_code for night in nights)
    again = sum(len(night.confirmations) for night in nights)
    false = sum(any(f.kind is Kind.REGRESSION for f in night.findings) for night in nights)
    print(
        f"A/A: {false} false alarms in {options.nights} nights; exit codes {dict(sorted(codes.items()))}; "
        f"{again} suspicions measured again"
    )
    print(f"10 % slower: found the first night in {sum(first)} of {options.trials} trials")
    print(f"5 % slower: found within three nights in {sum(three)} of {options.trials} trials")
    kept = false <= 0.01 * options.nights and all(first) and sum(three) >= 0.95 * options.trials
    return 0 if kept else 1


def unchanged(seed: int, nights: int) -> list[Night]:
    """Returns nights of one farm on which nothing changed but the engine's hash."""
    with tempfile.TemporaryDirectory() as folder:
        farm = SimulatedFarm(seed, recorded(), Path(folder))
        return [farm.night() for _ in range(nights)]


def found_after(seed: int, slower: float, nights: int) -> bool:
    """Returns whether a slow-down of one strategy on one device is found, and nothing else is blamed."""
    with tempfile.TemporaryDirectory() as folder:
        farm = SimulatedFarm(seed, recorded(), Path(folder))
        for _ in range(NIGHTS_BEFORE):
            farm.night()
        for _ in range(nights):
            night = farm.night({TARGET: Change(slower=slower)})
            blamed = {(f.cell.device, f.cell.strategy) for f in night.findings if f.kind is Kind.REGRESSION and f.cell}
            if blamed:
                return blamed == {TARGET} and night.exit_code == 1
    return False


if __name__ == "__main__":
    sys.exit(main())
