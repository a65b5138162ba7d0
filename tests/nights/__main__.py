"""ci/nights: how often the nightly gate is wrong, and how soon it is right, on nights drawn from recorded noise."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from reports.nights.night import Kind
from tests.nights.simulated import Change, SimulatedFarm, recorded

NIGHTS_A_BASELINE = 20
NIGHTS_BEFORE = 10  # a slow-down: a farm has a history
TARGET = ("pi4b-emulated", "edgemoe")


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/nights", description=__doc__)
    parser.add_argument("--nights", type=int, default=200, help="without any change (default 200)")
    parser.add_argument("--trials", type=int, default=40, help="of each slow-down (default 40)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    noise = recorded()
    codes, again, false = Counter(), 0, 0
    for start in range(0, options.nights, NIGHTS_A_BASELINE):
        farm = SimulatedFarm(options.seed + start, noise)
        for _ in range(min(NIGHTS_A_BASELINE, options.nights - start)):
            night = farm.night()
            codes[night.exit_code] += 1
            again += len(night.confirmations)
            false += any(f.kind is Kind.REGRESSION for f in night.findings)
    print(
        f"A/A: {false} false alarms in {options.nights} nights; exit codes {dict(sorted(codes.items()))}; "
        f"{again} suspicions measured again"
    )
    first = [found_after(options.seed + 1000 + i, noise, 1.10, 1) for i in range(options.trials)]
    print(f"10 % slower: found the first night in {sum(first)} of {options.trials} trials")
    three = [found_after(options.seed + 5000 + i, noise, 1.05, 3) for i in range(options.trials)]
    print(f"5 % slower: found within three nights in {sum(three)} of {options.trials} trials")
    kept = false <= 0.01 * options.nights and all(first) and sum(three) >= 0.95 * options.trials
    return 0 if kept else 1


def found_after(seed: int, noise: dict, slower: float, nights: int) -> bool:
    """Whether a slow-down of one strategy on one device is found, and nothing else is blamed."""
    farm = SimulatedFarm(seed, noise)
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
