"""python -m harness.cli is edgemoe-farm."""

from harness.cli import main

main()
